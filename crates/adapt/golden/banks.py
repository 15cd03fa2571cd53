"""Writes the golden files of adapters of few numbers within what is fixed: singular vectors, banks of vectors, wavelets, by PEFT. See README.md for
names and shapes; pins in benches/peers/requirements.txt.

Usage: banks.py [case ...]
"""

import json

import peft
import torch
from safetensors.torch import load_file

import writing
from writing import ref

STD = 0.2


def own(name, base, method, extra, spelt):
    """Turns a case into our own layout, where PEFT leaves out tensors that its numbers are about: `method` in our words, `extra(module, path)` what to
    add for each adapted module, `spelt` our names of PEFT's tensors."""
    folder = writing.HERE / name
    model = peft.PeftModel.from_pretrained(ref.load(ref.MODELS / base), folder / "adapter")
    renamed = lambda tensors: {next((k.replace(old, new) for old, new in spelt if k.endswith(old)), k): v for k, v in tensors.items()}
    added = {}
    for path, module in model.named_modules():
        if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
            added |= {f"{path}.{local}": tensor.contiguous() for local, tensor in extra(module).items()}
    stored = renamed(load_file(folder / "adapter" / "adapter_model.safetensors"))
    ref.save(stored | added, folder / "adapter" / "adapter_model.safetensors")
    ref.save(renamed(load_file(folder / "gradients.safetensors")), folder / "gradients.safetensors")
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    kept = {key: config[key] for key in ("base_model_name_or_path", "inference_mode", "target_modules")}
    # A name that PEFT has is not ours.
    theirs = method["method"].upper() in list(peft.PeftType)
    kept |= {"attune": method, "peft_type": ("ATTUNE_" if theirs else "") + method["method"].upper()}
    ref.save_json(kept, folder / "adapter" / "adapter_config.json")


def psoft(module):
    # PEFT divides B by the scaling that it multiplies the change with.
    return {"psoft_A": module._psoft_A_cache["default"], "psoft_B": module._psoft_B_cache["default"] * module.scaling["default"]}


PSOFT = [("psoft_R.weight", "psoft_R"), ("psoft_R.vector_a", "psoft_alpha"), ("psoft_R.vector_b", "psoft_beta")]

# name: (base, configuration, merged site, seed, what makes it ours)
CASES = {
    "llama_psoft": (
        "llama",
        lambda: peft.PsoftConfig(r=6, psoft_alpha=3, target_modules=["q_proj", "down_proj"]),
        "model.layers.1.mlp.down_proj",
        501,
        ({"method": "psoft", "rank": 6}, psoft, PSOFT),
    ),
    "qwen2_psoft": (
        "qwen2",
        lambda: peft.PsoftConfig(
            r=5, psoft_mag_a=False, use_cayley_neumann=True, num_cayley_neumann_terms=4, cayley_neumann_eps=0.6, ab_svd_init="pissa_init", target_modules=["k_proj", "up_proj"]
        ),
        "model.layers.0.self_attn.k_proj",
        502,
        ({"method": "psoft", "rank": 5, "scale_in": False, "terms": 4, "bound": 0.6, "split": "balanced"}, psoft, PSOFT),
    ),
    "llama_vblora": (
        "llama",
        lambda: peft.VBLoRAConfig(r=2, num_vectors=9, vector_length=8, topk=3, init_vector_bank_bound=0.3, target_modules=["q_proj", "down_proj"]),
        "model.layers.0.mlp.down_proj",
        503,
        None,
    ),
    "gpt2_vblora": (
        "gpt2",
        lambda: peft.VBLoRAConfig(r=3, num_vectors=6, vector_length=4, init_vector_bank_bound=0.3, target_modules=["c_attn"], fan_in_fan_out=True),
        "transformer.h.1.attn.c_attn",
        504,
        None,
    ),
    "llama_waveft": (
        "llama",
        lambda: peft.WaveFTConfig(n_frequency=40, scaling=3.0, n_frequency_pattern={"q_proj": 60}, target_modules=["q_proj", "down_proj"]),
        "model.layers.0.self_attn.q_proj",
        505,
        None,
    ),
    "gpt2_waveft": (
        "gpt2",
        lambda: peft.WaveFTConfig(n_frequency=50, scaling=2.0, wavelet_family="db3", random_loc_seed=5, target_modules=["c_attn"], fan_in_fan_out=True),
        "transformer.h.1.attn.c_attn",
        506,
        None,
    ),
    "qwen2_waveft": (
        "qwen2",
        lambda: peft.WaveFTConfig(n_frequency=30, scaling=2.0, use_idwt=False, target_modules=["k_proj", "up_proj"]),
        "model.layers.1.mlp.up_proj",
        507,
        None,
    ),
    "llama_kasa": (
        "llama",
        lambda: peft.LoraConfig(r=3, lora_alpha=6, kasa_config=peft.KasaConfig(), target_modules=["q_proj", "down_proj"]),
        "model.layers.1.mlp.down_proj",
        508,
        None,
    ),
    "qwen2_kasa": (
        "qwen2",
        lambda: peft.LoraConfig(r=4, lora_alpha=2, kasa_config=peft.KasaConfig(), target_modules=["k_proj", "gate_proj"]),
        "model.layers.0.mlp.gate_proj",
        509,
        None,
    ),
    "llama_tinylora": (
        "llama",
        lambda: peft.TinyLoraConfig(r=3, u=5, weight_tying=0.3, target_modules=["q_proj", "down_proj", "up_proj"]),
        "model.layers.1.mlp.up_proj",
        510,
        None,
    ),
    "gpt2_tinylora": (
        "gpt2",
        lambda: peft.TinyLoraConfig(r=2, u=7, weight_tying=1.0, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True),
        "transformer.h.1.attn.c_attn",
        511,
        None,
    ),
}


def randomise(model, g):
    """Moves what trains from its start: with a factor at 0 neither another's gradient nor a wrong scale would show."""
    for _, p in sorted((name, p) for name, p in model.named_parameters() if p.requires_grad):
        p.add_(torch.randn(p.shape, generator=g) * STD)


def write(name):
    base, config, site, seed, ours = CASES[name]
    config = config()
    config.task_type = "CAUSAL_LM"
    # What PEFT starts at random.
    torch.manual_seed(seed)
    writing.write(name, base, config, site, seed, randomise)
    if ours:
        own(name, base, *ours)


if __name__ == "__main__":
    writing.main(CASES, write)
