"""Writes the golden files of combined adapters by PEFT's `add_weighted_adapter`. See README.md for what is in them; pins in
benches/peers/requirements.txt.

Usage: combined.py
"""

import json
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[2] / "benches" / "peers"))

import peft  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

import reference as ref  # noqa: E402

STD = 0.2

ADAPTERS = {
    "a": dict(r=4, lora_alpha=8, target_modules=["embed_tokens", "q_proj", "down_proj"], rank_pattern={"embed_tokens": 4}),
    "b": dict(r=4, lora_alpha=6, target_modules=["embed_tokens", "q_proj", "down_proj"], alpha_pattern={"q_proj": 3}),
    # Another rank, another scaling, and fewer sites than the others.
    "c": dict(r=3, lora_alpha=5, target_modules=["q_proj", "o_proj"], use_rslora=True),
}
TWO = (["a", "b"], [0.7, -0.5])
THREE = (["a", "b", "c"], [0.7, -0.5, 1.2])

# name: (adapters and weights, how)
CASES = {
    "linear": (TWO, dict(combination_type="linear")),
    "ties": (TWO, dict(combination_type="ties", density=0.6)),
    "ties_frequency": (TWO, dict(combination_type="ties", density=0.8, majority_sign_method="frequency")),
    "dare_linear": (TWO, dict(combination_type="dare_linear", density=0.7)),
    "dare_ties": (TWO, dict(combination_type="dare_ties", density=0.7)),
    "magnitude_prune": (TWO, dict(combination_type="magnitude_prune", density=0.3)),
    "cat": (THREE, dict(combination_type="cat")),
    "svd": (THREE, dict(combination_type="svd")),
    "svd_clamp": (THREE, dict(combination_type="svd", svd_rank=2, svd_clamp=0.9)),
    "ties_svd": (THREE, dict(combination_type="ties_svd", density=0.5)),
    "dare_linear_svd": (THREE, dict(combination_type="dare_linear_svd", density=0.6, svd_rank=5)),
    "dare_ties_svd": (THREE, dict(combination_type="dare_ties_svd", density=0.6)),
    "magnitude_prune_svd": (THREE, dict(combination_type="magnitude_prune_svd", density=0.4)),
}

svd, bernoulli = torch.linalg.svd, torch.bernoulli


def signed_svd(w, full_matrices=True, driver=None):
    """A pair of singular vectors has no sign of its own; here the largest entry of each left one is positive."""
    u, s, vh = svd(w, full_matrices=False)
    signs = torch.sign(u.gather(0, u.abs().argmax(0, keepdim=True))).flatten()
    return u * signs, s, vh * signs[:, None]


def write(name):
    (names, weights), how = CASES[name]
    model = ref.load(ref.MODELS / "llama")
    for at, (adapter, settings) in enumerate(ADAPTERS.items()):
        config = peft.LoraConfig(lora_dropout=0.0, bias="none", task_type="CAUSAL_LM", **settings)
        if at == 0:
            model = peft.get_peft_model(model, config, adapter_name=adapter)
        else:
            model.add_adapter(adapter, config)
    g = ref.generator(7)
    with torch.no_grad():
        for key, p in sorted(model.named_parameters()):
            if "lora_" in key:
                p.copy_(torch.randn(p.shape, generator=g) * STD)
    torch.manual_seed(11)
    drawn = []

    def recorded(p):
        mask = bernoulli(p)
        drawn.append(mask)
        return mask

    torch.linalg.svd, torch.bernoulli = signed_svd, recorded
    model.add_weighted_adapter(names, weights, "made", **how)
    torch.linalg.svd, torch.bernoulli = svd, bernoulli
    for adapter in [*names, "made"]:
        save(model, adapter, HERE / (name if adapter == "made" else adapter))
    # In the order in which PEFT drew them: site by site as the model has them, A before B, adapter by adapter.
    if drawn:
        save_file({f"{at:03}": mask.to(torch.uint8) for at, mask in enumerate(drawn)}, HERE / name / "kept.safetensors")
    ref.save_json({"of": dict(zip(names, weights)), **how}, HERE / name / "how.json")
    print(f"{name}: {len(drawn)} masks")


def save(model, adapter, folder):
    shutil.rmtree(folder, ignore_errors=True)
    model.peft_config[adapter].base_model_name_or_path = "attune/llama"
    model.save_pretrained(HERE, selected_adapters=[adapter], save_embedding_layers=False)
    if not folder.exists():
        (HERE / adapter).rename(folder)
    (HERE / "README.md").exists() and restore_readme()
    config = json.loads((folder / "adapter_config.json").read_text())
    config["target_modules"].sort()
    ref.save_json(config, folder / "adapter_config.json")
    ref.check_size(folder / "adapter_model.safetensors")


def restore_readme():
    """PEFT writes a card where it saves; ours says what the folder is."""
    (HERE / "README.md").write_text(README)


if __name__ == "__main__":
    README = (HERE / "README.md").read_text()
    ref.deterministic()
    for case in CASES:
        write(case)
