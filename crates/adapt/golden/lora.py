"""Writes the golden files of LoRA and DoRA by PEFT. See README.md for names and shapes; pins in benches/peers/requirements.txt.

Usage: lora.py [case ...]
"""

import json
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[2] / "benches" / "peers"))

import peft  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import reference as ref  # noqa: E402

# A and B both random: with B = 0 neither A's gradient nor a wrong scale would show.
STD = 0.2

# name: (base, settings beyond r = 4 and alpha = 8, merged site)
CASES = {
    "llama_some": ("llama", dict(target_modules=["q_proj", "v_proj"]), "model.layers.1.self_attn.v_proj"),
    "llama_all_linear": ("llama", dict(target_modules="all-linear"), "model.layers.0.mlp.down_proj"),
    "llama_patterns": (
        "llama",
        dict(
            target_modules=r".*layers\.1\.(self_attn\.[qo]_proj|mlp\.(up|down)_proj)",
            rank_pattern={"up_proj": 2, r".*\.q_proj": 6},
            alpha_pattern={"down_proj": 3, "up_proj": 5},
        ),
        "model.layers.1.mlp.up_proj",
    ),
    "qwen2_some_rslora": ("qwen2", dict(target_modules=["k_proj", "o_proj", "gate_proj"], use_rslora=True), "model.layers.0.self_attn.k_proj"),
    "gpt2_all_linear": ("gpt2", dict(target_modules="all-linear", fan_in_fan_out=True), "transformer.h.1.attn.c_attn"),
    "qwen2_all_linear": ("qwen2", dict(target_modules="all-linear"), "model.layers.1.self_attn.q_proj"),
    "qwen2_dora": (
        "qwen2",
        dict(target_modules="all-linear", use_dora=True, rank_pattern={"down_proj": 2}, alpha_pattern={"k_proj": 3}),
        "model.layers.1.mlp.down_proj",
    ),
    "gpt2_dora": ("gpt2", dict(target_modules="all-linear", use_dora=True, use_rslora=True, fan_in_fan_out=True), "transformer.h.0.attn.c_proj"),
}
# The order in which the cases came, so that a new one changes no other's numbers.
SEEDS = ["llama_some", "llama_all_linear", "llama_patterns", "qwen2_some_rslora", "qwen2_all_linear", "gpt2_all_linear", "qwen2_dora", "gpt2_dora"]
ROWS = 32


def randomise(model, seed):
    g = ref.generator(seed)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            if "lora_magnitude_vector" in name:
                p.mul_(1 + torch.randn(p.shape, generator=g) * STD)
            elif "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=g) * STD)


def save_adapter(model, base, folder):
    """PEFT's own writer; then what would differ from run to run or from machine to machine is made fixed."""
    shutil.rmtree(folder, ignore_errors=True)
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(folder)
    (folder / "README.md").unlink()
    config = json.loads((folder / "adapter_config.json").read_text())
    if isinstance(config["target_modules"], list):
        config["target_modules"].sort()
    ref.save_json(config, folder / "adapter_config.json")
    ref.check_size(folder / "adapter_model.safetensors")


def of_adapter(gradients):
    """Those of A, B and DoRA's magnitudes, by their names on disk."""
    on_disk = lambda k: k.replace("lora_magnitude_vector.default.weight", "lora_magnitude_vector").replace(".default.", ".")
    return {on_disk(k): v for k, v in gradients.items() if "lora_" in k}


def write(name):
    base, settings, site = CASES[name]
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    seed = 100 + SEEDS.index(name)
    config = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, bias="none", task_type="CAUSAL_LM", **settings)
    model = peft.get_peft_model(ref.load(ref.MODELS / base), config)
    randomise(model, seed)
    save_adapter(model, base, folder / "adapter")

    def fresh():
        loaded = peft.PeftModel.from_pretrained(ref.load(ref.MODELS / base), folder / "adapter", is_trainable=True)
        return loaded.eval()

    document = ref.document(ROWS, model.config.vocab_size, seed)
    expected, gradients = ref.run(fresh, [document])
    expected["base_logits"] = ref.logits_of(ref.load(ref.MODELS / base), document.ids)
    ref.save(expected, folder / "expected.safetensors")
    gradients = of_adapter(gradients)
    stored = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert {k: v.shape for k, v in stored.items()} == {k: v.shape for k, v in gradients.items()}
    assert min(v.abs().max() for v in gradients.values()) > 1e-4, "a site without gradient"
    ref.save(gradients, folder / "gradients.safetensors")

    if name == "llama_all_linear":
        documents = [ref.document(n, model.config.vocab_size, seed + 50 + i) for i, n in enumerate((11, 21))]
        packed, packed_gradients = ref.run(fresh, documents)
        ref.save(packed, folder / "packed.safetensors")
        ref.save(of_adapter(packed_gradients), folder / "packed_gradients.safetensors")

    merged = fresh().merge_and_unload()
    ref.save({f"{site}.weight": merged.get_submodule(site).weight}, folder / "merged.safetensors")
    off = (expected["logits"] - expected["base_logits"]).abs().max().item()
    merge = (ref.logits_of(merged, document.ids) - expected["logits"]).abs().max().item()
    print(f"{name}: {sum('lora_A' in k for k in stored)} sites, adapter moves the logits by {off:.2f}, merged the same within {merge:.1e}")
    assert off > 0.1 and merge < 2e-5


def main():
    ref.deterministic()
    for name in sys.argv[1:] or CASES:
        write(name)


if __name__ == "__main__":
    main()
