"""Writes the golden files of PEFT's newer tuners, by PEFT. See README.md for names and shapes; pins in benches/peers/requirements.txt.

Usage: tuners.py [case ...]
"""

import peft
import torch

import writing

STD = 0.2
# Many numbers of factors are one of these, divided by the root of how many.
SHARED = 2.0

# name: (base, configuration, merged site; None where nothing merges)
CASES = {
    "qwen2_beft": ("qwen2", lambda: peft.BeftConfig(target_modules=["v_proj", "k_proj"]), "model.layers.1.self_attn.v_proj"),
    "llama_beft": ("llama", lambda: peft.BeftConfig(target_modules=["v_proj", "down_proj"]), None),
    "llama_supertuning": ("llama", lambda: peft.SupertuningConfig(sparsity=0.9, target_modules=["q_proj", "down_proj"]), "model.layers.1.mlp.down_proj"),
    "qwen2_supertuning": (
        "qwen2",
        lambda: peft.SupertuningConfig(sparsity=0.95, select_top=False, r=2, lora_alpha=3, target_modules=["v_proj", "gate_proj"]),
        "model.layers.0.self_attn.v_proj",
    ),
    "llama_deft": ("llama", lambda: peft.DeftConfig(r=3, target_modules=["q_proj", "down_proj"]), "model.layers.0.mlp.down_proj"),
    "gpt2_deft": (
        "gpt2",
        lambda: peft.DeftConfig(r=4, decomposition_method="qr", alpha=6, target_modules=["c_attn"], fan_in_fan_out=True),
        "transformer.h.1.attn.c_attn",
    ),
    "qwen2_deft": (
        "qwen2",
        lambda: peft.DeftConfig(r=3, decomposition_method="qr", para=True, target_modules=["k_proj", "gate_proj"]),
        "model.layers.1.mlp.gate_proj",
    ),
    "llama_peanut": ("llama", lambda: peft.PeanutConfig(r=5, depth=2, act_fn="silu", scaling=0.5, target_modules=["q_proj", "up_proj"]), "model.layers.0.mlp.up_proj"),
    "qwen2_peanut": ("qwen2", lambda: peft.PeanutConfig(r=4, target_modules=["v_proj", "down_proj"]), "model.layers.1.mlp.down_proj"),
    "llama_osf": ("llama", lambda: peft.OSFConfig(effective_rank=9, target_modules=["k_proj", "up_proj"]), "model.layers.1.mlp.up_proj"),
    "qwen2_osf": ("qwen2", lambda: peft.OSFConfig(effective_rank=0.75, target_modules=["q_proj", "down_proj"]), "model.layers.0.mlp.down_proj"),
    "llama_pvera": ("llama", lambda: peft.PveraConfig(r=7, target_modules=["q_proj", "k_proj", "down_proj"]), "model.layers.0.mlp.down_proj"),
    "gpt2_pvera": (
        "gpt2",
        lambda: peft.PveraConfig(r=5, d_initial=0.5, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True),
        "transformer.h.1.mlp.c_proj",
    ),
    "llama_lily": ("llama", lambda: peft.LilyConfig(r=4, num_B=3, scaling=0.5, target_modules=["q_proj", "down_proj"]), None),
    "qwen2_lily": ("qwen2", lambda: peft.LilyConfig(r=3, stride_A=2, num_B=2, target_modules=["k_proj", "up_proj"]), None),
    "llama_unilora": (
        "llama",
        lambda: peft.UniLoraConfig(r=2, theta_d_length=40, save_indices=True, target_modules=["q_proj", "down_proj"]),
        "model.layers.0.self_attn.q_proj",
    ),
    "gpt2_unilora": (
        "gpt2",
        lambda: peft.UniLoraConfig(r=3, theta_d_length=70, proj_seed=5, save_indices=True, target_modules=["c_attn"], fan_in_fan_out=True),
        "transformer.h.0.attn.c_attn",
    ),
}


def randomise(model, g):
    """Moves what trains from its start."""
    for name, p in sorted((name, p) for name, p in model.named_parameters() if p.requires_grad):
        p.add_(torch.randn(p.shape, generator=g) * (SHARED if "theta_d" in name else STD))


def write(name):
    base, config, site = CASES[name]
    config = config()
    config.task_type = "CAUSAL_LM"
    # The order in which the cases came, so that a new one changes no other's numbers.
    seed = 700 + list(CASES).index(name)
    # What PEFT starts at random.
    torch.manual_seed(seed)
    writing.write(name, base, config, site, seed, randomise)


if __name__ == "__main__":
    writing.main(CASES, write)
