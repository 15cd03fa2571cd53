"""LoRA by PyTorch + PEFT on exactly the tokens that Attune consumed: the other side of the comparison of losses and speed.

Each line of STEPS is one optimiser step: `{"documents": [{"ids": [...], "labels_mask": [...]}, ...], "lr": 0.002}` or only the
list of documents. `labels_mask[i]` is 1 where token i is a target (predicted from the tokens before it); the first token never is.
`lr` is optional; given, it replaces the schedule. VALIDATION has the same form, its lines are evaluated together; a document's
optional `domain` names its own mean.

The documents of a step are padded on the right into one batch; the loss is the sum over supervised tokens / their count over the
whole step. Prints one JSON object.
"""

import argparse
import json
import os
import resource
import statistics
import sys
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import peft  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoModelForCausalLM, get_scheduler  # noqa: E402

IGNORED = -100
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def arguments():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("base", help="Hugging Face model folder")
    p.add_argument("steps", help="JSON lines, one optimiser step each")
    p.add_argument("validation", help="JSON lines of documents")
    p.add_argument("--initial-adapter", help="PEFT folder to begin with: its r, alpha, targets, A and B")
    p.add_argument("--r", type=int, default=16)
    p.add_argument("--alpha", type=float, default=32)
    p.add_argument("--targets", nargs="+", default=ALL_LINEAR)
    p.add_argument("--seed", type=int, default=0, help="of A, without --initial-adapter")
    p.add_argument("--lr", type=float, default=2e-3)
    p.add_argument("--schedule", choices=["constant", "linear", "cosine"], default="cosine")
    p.add_argument("--warmup-steps", type=int, default=0)
    p.add_argument("--betas", type=float, nargs=2, default=[0.9, 0.999])
    p.add_argument("--eps", type=float, default=1e-8)
    p.add_argument("--weight-decay", type=float, default=0.0)
    p.add_argument("--max-grad-norm", type=float, default=1.0, help="0 = no clipping")
    p.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    p.add_argument("--attention", choices=["sdpa", "eager"], default="sdpa")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--save", help="write the tuned adapter here")
    return p.parse_args()


def read(path):
    lines = []
    with open(path) as f:
        for number, line in enumerate(f, 1):
            value = json.loads(line)
            value = {"documents": value} if isinstance(value, list) else value
            for d in value["documents"]:
                if len(d["ids"]) != len(d["labels_mask"]) or not d["ids"]:
                    sys.exit(f"{path}:{number}: {len(d['ids'])} ids but a labels_mask of {len(d['labels_mask'])}")
            lines.append(value)
    return lines


def padded(documents):
    """ids, attention mask and shifted labels [documents, longest]."""
    longest = max(len(d["ids"]) for d in documents)
    ids = torch.zeros(len(documents), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORED)
    for i, d in enumerate(documents):
        n = len(d["ids"])
        ids[i, :n] = torch.tensor(d["ids"])
        mask[i, :n] = 1
        target = torch.where(torch.tensor(d["labels_mask"][1:], dtype=torch.bool), ids[i, 1:n], IGNORED)
        labels[i, : n - 1] = target
    return ids, mask, labels


def losses(model, documents):
    """-log p of each supervised token [supervised], and the document that it belongs to."""
    ids, mask, labels = padded(documents)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    wanted = labels != IGNORED
    return F.cross_entropy(logits[wanted].float(), labels[wanted], reduction="none"), wanted.nonzero()[:, 0]


def evaluate(model, lines, at_a_time=64):
    documents = [d for line in lines for d in line["documents"]]
    total, by_domain = [0.0, 0], {}
    model.eval()
    with torch.no_grad():
        for at in range(0, len(documents), at_a_time):
            chunk = documents[at : at + at_a_time]
            per_token, owner = losses(model, chunk)
            for value, i in zip(per_token.tolist(), owner.tolist()):
                for sums in (total, by_domain.setdefault(chunk[i].get("domain", "data"), [0.0, 0])):
                    sums[0] += value
                    sums[1] += 1
    model.train()
    return total[0] / total[1], {k: s / n for k, (s, n) in sorted(by_domain.items())}, total[1]


