"""Writes the golden files of PEFT's tuners whose change is no low-rank sum at linears alone, by PEFT. See README.md for names and shapes;
pins in benches/peers/requirements.txt.

Usage: wider.py [case ...]
"""

import json
import sys
import types

import peft
import peft.tuners.adamss.layer as adamss
import torch
from peft.tuners.lora.config import BdLoraConfig
from peft.tuners.poly.router import PolyRouter
from safetensors.torch import load_file

import writing
from writing import ref

STD = 0.2
# Shares of skills answer weakly to their logits.
LOGITS = 2.0

# Linears that lead out of an attention or an MLP, and the others.
OUT = ["o_proj", "down_proj", "c_proj", "w2"]
IN = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "c_attn", "c_fc", "w1", "w3"]


def blocks(of_a, of_b, count):
    return BdLoraConfig(target_modules_bd_a=of_a, target_modules_bd_b=of_b, nblocks=count)


# name: (base, configuration, merged site; None where nothing merges)
CASES = {
    # The head of the first has a weight of its own; those of the others have the table.
    "llama_tokens": ("llama", lambda: peft.TrainableTokensConfig(token_indices=[40, 7, 12, 33]), "model.embed_tokens"),
    "qwen2_tokens": ("qwen2", lambda: peft.TrainableTokensConfig(token_indices=[9, 50, 21]), "model.embed_tokens"),
    "gpt2_tokens": ("gpt2", lambda: peft.TrainableTokensConfig(token_indices=[11, 3, 29, 30]), "transformer.wte"),
    "qwen2_lora_bias": (
        "qwen2",
        lambda: peft.LoraConfig(r=3, lora_alpha=6, lora_bias=True, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 2}),
        "model.layers.1.self_attn.v_proj",
    ),
    "gpt2_lora_bias": (
        "gpt2",
        lambda: peft.LoraConfig(r=2, lora_alpha=5, lora_bias=True, target_modules=["c_attn"], fan_in_fan_out=True),
        "transformer.h.0.attn.c_attn",
    ),
    "llama_glora": ("llama", lambda: peft.GloraConfig(r=3, target_modules=["q_proj", "down_proj"]), "model.layers.1.mlp.down_proj"),
    "qwen2_glora": ("qwen2", lambda: peft.GloraConfig(r=2, target_modules=["k_proj", "up_proj"]), "model.layers.0.self_attn.k_proj"),
    "qwen2_glora_forms": (
        "qwen2",
        lambda: peft.GloraConfig(config_A_B="vector", config_C="vector", config_D_E="vector", target_modules=["q_proj", "v_proj"]),
        "model.layers.1.self_attn.q_proj",
    ),
    "llama_adamss": (
        "llama",
        lambda: peft.AdamssConfig(r=6, num_subspaces=3, subspace_rank=2, target_modules=["q_proj", "down_proj"]),
        "model.layers.1.mlp.down_proj",
    ),
    "qwen2_adamss": (
        "qwen2",
        lambda: peft.AdamssConfig(r=9, num_subspaces=4, subspace_rank=1, target_modules=["k_proj", "up_proj"]),
        "model.layers.0.self_attn.k_proj",
    ),
    "qwen2_adamss_one": (
        "qwen2",
        lambda: peft.AdamssConfig(r=5, num_subspaces=1, subspace_rank=3, target_modules=["q_proj", "gate_proj"]),
        "model.layers.1.self_attn.q_proj",
    ),
    "llama_poly": ("llama", lambda: peft.PolyConfig(r=3, n_skills=3, target_modules=["q_proj", "down_proj"]), None),
    "qwen2_poly": ("qwen2", lambda: peft.PolyConfig(r=2, n_tasks=3, n_skills=2, n_splits=4, target_modules=["k_proj", "up_proj"]), None),
    "llama_frod": ("llama", lambda: peft.FrodConfig(sparse_rate=0.05, progressbar=False, target_modules=["q_proj", "down_proj"]), "model.layers.1.mlp.down_proj"),
    "gpt2_frod": (
        "gpt2",
        lambda: peft.FrodConfig(sparse_rate=0.1, regularization_alpha=0.01, progressbar=False, target_modules=["c_attn"], fan_in_fan_out=True),
        "transformer.h.0.attn.c_attn",
    ),
    "llama_bdlora": (
        "llama",
        lambda: peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", use_bdlora=blocks(OUT, IN, 2)),
        "model.layers.0.mlp.down_proj",
    ),
    "qwen2_bdlora": (
        "qwen2",
        lambda: peft.LoraConfig(
            r=8, lora_alpha=6, use_rslora=True, target_modules=["q_proj", "down_proj"], rank_pattern={"down_proj": 4}, use_bdlora=blocks(IN, OUT, 4)
        ),
        "model.layers.1.self_attn.q_proj",
    ),
}

# Cases in our own layout, where PEFT leaves out what its numbers depend on.
OURS = {
    "llama_adamss": {"method": "adamss", "rank": 6, "subspaces": 3, "subspace_rank": 2},
    "qwen2_adamss": {"method": "adamss", "rank": 9, "subspaces": 4, "subspace_rank": 1},
}


