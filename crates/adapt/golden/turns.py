"""Writes the golden files of methods that turn a weight or change it by few numbers, by PEFT: OFT. See README.md for names and
shapes; pins in benches/peers/requirements.txt.

Usage: turns.py [case ...]
"""

import peft
import torch

import writing

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]

# name: (base, configuration, merged site)
CASES = {
    "llama_oft": ("llama", lambda: peft.OFTConfig(oft_block_size=8, target_modules="all-linear"), "model.layers.1.mlp.down_proj"),
    "qwen2_oft": (
        "qwen2",
        lambda: peft.OFTConfig(r=4, oft_block_size=0, use_cayley_neumann=False, block_share=True, target_modules=ATTENTION),
        "model.layers.0.self_attn.q_proj",
    ),
}
STD = 0.2


def randomise(model, g):
    for name, p in sorted(model.named_parameters()):
        if p.requires_grad:
            p.add_(torch.randn(p.shape, generator=g) * STD)


def write(name):
    base, config, site = CASES[name]
    config = config()
    config.task_type = "CAUSAL_LM"
    # The order in which the cases came, so that a new one changes no other's numbers.
    writing.write(name, base, config, site, 300 + list(CASES).index(name), randomise)


if __name__ == "__main__":
    writing.main(CASES, write)
