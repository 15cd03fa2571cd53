"""Writes the golden files of components at the ends of linears, (IA)³ and RoAd, and at norms, by PEFT. See README.md for names and shapes; pins in
benches/peers/requirements.txt.

Usage: ends.py [case ...]
"""

import peft
import torch

import writing

# name: (base, configuration, merged site, seed). GPT-2's linears are `Conv1D`s, which PEFT's RoAd does not take.
CASES = {
    "qwen2_ia3": ("qwen2", peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"), "model.layers.1.self_attn.k_proj", 401),
    "gpt2_ia3": ("gpt2", peft.IA3Config(target_modules=["c_attn", "c_fc"], feedforward_modules=["c_fc"], fan_in_fan_out=True, task_type="CAUSAL_LM"), "transformer.h.0.mlp.c_fc", 402),
    "qwen2_norms": ("qwen2", peft.LNTuningConfig(target_modules=["input_layernorm", "post_attention_layernorm", "norm"], task_type="CAUSAL_LM"), "model.layers.0.input_layernorm", 406),
    "gpt2_norms": ("gpt2", peft.LNTuningConfig(target_modules=["ln_1", "ln_2"], task_type="CAUSAL_LM"), "transformer.h.1.ln_2", 407),
    "qwen2_road_1": ("qwen2", peft.RoadConfig(variant="road_1", group_size=8, target_modules="all-linear", task_type="CAUSAL_LM"), "model.layers.0.self_attn.q_proj", 403),
    "llama_road_2": ("llama", peft.RoadConfig(variant="road_2", group_size=4, target_modules=["q_proj", "o_proj", "up_proj"], task_type="CAUSAL_LM"), "model.layers.1.mlp.up_proj", 404),
    "qwen2_road_4": ("qwen2", peft.RoadConfig(variant="road_4", group_size=8, target_modules=["v_proj", "down_proj"], task_type="CAUSAL_LM"), "model.layers.1.mlp.down_proj", 405),
}


def randomise(model, g):
    for name, p in sorted(model.named_parameters()):
        if "ia3_l" in name or "road_" in name or "ln_tuning_layers" in name:
            p.add_(torch.randn(p.shape, generator=g) * 0.4)


def write(name):
    base, config, site, seed = CASES[name]
    writing.write(name, base, config, site, seed, randomise)


if __name__ == "__main__":
    writing.main(CASES, write)
