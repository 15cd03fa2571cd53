"""Writes what PEFT takes out of the weights of a small model for starts that do so: for each case `golden/starts/NAME.safetensors`
with the change `s B A` of some sites, whose signs and lengths of factors do not matter; of MiCA, which takes nothing out, `B Bᵀ`. Pins in benches/peers/requirements.txt.

Usage: starts.py [case ...]
"""

import peft

import writing
from writing import HERE, ref

# name: what PEFT calls it. The base is `llama`, the rank 4 and alpha 8.
CASES = {"pissa": "pissa", "olora": "olora", "mica": "mica"}
SITES = ["model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj", "model.layers.1.mlp.up_proj"]


def write(name):
    whole = ref.load(ref.MODELS / "llama")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=CASES[name], task_type="CAUSAL_LM")
    model = peft.get_peft_model(ref.load(ref.MODELS / "llama"), config)
    taken = {}
    for site in SITES:
        if name == "mica":
            b = model.base_model.model.get_submodule(site).lora_B["default"].weight
            taken[site] = (b @ b.T).detach()
            continue
        left = model.base_model.model.get_submodule(site).base_layer.weight
        taken[site] = whole.get_submodule(site).weight - left
        own = model.base_model.model.get_submodule(site).get_delta_weight("default")
        assert (taken[site] - own).abs().max() < 1e-6
    (HERE / "starts").mkdir(exist_ok=True)
    ref.save(taken, HERE / "starts" / f"{name}.safetensors")
    print(f"{name}: takes out up to {max(t.abs().max().item() for t in taken.values()):.2f}")


if __name__ == "__main__":
    writing.main(CASES, write)
