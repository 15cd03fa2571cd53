"""Writes the golden files of adaption prompts by PEFT. See README.md for names and shapes; pins in benches/peers/requirements.txt.

Usage: adaption.py [case ...]
"""

import shutil
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[2] / "benches" / "peers"))

import peft  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import reference as ref  # noqa: E402

ROWS = 20
# name: (base, rows, layers from the top, seed). Both bases have fewer key heads than query heads.
CASES = {"llama_adaption": ("llama", 4, 1, 501), "mistral_adaption": ("mistral", 3, 2, 502)}


def write(name):
    base, length, layers, seed = CASES[name]
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    config = peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=length, adapter_layers=layers)
    model = peft.get_peft_model(ref.load(ref.MODELS / base), config)
    trained = {k: p for k, p in model.named_parameters() if p.requires_grad}
    generator = ref.generator(seed)
    with torch.no_grad():
        for key, weight in trained.items():
            weight.copy_(torch.randn(weight.shape, generator=generator) + (1.5 if key.endswith("gate") else 0.0))
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(folder / "adapter")
    (folder / "adapter" / "README.md").unlink()

    model.eval()
    document = ref.document(ROWS, model.config.vocab_size, seed)
    logits = model(input_ids=document.ids[None]).logits[0]
    loss_sum = F.cross_entropy(logits, document.labels, ignore_index=ref.IGNORED, reduction="sum")
    loss = loss_sum / (document.labels != ref.IGNORED).sum()
    gradients = dict(zip(trained, torch.autograd.grad(loss, list(trained.values()))))
    expected = {"logits": logits, "base_logits": ref.logits_of(ref.load(ref.MODELS / base), document.ids), "loss": loss.reshape(1)}
    ref.save(expected | ref.inputs([document]), folder / "expected.safetensors")
    loaded = peft.PeftModel.from_pretrained(ref.load(ref.MODELS / base), folder / "adapter").eval()
    assert torch.equal(loaded(input_ids=document.ids[None]).logits[0], logits), "what was saved is something else"
    ref.save(gradients, folder / "gradients.safetensors")
    off = (expected["logits"] - expected["base_logits"]).abs().max().item()
    least = min(gradient.abs().max() for gradient in gradients.values())
    print(f"{name}: {sorted(trained)}, moves the logits by {off:.2f}, gradients of at least {least:.1e}")
    assert off > 0.1 and least > 1e-4


def main():
    ref.deterministic()
    for name in sys.argv[1:] or CASES:
        write(name)


if __name__ == "__main__":
    main()
