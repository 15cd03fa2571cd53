"""Writes the golden files of what stands before documents and starts as a text: cartridges and context-aware prompts, by PEFT. See README.md for
names and shapes; pins in benches/peers/requirements.txt.

Usage: contexts.py [case ...]
"""

import shutil
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[2] / "benches" / "peers"))

import peft  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from peft.tuners.cartridge.utils import initialize_kv_prefix_from_past_key_values  # noqa: E402

from safetensors.torch import load_file  # noqa: E402

import reference as ref  # noqa: E402

ROWS = 20
STD = 0.3
RATE = 5.0
# name: (base, keys, sinks among them, tokens of the text, seed). The base of llama's kind has fewer key heads than query heads.
CARTRIDGES = {"llama_cartridge": ("llama", 5, 1, 9, 501), "gpt2_cartridge": ("gpt2", 4, 2, 4, 502), "qwen2_cartridge": ("qwen2", 3, 0, 6, 503)}
# name: (base, what each token is of, bounds of inputs and of what stands around them, seed)
PROMPTS = {"llama_context": ("llama", [1, 2, 2, 3, 4, 5, 6, 7, 8], 6.0, 3.0, 504), "gpt2_context": ("gpt2", [1, 1, 2, 4], 2.0, 9.0, 505)}


def tokens_of(count, vocab, seed):
    """Random tokens; the special ones stay out."""
    return torch.randint(3, vocab, (count,), generator=ref.generator(seed))


def save_adapter(model, base, folder):
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(folder)
    (folder / "README.md").unlink()


def answers(model, base, document, length):
    """What a model answers on a document, with the loss."""
    logits = model(input_ids=document.ids[None]).logits[0]
    own = logits[-ROWS:]
    count = (document.labels != ref.IGNORED).sum()
    loss = F.cross_entropy(own, document.labels, ignore_index=ref.IGNORED, reduction="sum") / count
    base_logits = ref.logits_of(ref.load(ref.MODELS / base), document.ids)
    off = (own - base_logits).abs().max().item()
    assert off > 0.1
    return loss, off, {"logits": logits, "base_logits": base_logits, "loss": loss.reshape(1)} | ref.inputs([document])


def write_cartridge(name):
    base, length, sinks, tokens, seed = CARTRIDGES[name]
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    config = peft.CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=length, num_frozen_tokens=sinks)
    model = peft.get_peft_model(ref.load(ref.MODELS / base), config)
    text = tokens_of(tokens, model.config.vocab_size, seed + 50)
    with torch.no_grad():
        kept = ref.load(ref.MODELS / base)(input_ids=text[None], use_cache=True).past_key_values
    start = initialize_kv_prefix_from_past_key_values(model, past_key_values=kept)
    ref.save({"text": text, "prompt_embeddings": start}, folder / "start.safetensors")
    encoder = model.prompt_encoder["default"]
    with torch.no_grad():
        trained = encoder.trainable_embedding
        trained.add_(torch.randn(trained.shape, generator=ref.generator(seed)) * STD)
    save_adapter(model, base, folder / "adapter")

    model.eval()
    document = ref.document(ROWS, model.config.vocab_size, seed)
    loss, off, expected = answers(model, base, document, length)
    (gradient,) = torch.autograd.grad(loss, [encoder.trainable_embedding])
    ref.save(expected, folder / "expected.safetensors")
    ref.save({"prompt_embeddings": torch.cat([torch.zeros(sinks, gradient.shape[1]), gradient])}, folder / "gradients.safetensors")
    loaded = peft.PeftModel.from_pretrained(ref.load(ref.MODELS / base), folder / "adapter").eval()
    assert torch.equal(loaded(input_ids=document.ids[None]).logits[0], expected["logits"]), "what was saved is something else"
    print(f"{name}: {tuple(gradient.shape)}, moves the logits by {off:.2f}, gradient up to {gradient.abs().max():.1e}")
    assert gradient.abs().max() > 1e-4


def write_prompt(name):
    base, types, bound, format_bound, seed = PROMPTS[name]
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    fresh = ref.load(ref.MODELS / base)
    ids = tokens_of(len(types), fresh.config.vocab_size, seed + 50).tolist()
    config = peft.CPTConfig(
        task_type="CAUSAL_LM",
        cpt_token_ids=ids,
        cpt_mask=[1] * len(ids),
        cpt_tokens_type_mask=types,
        opt_weighted_loss_type="decay",
        opt_loss_decay_factor=0.75,
        opt_projection_epsilon=bound,
        opt_projection_format_epsilon=format_bound,
    )
    model = peft.get_peft_model(fresh, config)
    delta = model.prompt_encoder["default"].delta_embedding.weight
    # Some of them within their bounds.
    free = torch.randn(delta.shape, generator=ref.generator(seed)) * torch.linspace(0.03, STD, len(ids))[:, None]
    with torch.no_grad():
        delta.copy_(free)
    model.eval()
    document = ref.document(ROWS, model.config.vocab_size, seed)
    # The first pass projects what moved too far.
    loss, off, expected = answers(model, base, document, len(ids))
    loss.backward()
    ref.save(expected, folder / "expected.safetensors")
    ref.save({"free": free, "delta": delta}, folder / "delta.safetensors")
    ref.save({"delta": delta.grad}, folder / "gradients.safetensors")
    save_adapter(model, base, folder / "adapter")
    write_step(model, document, delta, folder)
    delta.data.copy_(load_file(folder / "delta.safetensors")["delta"])
    loaded = peft.PeftModel.from_pretrained(ref.load(ref.MODELS / base), folder / "adapter").eval()
    torch.testing.assert_close(loaded(input_ids=document.ids[None]).logits[0], expected["logits"])
    shorter = (delta.norm(dim=1) < 0.99 * free.norm(dim=1)).sum().item()
    print(f"{name}: {tuple(delta.shape)}, {shorter} rows projected, moves the logits by {off:.2f}, gradient up to {delta.grad.abs().max():.1e}")
    assert 0 < shorter < len(ids) and delta.grad.abs().max() > 1e-4


def write_step(model, document, delta, folder):
    """A step down the slope of PEFT's own loss, that of the demonstrations' labels in it, and what its bounds leave of it."""
    labels = torch.full_like(document.labels, ref.IGNORED)
    # Its labels stand where they are, those of ours at the row before.
    labels[1:] = document.labels[:-1]
    delta.grad = None
    loss = model(input_ids=document.ids[None], labels=labels[None]).loss
    loss.backward()
    with torch.no_grad():
        delta.sub_(delta.grad * RATE)
        stepped = model.prompt_encoder["default"].get_projection()
    ref.save({"loss": loss.reshape(1), "rate": torch.tensor([RATE]), "delta": stepped}, folder / "step.safetensors")


def main():
    ref.deterministic()
    for name in sys.argv[1:] or CARTRIDGES | PROMPTS:
        (write_cartridge if name in CARTRIDGES else write_prompt)(name)


if __name__ == "__main__":
    main()
