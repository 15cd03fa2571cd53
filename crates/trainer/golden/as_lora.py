"""Writes the golden files of adapters that PEFT made plain LoRA (`convert_to_lora`). See README.md for what is in them; pins in
benches/peers/requirements.txt.

Usage: as_lora.py
"""

import json
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[2] / "benches" / "peers"))

import peft  # noqa: E402

import reference as ref  # noqa: E402

ADAPTERS = HERE.parents[1] / "adapt" / "golden"

# The adapters are those of crates/adapt/golden; name: (adapter, base, rank or share of the squares)
CASES = {
    "loha_rank": ("qwen2_loha", "qwen2", 4),
    "loha_share": ("qwen2_loha", "qwen2", 0.8),
    "lokr_rank": ("llama_lokr", "llama", 5),
    "bone_bat_rank": ("qwen2_bone_bat", "qwen2", 3),
    "gralora_share": ("llama_gralora", "llama", 0.7),
    "delora_rank": ("llama_delora", "llama", 2),
    "vera_share": ("gpt2_vera", "gpt2", 0.9),
}


def write(name):
    adapter, base, keep = CASES[name]
    model = peft.PeftModel.from_pretrained(ref.load(ref.MODELS / base), ADAPTERS / adapter / "adapter").eval()
    config, tensors = peft.convert_to_lora(model, keep, progressbar=False)
    folder = HERE / "as_lora" / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config.base_model_name_or_path = base
    config.inference_mode = True
    config.task_type = "CAUSAL_LM"
    config.save_pretrained(folder)
    tensors = {k if k.startswith("base_model.") else f"base_model.model.{k}": v.contiguous() for k, v in tensors.items()}
    ref.save(tensors, folder / "adapter_model.safetensors")
    how = {"adapter": adapter, "base": base, "rank" if isinstance(keep, int) else "share": keep}
    (folder / "how.json").write_text(json.dumps(how, indent=2) + "\n")
    print(f"{name}: {len(tensors)} tensors, ranks {sorted({v.shape[0] for k, v in tensors.items() if 'lora_A' in k})}")


if __name__ == "__main__":
    for name in CASES:
        write(name)
