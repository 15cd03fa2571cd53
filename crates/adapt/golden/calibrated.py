"""Writes what PEFT starts the factors of a small model with, for starts that look at data: for each case `golden/calibrated/NAME.safetensors`
with `SITE.lora_A` and `SITE.lora_B` of some sites, and the documents. Pins in benches/peers/requirements.txt.

PEFT's own directions of `eva` come from a decomposition of low rank that is off in the third digit on models as small as this one: here
its incremental analysis uses the full decomposition, which it has as well.

Usage: calibrated.py [case ...]
"""

import peft
import torch
import torch.nn.functional as F
from peft.tuners.lora import eva
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from transformers.pytorch_utils import Conv1D

import writing
from writing import HERE, ref

SITES = {
    "llama": ["model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj", "model.layers.1.mlp.up_proj"],
    "gpt2": ["transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_fc", "transformer.h.1.mlp.c_proj"],
}
# name: what PEFT calls it, with its configuration. The rank is 4 and alpha 8; the base is `llama`, or `gpt2` where the name begins so.
CASES = {
    "gpt2_corda_kpm": ("corda", {"corda_config": peft.tuners.lora.config.CordaConfig(corda_method="kpm")}),
    "gpt2_eva": ("eva", {"eva_config": peft.EvaConfig(rho=1.0, use_label_mask=True)}),
    "gpt2_lora_ga": ("lora_ga", {"lora_ga_config": peft.tuners.lora.config.LoraGAConfig(direction="A2rBr", scale="unit")}),
    "eva": ("eva", {"eva_config": peft.EvaConfig(rho=1.0, use_label_mask=False)}),
    "eva_supervised": ("eva", {"eva_config": peft.EvaConfig(rho=1.0, use_label_mask=True)}),
    "eva_whiten": ("eva", {"eva_config": peft.EvaConfig(rho=1.0, use_label_mask=True, whiten=True)}),
    # Linears that read the same rows have equal shares, between which PEFT decides by their order: one of each.
    "eva_rho": ("eva", {"eva_config": peft.EvaConfig(rho=2.0, use_label_mask=False), "target_modules": ["q_proj", "o_proj", "up_proj", "down_proj"]}),
    "corda_ipm": ("corda", {"corda_config": peft.tuners.lora.config.CordaConfig(corda_method="ipm")}),
    "corda_kpm": ("corda", {"corda_config": peft.tuners.lora.config.CordaConfig(corda_method="kpm")}),
    "lora_ga": ("lora_ga", {"lora_ga_config": peft.tuners.lora.config.LoraGAConfig()}),
    "lora_ga_gd": ("lora_ga", {"lora_ga_config": peft.tuners.lora.config.LoraGAConfig(direction="ArBr", scale="gd_scale")}),
}


class Full(eva.IncrementalPCA):
    def __init__(self, **options):
        super().__init__(**(options | {"lowrank": False}))


eva.IncrementalPCA = Full


def write(name):
    # For the directions of PEFT's randomised decompositions.
    torch.manual_seed(1)
    how, options = CASES[name]
    folder = "gpt2" if name.startswith("gpt2") else "llama"
    base = ref.load(ref.MODELS / folder)
    # PEFT takes gradients of a model in training; what is measured here drops nothing.
    for module in base.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    documents = [ref.document(length, base.config.vocab_size, seed) for seed, length in enumerate([14, 9, 20, 11, 17])]
    options = options | {"fan_in_fan_out": folder == "gpt2"}
    options = {"target_modules": "all-linear"} | options
    config = peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights=how, task_type="CAUSAL_LM", **options)
    if how == "eva":
        model = peft.get_peft_model(base, config, low_cpu_mem_usage=False)
        length = max(len(d.ids) for d in documents)
        pad = lambda rows, with_: torch.stack([F.pad(r, (0, length - len(r)), value=with_) for r in rows])  # noqa: E731
        # A label stands at the row that has to predict it, here as there: the mask is all that is made of it.
        batch = {
            "input_ids": pad([d.ids for d in documents], 0),
            "attention_mask": pad([torch.ones_like(d.ids) for d in documents], 0),
            "labels": pad([d.labels for d in documents], ref.IGNORED),
        }
        peft.initialize_lora_eva_weights(model, [batch, batch], show_progress_bar=False)
    else:
        config.target_modules = sorted(n for n, m in base.named_modules() if isinstance(m, (torch.nn.Linear, Conv1D)) and n != "lm_head")
        if how == "corda":
            preprocess_corda(base, config, run_model=lambda: [ref.logits_of(base, d.ids) for d in documents])
        else:
            count = sum(int((d.labels != ref.IGNORED).sum()) for d in documents)

            def step():
                for d in documents:
                    logits = base(input_ids=d.ids[None], use_cache=False).logits[0]
                    loss = F.cross_entropy(logits, d.labels, ignore_index=ref.IGNORED, reduction="sum")
                    # It divides by the number of backward passes.
                    (loss / count * len(documents)).backward()

            preprocess_loraga(base, config, step)
        model = peft.get_peft_model(base, config)
    tensors = ref.inputs(documents)
    # Whitened directions that several linears share are made shorter once for each of them: one that shares its inputs with nobody.
    sites = SITES[folder][1:2] if name == "eva_whiten" else SITES[folder]
    if name == "eva_rho":
        sites = [n for n, m in model.base_model.model.named_modules() if hasattr(m, "lora_A") and "default" in m.lora_A]
    for site in sites:
        of = model.base_model.model.get_submodule(site)
        tensors[f"{site}.lora_A"] = of.lora_A["default"].weight
        tensors[f"{site}.lora_B"] = of.lora_B["default"].weight
    (HERE / "calibrated").mkdir(exist_ok=True)
    ref.save(tensors, HERE / "calibrated" / f"{name}.safetensors")
    print(f"{name}: A up to {max(tensors[f'{s}.lora_A'].abs().max().item() for s in sites):.3f}, B up to {max(tensors[f'{s}.lora_B'].abs().max().item() for s in sites):.3g}")


if __name__ == "__main__":
    writing.main(CASES, write)
