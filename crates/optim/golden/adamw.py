"""Writes the golden files of AdamW, clipping and schedules. See README.md for names; pins in benches/peers/requirements.txt."""

import shutil
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[2] / "benches" / "peers"))
sys.path.insert(0, str(HERE.parents[1] / "adapt" / "golden"))

import peft  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import get_constant_schedule_with_warmup, get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup  # noqa: E402

import reference as ref  # noqa: E402
from lora import randomise, save_adapter  # noqa: E402

STEPS = 20
KEPT = (1, 5, 20)
CASES = {
    "constant": dict(schedule="constant", warmup_steps=4, lr=0.02, betas=[0.9, 0.999], eps=1e-8, weight_decay=0.0, max_grad_norm=1.0),
    "linear": dict(schedule="linear", warmup_steps=3, lr=0.03, betas=[0.9, 0.95], eps=1e-8, weight_decay=0.1, max_grad_norm=1.0),
    "cosine": dict(schedule="cosine", warmup_steps=5, lr=0.03, betas=[0.9, 0.999], eps=1e-6, weight_decay=0.3, max_grad_norm=0.5),
    "cosine_no_clip": dict(schedule="cosine", warmup_steps=0, lr=0.01, betas=[0.8, 0.99], eps=1e-8, weight_decay=0.1, max_grad_norm=None),
}
LORA = dict(schedule="cosine", warmup_steps=3, lr=0.02, betas=[0.9, 0.999], eps=1e-8, weight_decay=0.05, max_grad_norm=1.0)


def optimiser_and_schedule(parameters, h):
    optimiser = torch.optim.AdamW(parameters, lr=h["lr"], betas=tuple(h["betas"]), eps=h["eps"], weight_decay=h["weight_decay"], foreach=False)
    schedule = {
        "constant": lambda: get_constant_schedule_with_warmup(optimiser, h["warmup_steps"]),
        "linear": lambda: get_linear_schedule_with_warmup(optimiser, h["warmup_steps"], STEPS),
        "cosine": lambda: get_cosine_schedule_with_warmup(optimiser, h["warmup_steps"], STEPS),
    }[h["schedule"]]()
    return optimiser, schedule


def update(parameters, optimiser, schedule, h):
    """One optimiser step on the gradients in place; returns the learning rate used and the norm before clipping."""
    limit = float("inf") if h["max_grad_norm"] is None else h["max_grad_norm"]
    norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
    lr = schedule.get_last_lr()[0]
    optimiser.step()
    schedule.step()
    optimiser.zero_grad()
    return lr, norm.item()


def gradients(shape, phase):
    """[STEPS, *shape]: sines with a size that grows from 0.02 to 0.8 and back, so that some steps clip and some do not."""
    n = torch.Size(shape).numel()
    k = torch.arange(STEPS, dtype=torch.float64)[:, None]
    i = torch.arange(n, dtype=torch.float64)[None]
    size = 0.02 + 0.78 * torch.sin(torch.pi * k / (STEPS - 1)) ** 2
    return (size * torch.sin(0.7 * i + 0.37 * k * (1 + i % 3) + phase)).float().reshape(STEPS, *shape)


def write_adamw(name):
    h = CASES[name]
    g = ref.generator(list(CASES).index(name))
    weight = torch.nn.Parameter(torch.randn(6, 5, generator=g))
    bias = torch.nn.Parameter(torch.randn(7, generator=g))
    named = {"weight": weight, "bias": bias}
    out = {f"initial.{k}": p.detach().clone() for k, p in named.items()}
    out |= {f"grads.{k}": gradients(p.shape, phase) for phase, (k, p) in enumerate(named.items())}
    optimiser, schedule = optimiser_and_schedule([weight, bias], h)
    lrs, norms = [], []
    for step in range(STEPS):
        for k, p in named.items():
            p.grad = out[f"grads.{k}"][step].clone()
        lr, norm = update([weight, bias], optimiser, schedule, h)
        lrs.append(lr)
        norms.append(norm)
        if step + 1 in KEPT:
            out |= {f"after_{step + 1}.{k}": p.detach().clone() for k, p in named.items()}
    out |= {"lr": torch.tensor(lrs), "grad_norm": torch.tensor(norms)}
    clipped = 0 if h["max_grad_norm"] is None else sum(n > h["max_grad_norm"] for n in norms)
    moved = (out["after_20.weight"] - out["initial.weight"]).abs().max().item()
    print(f"{name}: {clipped} of {STEPS} steps clipped, parameters moved by up to {moved:.3f}")
    assert h["max_grad_norm"] is None or 4 <= clipped <= 16
    ref.save(out, HERE / f"adamw_{name}.safetensors")
    ref.save_json(h | {"steps": STEPS}, HERE / f"adamw_{name}.json")


def write_lora_steps():
    folder = HERE / "lora_steps"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    config = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, bias="none", task_type="CAUSAL_LM", target_modules="all-linear")
    model = peft.get_peft_model(ref.load(ref.MODELS / "llama"), config)
    randomise(model, 300)
    with torch.no_grad():
        for name, p in model.named_parameters():
            # As a run begins: B = 0.
            if "lora_B" in name:
                p.zero_()
    save_adapter(model, "llama", folder / "before")
    documents = [ref.document(n, model.config.vocab_size, 310 + i) for i, n in enumerate((17, 9, 24))]
    count = sum(int((d.labels != ref.IGNORED).sum()) for d in documents)

    def loss():
        """Document by document: sum over supervised rows / their count in the whole batch."""
        sums = [F.cross_entropy(model(input_ids=d.ids[None], use_cache=False).logits[0], d.labels, ignore_index=ref.IGNORED, reduction="sum") for d in documents]
        return torch.stack(sums).sum() / count

    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser, schedule = optimiser_and_schedule(parameters, LORA)
    losses, norms, lrs = [], [], []
    for _ in range(STEPS):
        value = loss()
        value.backward()
        lr, norm = update(parameters, optimiser, schedule, LORA)
        losses.append(value.item())
        norms.append(norm)
        lrs.append(lr)
    with torch.no_grad():
        after = loss().item()
    save_adapter(model, "llama", folder / "after")
    out = ref.inputs(documents) | {"loss": torch.tensor(losses), "grad_norm": torch.tensor(norms), "lr": torch.tensor(lrs), "loss_after": torch.tensor([after])}
    ref.save(out, folder / "expected.safetensors")
    ref.save_json(LORA | {"steps": STEPS, "base": "llama", "r": 4, "alpha": 8, "targets": "all-linear"}, folder / "hyper.json")
    before = load_file(folder / "before" / "adapter_model.safetensors")
    moved = {k: (v - before[k]).abs().max().item() for k, v in load_file(folder / "after" / "adapter_model.safetensors").items()}
    print(f"lora_steps: loss {losses[0]:.3f} -> {after:.3f}, every tensor moved by at least {min(moved.values()):.3f}, norms {min(norms):.2f} to {max(norms):.2f}")
    assert after < 0.9 * losses[0] and min(moved.values()) > 0.02


def main():
    ref.deterministic()
    for name in CASES:
        write_adamw(name)
    write_lora_steps()


if __name__ == "__main__":
    main()
