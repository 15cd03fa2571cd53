"""Writes the golden files of encoders, of classifiers and of embeddings. See README.md for names and shapes; pins in
benches/peers/requirements.txt.

Usage: encoders.py [case ...]
"""

import json
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[2] / "benches" / "peers"))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from transformers import BertConfig, BertForSequenceClassification, BertForTokenClassification, BertModel  # noqa: E402
from transformers import LlamaConfig, LlamaForSequenceClassification, LlamaModel  # noqa: E402

import reference as ref  # noqa: E402
from decoders import COMMON, randomise, seed_of  # noqa: E402

LENGTHS = (11, 7, 11)
BERT = dict(vocab_size=40, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40,
            max_position_embeddings=20, type_vocab_size=2, layer_norm_eps=1e-3)
LLAMA = COMMON | dict(hidden_size=24, vocab_size=40)

# name: (class, configuration)
CASES = {
    "bert": (BertModel, BertConfig(**BERT)),
    "bert_sequence": (BertForSequenceClassification, BertConfig(**BERT, num_labels=3)),
    "bert_tokens": (BertForTokenClassification, BertConfig(**BERT, num_labels=5, hidden_act="gelu_new")),
    "llama_sequence": (LlamaForSequenceClassification, LlamaConfig(**LLAMA, num_labels=3)),
    "llama_bidirectional": (LlamaModel, LlamaConfig(**LLAMA)),
}


def forward(model, ids, types):
    """One document; a decoder that sees everything gets a mask of zeros, which is added as it stands."""
    how = dict(input_ids=ids[None], output_hidden_states=True)
    if model.config.model_type == "bert":
        return model(**how, token_type_ids=types[None])
    if isinstance(model, LlamaModel):
        return model(**how, attention_mask=torch.zeros(1, 1, len(ids), len(ids)), use_cache=False)
    return model(**how, use_cache=False)


def write(name):
    kind, config = CASES[name]
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    config._attn_implementation = "eager"
    model = kind(config).eval()
    randomise(model, seed_of(name), 0.3)
    model.save_pretrained(folder)
    model = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    g = ref.generator(seed_of(name) + 1)
    rows, sums, count = {}, [], 0
    # Without the padding token, whose row PyTorch gives no gradient; a pack holds none.
    documents = [(torch.randint(1, config.vocab_size, (n,), generator=g), (torch.arange(n) > n // 2).long()) for n in LENGTHS]
    for ids, types in documents:
        out = forward(model, ids, types)
        # The last of a decoder's list has gone through the final norm.
        hidden = out.hidden_states if config.model_type == "bert" else out.hidden_states[:-1]
        for i, h in enumerate(hidden):
            rows.setdefault(f"hidden.{i}", []).append(h[0].detach())
        labels = torch.full_like(ids, ref.IGNORED)
        if "logits" in out:
            logits = out.logits[0]
            if logits.dim() == 1:
                row = 0 if config.model_type == "bert" else -1
                labels[row] = torch.randint(0, config.num_labels, (1,), generator=g)[0]
                sums.append(F.cross_entropy(logits[None], labels[row][None], reduction="sum"))
                rows.setdefault("logits", []).append(logits[None].detach())
            else:
                labels = torch.randint(0, config.num_labels, (len(ids),), generator=g)
                labels[0] = ref.IGNORED
                sums.append(F.cross_entropy(logits, labels, ignore_index=ref.IGNORED, reduction="sum"))
                rows.setdefault("logits", []).append(logits.detach())
            count += int((labels != ref.IGNORED).sum())
        else:
            last = out.last_hidden_state[0]
            pooled = {"mean": last.mean(0), "first": last[0], "last": last[-1]}
            dy = torch.randn(last.shape[-1], generator=g)
            sums.append((pooled["mean"] * dy).sum())
            count = 1
            for how, y in (pooled | {"dy": dy}).items():
                rows.setdefault(f"pooled.{how}" if how != "dy" else how, []).append(y.detach()[None])
        rows.setdefault("labels", []).append(labels)
    loss = torch.stack(sums).sum() / count
    loss.backward()
    expected = {k: torch.cat(v) for k, v in rows.items()}
    expected |= {
        "input_ids": torch.cat([ids for ids, _ in documents]),
        "token_types": torch.cat([types for _, types in documents]),
        "doc_lengths": torch.tensor(LENGTHS),
        "loss": loss.detach().reshape(1),
    }
    ref.save(expected, folder / "expected.safetensors")
    # BertModel has a pooler, which no pooling of rows reads.
    gradients = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    ref.save(gradients, folder / "gradients.safetensors")
    spread = expected[f"hidden.{config.num_hidden_layers if config.model_type == 'bert' else 1}"].std()
    print(f"{name}: loss {loss:.3f}, hidden rows spread {spread:.2f}, {len(gradients)} gradients")
    for f in folder.iterdir():
        ref.check_size(f)
    written = json.loads((folder / "config.json").read_text())
    assert written["architectures"] == [kind.__name__]


def main():
    ref.deterministic()
    for name in sys.argv[1:] or CASES:
        write(name)


if __name__ == "__main__":
    main()