def subspaces(tensors, groups, method):
    """The tensors of all subspaces of a module in one: rows of A one subspace after the other, those of B in the order of outputs. A subspace of fewer outputs
    than its rank has less directions; others of it are 0."""
    made = {}
    for path, of in groups.items():
        j, count = method["subspace_rank"], len(of)
        outputs = sum(len(rows) for rows in of.values())
        a, b = [], torch.zeros(outputs, j)
        for k, rows in of.items():
            own_a, own_b = tensors[f"{path}.adamss_A.{k}"], tensors[f"{path}.adamss_B.{k}"]
            a.append(torch.cat([own_a, torch.zeros(j - own_a.shape[0], own_a.shape[1])]))
            b[rows, : own_b.shape[1]] = own_b
        assert count == method["subspaces"]
        made |= {f"{path}.adamss_A": torch.cat(a), f"{path}.adamss_B": b}
    return made


def own_subspaces(name, base, method):
    """Turns a case into our own layout, with the subspace of each output."""
    folder = writing.HERE / name
    model = peft.PeftModel.from_pretrained(ref.load(ref.MODELS / base), folder / "adapter")
    modules = [(path, module) for path, module in model.named_modules() if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer)]
    groups = {path: module.seg_result["default"] for path, module in modules}
    stored = load_file(folder / "adapter" / "adapter_model.safetensors")
    adapter = subspaces(stored, groups, method)
    for path, of in groups.items():
        number = torch.zeros(sum(len(rows) for rows in of.values()))
        for k, rows in of.items():
            number[rows] = float(k)
        adapter |= {f"{path}.adamss_groups": number, f"{path}.adamss_newB": stored[f"{path}.adamss_newB"]}
    ref.save(adapter, folder / "adapter" / "adapter_model.safetensors")
    ref.save(subspaces(load_file(folder / "gradients.safetensors"), groups, method), folder / "gradients.safetensors")
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    kept = {key: config[key] for key in ("base_model_name_or_path", "inference_mode", "target_modules")}
    ref.save_json(kept | {"attune": method, "peft_type": "ATTUNE_ADAMSS"}, folder / "adapter" / "adapter_config.json")


def own_basis(name, base, method):
    """Turns a case into our own layout, with what PEFT computes of the base's weights whenever it reads an adapter."""
    folder = writing.HERE / name
    model = peft.PeftModel.from_pretrained(ref.load(ref.MODELS / base), folder / "adapter")
    stored = load_file(folder / "adapter" / "adapter_model.safetensors")
    adapter = {k: v for k, v in stored.items() if k.startswith("base_model.model.")}
    for path, module in model.named_modules():
        if not isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
            continue
        v = module.frod_V["default"]
        weight = module.base_layer.weight.T if module.fan_in_fan_out else module.base_layer.weight
        u, start = module._calculate_frod_u_and_lambda(v, weight)
        torch.testing.assert_close(u, module.frod_U["default"])
        kind = ".".join(part for part in path.split(".") if not part.isdigit())
        adapter |= {f"{path}.frod_U": u.contiguous(), f"{path}.frod_start": start}
        adapter |= {f"{kind}.frod_V": v.contiguous(), f"{kind}.frod_s_indices": module.frod_s_indices["default"].float()}
    ref.save(adapter, folder / "adapter" / "adapter_model.safetensors")
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    kept = {key: config[key] for key in ("base_model_name_or_path", "inference_mode", "target_modules")}
    ref.save_json(kept | {"attune": method, "peft_type": "ATTUNE_FROD"}, folder / "adapter" / "adapter_config.json")


BASES = {"llama_frod": {"method": "frod", "density": 0.05}, "gpt2_frod": {"method": "frod", "density": 0.1, "regularization": 0.01}}


def grouped_by_number():
    """Outputs are grouped by their numbers: which of them are together is in the files, and how that is found is not what these compare. It saves
    scikit-learn, which PEFT wants to be there."""
    sys.modules.setdefault("sklearn", types.ModuleType("sklearn"))

    def groups(rows, count, _):
        # One of the groups is a single output, which has no more than one direction.
        number = torch.arange(rows.shape[0]) * 7 % max(count - 1, 1)
        number[3] = count - 1
        return number, count

    adamss.clustering_Z = groups


def of_first_task():
    """Documents are of the first task, unless something else is said."""
    forward = PolyRouter.forward
    PolyRouter.forward = lambda self, task_ids, input_ids: forward(self, torch.tensor([0]) if task_ids is None else task_ids, input_ids)


def randomise(model, g):
    """Moves what trains from its start."""
    for name, p in sorted((name, p) for name, p in model.named_parameters() if p.requires_grad):
        p.add_(torch.randn(p.shape, generator=g) * (LOGITS if "module_logits" in name else STD))


def write(name):
    base, config, site = CASES[name]
    config = config()
    config.task_type = "CAUSAL_LM"
    # The order in which the cases came, so that a new one changes no other's numbers.
    seed = 800 + list(CASES).index(name)
    # What PEFT starts at random.
    torch.manual_seed(seed)
    writing.write(name, base, config, site, seed, randomise)
    if name in OURS:
        own_subspaces(name, base, OURS[name])
    if name in BASES:
        own_basis(name, base, BASES[name])


if __name__ == "__main__":
    grouped_by_number()
    of_first_task()
    writing.main(CASES, write)
