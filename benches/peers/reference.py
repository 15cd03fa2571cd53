"""What the scripts that write golden files share: determinism, documents, and one way to run a reference model.

A document is always run alone, by a model made for it: a rotary embedding with dynamic scaling remembers the longest
sequence that it has seen, so a reused model would answer differently.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

IGNORED = -100
SIZE_LIMIT = 64 * 1024
ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "crates" / "models" / "golden"


def deterministic():
    """One thread, deterministic kernels, f32, quiet logs."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.set_default_dtype(torch.float32)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def generator(seed):
    return torch.Generator().manual_seed(seed)


@dataclass
class Document:
    """Token ids, and for each row the token that it has to predict (already shifted) or IGNORED."""

    ids: torch.Tensor
    labels: torch.Tensor


def document(length, vocab, seed):
    """Random tokens (3 and above: the special ones stay out); about two thirds of the rows are supervised, the first
    three and the last never."""
    g = generator(seed)
    ids = torch.randint(3, vocab, (length,), generator=g)
    supervised = torch.rand(length, generator=g) < 0.67
    supervised[:3] = False
    supervised[-1] = False
    labels = torch.full_like(ids, IGNORED)
    labels[:-1] = torch.where(supervised[:-1], ids[1:], IGNORED)
    assert (labels != IGNORED).sum() >= 3
    return Document(ids, labels)


def load(folder, attention="eager", **how):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention, experts_implementation="eager", **how).eval()


def logits_of(model, ids):
    with torch.no_grad():
        return model(input_ids=ids[None], use_cache=False).logits[0]


def run(fresh_model, documents):
    """Runs each document alone. Returns tensors of `expected.safetensors` and the gradients by parameter name.

    `fresh_model` makes a model; the loss is the sum over all supervised rows / their count over all documents.
    """
    count = sum(int((d.labels != IGNORED).sum()) for d in documents)
    rows = {"logits": [], "grad.inputs_embeds": []}
    sums, own, gradients = [], [], {}
    for d in documents:
        model = fresh_model()
        blocks, last, table = parts(model.get_base_model() if hasattr(model, "peft_config") else model)
        hidden = []
        hooks = [b.register_forward_pre_hook(lambda _, a, k: hidden.append(a[0] if a else k["hidden_states"]), with_kwargs=True) for b in blocks]
        hooks.append(last.register_forward_pre_hook(lambda _, a: hidden.append(a[0])))
        embeds = table(d.ids[None])
        embeds.retain_grad() if embeds.requires_grad else embeds.requires_grad_()
        logits = model(inputs_embeds=embeds, use_cache=False).logits[0]
        for h in hooks:
            h.remove()
        loss_sum = F.cross_entropy(logits, d.labels, ignore_index=IGNORED, reduction="sum")
        (loss_sum / count).backward()
        rows["logits"].append(logits.detach())
        rows["grad.inputs_embeds"].append(embeds.grad[0])
        for i, h in enumerate(hidden):
            rows.setdefault(f"hidden.{i}", []).append(h.detach()[0])
        sums.append(loss_sum.detach())
        own.append(loss_sum.detach() / (d.labels != IGNORED).sum())
        for name, p in model.named_parameters():
            if p.grad is not None:
                gradients[name] = gradients.get(name, 0) + p.grad
    expected = {k: torch.cat(v) for k, v in rows.items()}
    expected |= inputs(documents)
    expected["loss_sum"] = torch.stack(sums).sum().reshape(1)
    expected["label_count"] = torch.tensor([count])
    expected["loss"] = expected["loss_sum"] / count
    expected["doc_loss"] = torch.stack(own)
    return expected, gradients


def parts(model):
    """The blocks, the last norm and the table of tokens, whatever the model calls them."""
    if hasattr(model, "transformer"):
        return model.transformer.h, model.transformer.ln_f, model.transformer.wte
    return model.model.layers, model.model.norm, model.model.embed_tokens


def inputs(documents):
    return {
        "input_ids": torch.cat([d.ids for d in documents]),
        "labels": torch.cat([d.labels for d in documents]),
        "positions": torch.cat([torch.arange(len(d.ids)) for d in documents]),
        "doc_lengths": torch.tensor([len(d.ids) for d in documents]),
    }


def save(tensors, path):
    """Writes safetensors (f32 and i64 only) and holds the file to the size limit of golden files."""
    for name, t in tensors.items():
        assert t.dtype in (torch.float32, torch.int64), f"{path}: {name} is {t.dtype}"
    save_file({k: v.detach().contiguous().clone() for k, v in tensors.items()}, path)
    check_size(path)


def save_json(value, path):
    Path(path).write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def check_size(path):
    size = Path(path).stat().st_size
    assert size < SIZE_LIMIT, f"{path}: {size} bytes, golden files stay under {SIZE_LIMIT}"
