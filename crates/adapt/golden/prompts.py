"""Writes the golden files of rows before documents by PEFT. See README.md for names and shapes; pins in benches/peers/requirements.txt.

Usage: prompts.py [case ...]
"""

import shutil
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[2] / "benches" / "peers"))

import peft  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from transformers import AutoModel  # noqa: E402

import reference as ref  # noqa: E402

ROWS = 20
shared = lambda **how: peft.MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_tasks=1, **how)
prompt = lambda **how: peft.PromptTuningConfig(task_type="CAUSAL_LM", **how)
made = lambda **how: peft.PromptEncoderConfig(task_type="CAUSAL_LM", **how)
# name: (base, configuration, seed).
CASES = {
    "llama_prompt": ("llama", prompt(num_virtual_tokens=5), 401),
    "gpt2_prompt": ("gpt2", prompt(num_virtual_tokens=3, prompt_tuning_init="SAMPLE_VOCAB"), 402),
    "llama_multitask": ("llama", shared(num_virtual_tokens=4, num_ranks=1, prompt_tuning_init="SAMPLE_VOCAB"), 406),
    "gpt2_multitask": ("gpt2", shared(num_virtual_tokens=3, num_ranks=2, prompt_tuning_init="SAMPLE_VOCAB"), 407),
    "llama_p_tuning": ("llama", made(num_virtual_tokens=4, encoder_hidden_size=12), 403),
    "gpt2_p_tuning_lstm": ("gpt2", made(num_virtual_tokens=3, encoder_reparameterization_type="LSTM", encoder_hidden_size=8), 404),
}

# name: (base, rows before, rows of the document, seed).
ENCODERS = {"bert_prompt": ("bert", 4, 12, 405)}


def write(name):
    base, config, seed = CASES[name]
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    torch.manual_seed(seed)
    model = peft.get_peft_model(ref.load(ref.MODELS / base), config)
    encoder = model.prompt_encoder["default"]
    with torch.no_grad():
        for weight in encoder.parameters():
            weight.add_(torch.randn(weight.shape, generator=ref.generator(seed)) * 0.3)
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(folder / "adapter")
    (folder / "adapter" / "README.md").unlink()

    model.eval()
    document = ref.document(ROWS, model.config.vocab_size, seed)
    # Logits of the rows before the document are among them; no label is.
    # The one task of those that are shared by several.
    task = {"task_ids": torch.zeros(1, dtype=torch.long)} if isinstance(config, peft.MultitaskPromptTuningConfig) else {}
    logits = model(input_ids=document.ids[None], **task).logits[0]
    own = logits[-ROWS:]
    loss_sum = F.cross_entropy(own, document.labels, ignore_index=ref.IGNORED, reduction="sum")
    count = (document.labels != ref.IGNORED).sum()
    loss = loss_sum / count
    made_of = dict(encoder.named_parameters())
    rows = model.get_prompt(1, **task)[0]
    gradients = torch.autograd.grad(loss, list(made_of.values()))
    base_logits = ref.logits_of(ref.load(ref.MODELS / base), document.ids)
    expected = {"logits": logits, "base_logits": base_logits, "loss": loss.reshape(1)}
    ref.save(expected | ref.inputs([document]), folder / "expected.safetensors")
    loaded = peft.PeftModel.from_pretrained(ref.load(ref.MODELS / base), folder / "adapter").eval()
    assert torch.equal(loaded(input_ids=document.ids[None], **task).logits[0], logits), "what was saved is something else"
    if len(made_of) == 1 or task:
        own_name = lambda name: "prompt_embeddings" if name == "embedding.weight" else name
        ref.save({own_name(name): gradient for name, gradient in zip(made_of, gradients)}, folder / "gradients.safetensors")
    else:
        ref.save({name: weight for name, weight in made_of.items()}, folder / "encoder.safetensors")
        ref.save(dict(zip(made_of, gradients)), folder / "encoder_gradients.safetensors")
    off = (own - base_logits).abs().max().item()
    least = min(gradient.abs().max() for gradient in gradients)
    print(f"{name}: {tuple(rows.shape)}, moves the logits by {off:.2f}, gradients of at least {least:.1e}")
    assert off > 0.1 and least > 1e-5


def write_encoder(name):
    """Rows before the documents of an encoder: all rows after the last block, the mean of a document's, and the gradient of
    `sum(dy * mean)`."""
    base, length, rows, seed = ENCODERS[name]
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    load = lambda: AutoModel.from_pretrained(ref.MODELS / base, attn_implementation="eager", dtype=torch.float32).eval()
    model = peft.get_peft_model(load(), peft.PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=length)).eval()
    weight = model.prompt_encoder["default"].embedding.weight
    generator = ref.generator(seed)
    with torch.no_grad():
        weight.copy_(torch.randn(weight.shape, generator=generator) * 0.5)
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(folder / "adapter")
    (folder / "adapter" / "README.md").unlink()
    document = ref.document(rows, model.config.vocab_size, seed)
    hidden = model(input_ids=document.ids[None]).last_hidden_state[0]
    mean = hidden.mean(0, keepdim=True)
    dy = torch.randn(mean.shape, generator=generator)
    (gradient,) = torch.autograd.grad((mean * dy).sum(), [weight])
    plain = load()(input_ids=document.ids[None]).last_hidden_state[0]
    ref.save({"hidden": hidden, "mean": mean, "dy": dy} | ref.inputs([document]), folder / "expected.safetensors")
    ref.save({"prompt_embeddings": gradient}, folder / "gradients.safetensors")
    off = (hidden[-rows:] - plain).abs().max().item()
    print(f"{name}: moves hidden rows by {off:.2f}, gradient up to {gradient.abs().max():.1e}")
    assert off > 0.1 and gradient.abs().max() > 1e-4


def main():
    ref.deterministic()
    for name in sys.argv[1:] or CASES | ENCODERS:
        (write if name in CASES else write_encoder)(name)


if __name__ == "__main__":
    main()
