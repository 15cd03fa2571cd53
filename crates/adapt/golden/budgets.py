"""Writes the golden files of adapters that share ranks among sites, by PEFT: what they compute (see README.md), and
`adalora_budget.json`, what PEFT's allocator leaves of the values of three sites step by step, on given gradients.

Usage: budgets.py [case ...]
"""

import json
from types import SimpleNamespace

import peft
import torch
from peft.tuners.adalora.layer import RankAllocator

import writing

STD = 0.3

# name: (base, configuration, parts that are left at single sites, merged site, seed)
CASES = {
    "llama_adalora": (
        "llama",
        peft.AdaLoraConfig(init_r=4, target_r=2, lora_alpha=9, orth_reg_weight=0, total_step=10, target_modules=["q_proj", "v_proj", "down_proj"]),
        {},
        "model.layers.0.mlp.down_proj",
        901,
    ),
    "qwen2_adalora": (
        "qwen2",
        peft.AdaLoraConfig(init_r=5, target_r=3, lora_alpha=7, orth_reg_weight=0, total_step=10, target_modules=["k_proj", "o_proj", "up_proj"]),
        {
            "model.layers.0.self_attn.k_proj": [True, False, True, False, False],
            "model.layers.1.mlp.up_proj": [False, True, True, True, True],
        },
        "model.layers.1.mlp.up_proj",
        902,
    ),
    "gpt2_adalora": (
        "gpt2",
        peft.AdaLoraConfig(init_r=3, target_r=3, lora_alpha=6, orth_reg_weight=0, total_step=10, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True),
        {},
        "transformer.h.1.mlp.c_fc",
        903,
    ),
}


def write(name):
    base, config, left, site, seed = CASES[name]
    config.task_type = "CAUSAL_LM"

    def randomise(model, g):
        for key, p in sorted((key, p) for key, p in model.named_parameters() if p.requires_grad):
            p.copy_(torch.randn(p.shape, generator=g) * STD)
        if not left:
            return
        # As the allocator leaves it: every site is in the pattern.
        pattern = {}
        for key, p in model.base_model.model.named_parameters():
            if "lora_E" in key:
                kept = left.get(key.removesuffix(".lora_E.default"), [True] * p.shape[0])
                p.mul_(torch.tensor(kept)[:, None])
                pattern[key] = kept
        model.peft_config["default"].rank_pattern = pattern

    writing.write(name, base, config, site, seed, randomise)


def budget():
    """Three sites of four parts, twenty steps of gradient descent with the rate 0.1."""
    g = torch.Generator().manual_seed(904)
    shapes = {"lora_A": (4, 3), "lora_E": (4, 1), "lora_B": (2, 4)}
    names = [f"site_{at}.{local}.default" for at in range(3) for local in shapes]
    parameters = {name: torch.nn.Parameter(torch.randn(shapes[name.split(".")[1]], generator=g)) for name in names}
    start = {name: p.detach().clone() for name, p in parameters.items()}
    model = SimpleNamespace(named_parameters=parameters.items)
    config = SimpleNamespace(target_r=2, tinit=2, tfinal=6, deltaT=3, beta1=0.85, beta2=0.85, total_step=20)
    allocator = RankAllocator(model, config, "default")
    gradients, values, pattern = [], [], None
    for number in range(1, 21):
        given = {name: torch.randn(p.shape, generator=g) for name, p in parameters.items()}
        for name, p in parameters.items():
            p.grad = given[name]
            p.data -= 0.1 * given[name]
        # As `AdaLoraModel.update_and_allocate` does.
        if number < 14:
            allocator.update_and_allocate(model, number)
        elif number == 14:
            _, pattern = allocator.update_and_allocate(model, number, force_mask=True)
        else:
            allocator.mask_using_rank_pattern(model, pattern)
        gradients.append([given[name].tolist() for name in names])
        values.append([v for name in names if "lora_E" in name for v in parameters[name].flatten().tolist()])
    numbers = dict(start=[start[name].tolist() for name in names], gradients=gradients, values=values)
    with open(writing.HERE / "adalora_budget.json", "w", encoding="utf-8") as file:
        json.dump(numbers, file)
        file.write("\n")


if __name__ == "__main__":
    writing.main(CASES, write)
    budget()
