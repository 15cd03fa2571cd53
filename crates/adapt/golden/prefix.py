"""Writes the golden files of prefix tuning by PEFT. See README.md for names and shapes; pins in benches/peers/requirements.txt.

Usage: prefix.py [case ...]
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

STD = 0.5
ROWS = 20
# name: (base, number of keys, width of the perceptron that makes them, seed). The base of llama's kind has fewer key heads than query heads.
CASES = {"llama_prefix": ("llama", 5, 0, 301), "gpt2_prefix": ("gpt2", 3, 0, 302), "llama_prefix_made": ("llama", 4, 7, 303)}


def write(name):
    base, length, hidden, seed = CASES[name]
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    how = {"prefix_projection": True, "encoder_hidden_size": hidden} if hidden else {}
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=length, **how)
    model = peft.get_peft_model(ref.load(ref.MODELS / base), config)
    made_of = dict(model.prompt_encoder["default"].named_parameters())
    generator = ref.generator(seed)
    with torch.no_grad():
        for weight in made_of.values():
            weight.copy_(torch.randn(weight.shape, generator=generator) * STD)
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(folder / "adapter")
    (folder / "adapter" / "README.md").unlink()

    model.eval()
    document = ref.document(ROWS, model.config.vocab_size, seed)
    logits = model(input_ids=document.ids[None]).logits[0]
    loss_sum = F.cross_entropy(logits, document.labels, ignore_index=ref.IGNORED, reduction="sum")
    count = (document.labels != ref.IGNORED).sum()
    (loss_sum / count).backward()
    expected = {"logits": logits, "base_logits": ref.logits_of(ref.load(ref.MODELS / base), document.ids), "loss": (loss_sum / count).reshape(1)}
    ref.save(expected | ref.inputs([document]), folder / "expected.safetensors")
    loaded = peft.PeftModel.from_pretrained(ref.load(ref.MODELS / base), folder / "adapter").eval()
    assert torch.equal(loaded(input_ids=document.ids[None]).logits[0], logits), "what was saved is something else"
    gradients = {name: weight.grad for name, weight in made_of.items()}
    gradient = gradients["embedding.weight"]
    if hidden:
        ref.save(made_of, folder / "encoder.safetensors")
        ref.save(gradients, folder / "encoder_gradients.safetensors")
    else:
        ref.save({"prompt_embeddings": gradient}, folder / "gradients.safetensors")
    off = (expected["logits"] - expected["base_logits"]).abs().max().item()
    print(f"{name}: {tuple(gradient.shape)}, moves the logits by {off:.2f}, gradient up to {gradient.abs().max():.1e}")
    assert off > 0.1 and gradient.abs().max() > 1e-4


def main():
    ref.deterministic()
    for name in sys.argv[1:] or CASES:
        write(name)


if __name__ == "__main__":
    main()
