"""Writes the golden files of LoRA and DoRA by PEFT. See README.md for names and shapes; pins in benches/peers/requirements.txt.

Usage: lora.py [case ...]
"""

import peft
import torch

import writing

# A and B both random: with B = 0 neither A's gradient nor a wrong scale would show.
STD = 0.2

# name: (base, settings beyond r = 4 and alpha = 8, merged site)
CASES = {
    "llama_some": ("llama", dict(target_modules=["q_proj", "v_proj"]), "model.layers.1.self_attn.v_proj"),
    "llama_all_linear": ("llama", dict(target_modules="all-linear"), "model.layers.0.mlp.down_proj"),
    "llama_patterns": (
        "llama",
        dict(
            target_modules=r".*layers\.1\.(self_attn\.[qo]_proj|mlp\.(up|down)_proj)",
            rank_pattern={"up_proj": 2, r".*\.q_proj": 6},
            alpha_pattern={"down_proj": 3, "up_proj": 5},
        ),
        "model.layers.1.mlp.up_proj",
    ),
    "qwen2_some_rslora": ("qwen2", dict(target_modules=["k_proj", "o_proj", "gate_proj"], use_rslora=True), "model.layers.0.self_attn.k_proj"),
    "gpt2_all_linear": ("gpt2", dict(target_modules="all-linear", fan_in_fan_out=True), "transformer.h.1.attn.c_attn"),
    "qwen2_all_linear": ("qwen2", dict(target_modules="all-linear"), "model.layers.1.self_attn.q_proj"),
    "qwen2_dora": (
        "qwen2",
        dict(target_modules="all-linear", use_dora=True, rank_pattern={"down_proj": 2}, alpha_pattern={"k_proj": 3}),
        "model.layers.1.mlp.down_proj",
    ),
    "llama_embedded": ("llama", dict(target_modules=["embed_tokens", "q_proj"], rank_pattern={"embed_tokens": 3}, alpha_pattern={"embed_tokens": 5}), "model.embed_tokens"),
    # Its head is the table's: PEFT adds to what is looked up and to no logits, so that merged it would be another model.
    "gpt2_embedded": ("gpt2", dict(target_modules=["wte", "c_proj"], fan_in_fan_out=True), None),
    "gpt2_dora": ("gpt2", dict(target_modules="all-linear", use_dora=True, use_rslora=True, fan_in_fan_out=True), "transformer.h.0.attn.c_proj"),
}
# The order in which the cases came, so that a new one changes no other's numbers.
SEEDS = ["llama_some", "llama_all_linear", "llama_patterns", "qwen2_some_rslora", "qwen2_all_linear", "gpt2_all_linear", "qwen2_dora", "gpt2_dora", "llama_embedded", "gpt2_embedded"]


def randomise(model, g):
    for name, p in sorted(model.named_parameters()):
        if "lora_magnitude_vector" in name:
            p.mul_(1 + torch.randn(p.shape, generator=g) * STD)
        elif "lora_" in name:
            p.copy_(torch.randn(p.shape, generator=g) * STD)


def write(name):
    base, settings, site = CASES[name]
    config = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, bias="none", task_type="CAUSAL_LM", **settings)
    writing.write(name, base, config, site, 100 + SEEDS.index(name), randomise, packed=name == "llama_all_linear")


if __name__ == "__main__":
    writing.main(CASES, write)
