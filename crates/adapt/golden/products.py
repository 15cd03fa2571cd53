"""Writes the golden files of adapters whose change is a product of another kind than LoRA's, by PEFT. See README.md for names and
shapes; pins in benches/peers/requirements.txt.

Usage: products.py [case ...]
"""

import peft
import torch

import writing

STD = 0.2

# name: (base, configuration, merged site, seed)
CASES = {
    "llama_loha": (
        "llama",
        peft.LoHaConfig(r=2, alpha=3, target_modules=["q_proj", "k_proj", "up_proj"], rank_pattern={"up_proj": 4}),
        "model.layers.1.self_attn.k_proj",
        401,
    ),
    "qwen2_loha": (
        "qwen2",
        peft.LoHaConfig(r=6, alpha=6, target_modules=["v_proj", "down_proj"], alpha_pattern={"down_proj": 9}),
        "model.layers.0.mlp.down_proj",
        402,
    ),
    "llama_lokr": (
        "llama",
        peft.LoKrConfig(r=2, alpha=4, target_modules=["q_proj", "v_proj", "down_proj"], rank_pattern={"down_proj": 3}),
        "model.layers.0.mlp.down_proj",
        403,
    ),
    "qwen2_lokr": (
        "qwen2",
        peft.LoKrConfig(r=1, alpha=2, decompose_both=True, decompose_factor=3, target_modules=["k_proj", "o_proj", "gate_proj"]),
        "model.layers.1.mlp.gate_proj",
        404,
    ),
    "llama_hira": (
        "llama",
        peft.HiraConfig(r=3, target_modules=["q_proj", "gate_proj", "down_proj"]),
        "model.layers.1.mlp.gate_proj",
        405,
    ),
    "gpt2_hira": (
        "gpt2",
        peft.HiraConfig(r=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True),
        "transformer.h.0.attn.c_attn",
        406,
    ),
    # 32 inputs are not a multiple of 5.
    "llama_bone": (
        "llama",
        peft.MissConfig(r=5, target_modules=["k_proj", "down_proj", "up_proj"]),
        "model.layers.0.mlp.up_proj",
        407,
    ),
    "llama_bone_mini": (
        "llama",
        peft.MissConfig(r=6, mini_r=8, init_weights="mini", target_modules=["q_proj", "gate_proj"]),
        "model.layers.1.mlp.gate_proj",
        408,
    ),
    "qwen2_bone_bat": (
        "qwen2",
        peft.MissConfig(r=4, init_weights="bat", target_modules=["v_proj", "down_proj"]),
        "model.layers.1.mlp.down_proj",
        409,
    ),
    "llama_gralora": (
        "llama",
        peft.GraloraConfig(r=6, gralora_k=2, alpha=9, target_modules=["k_proj", "o_proj", "gate_proj"]),
        "model.layers.0.self_attn.k_proj",
        410,
    ),
    "gpt2_gralora": (
        "gpt2",
        peft.GraloraConfig(r=4, gralora_k=4, hybrid_r=2, alpha=6, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True),
        "transformer.h.1.mlp.c_fc",
        411,
    ),
    "llama_delora": (
        "llama",
        peft.DeloraConfig(r=4, delora_lambda=3, target_modules=["q_proj", "down_proj"], rank_pattern={"down_proj": 2}),
        "model.layers.0.mlp.down_proj",
        412,
    ),
    "qwen2_delora": (
        "qwen2",
        peft.DeloraConfig(r=3, delora_lambda=2, target_modules=["v_proj", "up_proj"], lambda_pattern={"v_proj": 5}),
        "model.layers.1.self_attn.v_proj",
        413,
    ),
    "llama_vera": (
        "llama",
        peft.VeraConfig(r=7, target_modules=["q_proj", "k_proj", "down_proj"]),
        "model.layers.0.mlp.down_proj",
        414,
    ),
    "gpt2_vera": (
        "gpt2",
        peft.VeraConfig(r=5, d_initial=0.5, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True),
        "transformer.h.1.mlp.c_proj",
        415,
    ),
    "llama_randlora": (
        "llama",
        peft.RandLoraConfig(r=5, randlora_alpha=20, target_modules=["k_proj", "down_proj"]),
        "model.layers.0.mlp.down_proj",
        416,
    ),
    "gpt2_randlora": (
        "gpt2",
        peft.RandLoraConfig(r=4, randlora_alpha=8, sparse=True, target_modules=["c_fc"], fan_in_fan_out=True),
        "transformer.h.0.mlp.c_fc",
        417,
    ),
}


def randomise(model, g):
    """Moves what trains from its start: with a factor at 0 neither another's gradient nor a wrong scale would show."""
    for _, p in sorted((name, p) for name, p in model.named_parameters() if p.requires_grad):
        p.add_(torch.randn(p.shape, generator=g) * STD)


def write(name):
    base, config, site, seed = CASES[name]
    config.task_type = "CAUSAL_LM"
    writing.write(name, base, config, site, seed, randomise)


if __name__ == "__main__":
    writing.main(CASES, write)
