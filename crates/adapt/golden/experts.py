"""Writes the golden files of LoRA on parameters of all experts at once (`target_parameters`) by PEFT, to `experts/`. See README.md; pins in
benches/peers/requirements.txt.

Usage: experts.py
"""

import shutil

import peft
import torch

import writing
from writing import HERE, ref

CASES = {
    "qwen3_moe": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    "olmoe": ["experts.down_proj"],
}


def write(base):
    folder = HERE / "experts" / base
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], target_parameters=CASES[base], task_type="CAUSAL_LM")
    model = peft.get_peft_model(ref.load(ref.MODELS / base), config)
    g = ref.generator(3)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=g) * 0.2)
    writing.save_adapter(model, base, folder / "adapter")
    document = ref.document(16, model.config.vocab_size, 3)
    fresh = peft.PeftModel.from_pretrained(ref.load(ref.MODELS / base), folder / "adapter").eval()
    logits = ref.logits_of(fresh, document.ids)
    off = (logits - ref.logits_of(ref.load(ref.MODELS / base), document.ids)).abs().max().item()
    assert off > 0.1
    ref.save({"input_ids": document.ids, "logits": logits}, folder / "expected.safetensors")
    print(f"{base}: the adapter moves the logits by {off:.2f}")


if __name__ == "__main__":
    ref.deterministic()
    for case in CASES:
        write(case)