def with_adapter(base, a):
    if not a.initial_adapter:
        torch.manual_seed(a.seed)
        config = peft.LoraConfig(r=a.r, lora_alpha=a.alpha, lora_dropout=0.0, bias="none", target_modules=a.targets, task_type="CAUSAL_LM")
        return peft.get_peft_model(base, config)
    model = peft.PeftModel.from_pretrained(base, a.initial_adapter, is_trainable=True)
    stored = load_file(os.path.join(a.initial_adapter, "adapter_model.safetensors"))
    here = {k.replace(".default.", "."): v for k, v in model.state_dict().items() if "lora_" in k}
    if set(stored) != set(here) or any(not torch.equal(here[k].float(), v.float()) for k, v in stored.items()):
        sys.exit(f"{a.initial_adapter}: PEFT did not take all tensors: {sorted(set(stored) ^ set(here))[:4]}")
    return model


def peak_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main():
    a = arguments()
    torch.set_num_threads(a.threads)
    transformers.logging.set_verbosity_error()
    after_import = peak_mib()
    steps, validation = read(a.steps), read(a.validation)
    base = AutoModelForCausalLM.from_pretrained(a.base, dtype=getattr(torch, a.dtype), attn_implementation=a.attention)
    model = with_adapter(base, a)
    config = model.peft_config["default"]
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=a.lr, betas=tuple(a.betas), eps=a.eps, weight_decay=a.weight_decay)
    kind = "constant_with_warmup" if a.schedule == "constant" else a.schedule
    schedule = get_scheduler(kind, optimiser, a.warmup_steps, len(steps))

    before, before_by_domain, supervised_validation = evaluate(model, validation)
    print(f"validation before: {before:.4f}", file=sys.stderr)
    tokens = supervised = padding = 0
    seconds, train_losses = [], []
    for k, step in enumerate(steps):
        started = time.perf_counter()
        per_token, _ = losses(model, step["documents"])
        loss = per_token.sum() / per_token.numel()
        loss.backward()
        if a.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(parameters, a.max_grad_norm)
        if "lr" in step:
            for group in optimiser.param_groups:
                group["lr"] = step["lr"]
        optimiser.step()
        schedule.step()
        optimiser.zero_grad(set_to_none=True)
        train_losses.append(loss.item())
        seconds.append(time.perf_counter() - started)
        lengths = [len(d["ids"]) for d in step["documents"]]
        tokens += sum(lengths)
        padding += len(lengths) * max(lengths) - sum(lengths)
        supervised += per_token.numel()
        if (k + 1) % 20 == 0:
            print(f"step {k + 1}: loss {statistics.mean(train_losses[-20:]):.4f}, {tokens / sum(seconds):.0f} tokens/s", file=sys.stderr)
    after, after_by_domain, _ = evaluate(model, validation)
    if a.save:
        model.save_pretrained(a.save)
    print(json.dumps({
        "validation_loss_before": before,
        "validation_loss_after": after,
        "validation_by_domain_before": before_by_domain,
        "validation_by_domain_after": after_by_domain,
        "validation_supervised_tokens": supervised_validation,
        "train_loss": train_losses,
        "steps": len(steps),
        "tokens": tokens,
        "supervised_tokens": supervised,
        "padding_tokens": padding,
        "seconds": sum(seconds),
        "median_step_seconds": statistics.median(seconds),
        "tokens_per_second": tokens / sum(seconds),
        "peak_rss_mib": peak_mib(),
        "rss_after_import_mib": after_import,
        "trainable": sum(p.numel() for p in parameters),
        "r": config.r,
        "alpha": config.lora_alpha,
        "settings": vars(a),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__},
    }, indent=1))


if __name__ == "__main__":
    main()
