"""Writes the golden files of PEFT's newer tuners, by PEFT. See README.md for names and shapes; pins in benches/peers/requirements.txt.

Usage: tuners.py [case ...]
"""

import peft
import torch

import writing
from banks import own

STD = 0.2

OSF = [(f"osf_svd_params.{name}_low", f"osf_{name}") for name in "USV"]


def osf(module):
    starts = {f"osf_{name}_start": getattr(module, f"_osf_{name}_low_init")["default"] for name in "USV"}
    high = {f"osf_{name}_high": getattr(module, f"_osf_{name}_high") for name in "UV"}
    return starts | {name: kept["default"] for name, kept in high.items() if "default" in kept}


# What makes a case ours, where PEFT leaves out tensors that its numbers are about.
OURS = {
    "llama_osf": ({"method": "osf", "preserved_rank": 9}, osf, OSF),
    "qwen2_osf": ({"method": "osf", "preserved": 0.75}, osf, OSF),
}

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
}


def randomise(model, g):
    """Moves what trains from its start."""
    for _, p in sorted((name, p) for name, p in model.named_parameters() if p.requires_grad):
        p.add_(torch.randn(p.shape, generator=g) * STD)


def write(name):
    base, config, site = CASES[name]
    config = config()
    config.task_type = "CAUSAL_LM"
    # The order in which the cases came, so that a new one changes no other's numbers.
    seed = 700 + list(CASES).index(name)
    # What PEFT starts at random.
    torch.manual_seed(seed)
    writing.write(name, base, config, site, seed, randomise)
    if name in OURS:
        own(name, base, *OURS[name])


if __name__ == "__main__":
    writing.main(CASES, write)
