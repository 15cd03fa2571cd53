"""One process of PyTorch + transformers + PEFT: some optimiser steps on one batch, measured. Prints one JSON line.

Usage: step_torch.py CASE.json [--variant NAME]
       step_torch.py --floor     the memory of a process that has imported all of it and does nothing
       step_torch.py --peak      the fastest matrix products that PyTorch reaches here, GFLOP/s

CASE has `base`, `model` (transformers' class that reads it), `adapter` (null: all weights train), `batch`, `precision`, `matmul`, `lr`, `warmup`, `steps`. Variants are the ways to
train in a precision; `compare.py` takes the fastest.
"""

import argparse
import json
import os
import statistics
import sys
import time
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.filterwarnings("ignore")

import peft  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from shapes import VARIANTS  # noqa: E402

def resident_mib(field="VmHWM"):
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith(field)) / 1024


def forget_peak():
    """The peak so far becomes the present size: loading may hold a file and its copy at once."""
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")


def model_of(case, variant):
    base_type, adapter_type, autocast = VARIANTS[case["precision"]][variant]
    model = getattr(transformers, case["model"]).from_pretrained(case["base"], dtype=getattr(torch, base_type), attn_implementation="sdpa")
    model.config.use_cache = False
    if case["adapter"]:
        model = peft.PeftModel.from_pretrained(model, case["adapter"], is_trainable=True, autocast_adapter_dtype=False)
        for name, value in model.named_parameters():
            if "lora_" in name:
                value.data = value.data.to(getattr(torch, adapter_type))
    model.train()
    return model, autocast


def rest(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def run(case, variant):
    imported_mib = resident_mib()
    torch.set_float32_matmul_precision(case["matmul"])
    model, autocast = model_of(case, variant)
    with open(case["batch"]) as f:
        batch = json.load(f)
    ids = torch.tensor(batch["documents"])
    given = {"labels": torch.tensor(batch["classes"])} if "classes" in batch else {"labels": ids, "use_cache": False}
    device = torch.device("cpu" if case.get("device") is None else f"cuda:{case['device']}")
    model, ids, given = model.to(device), ids.to(device), {k: v.to(device) if torch.is_tensor(v) else v for k, v in given.items()}
    trained = [value for value in model.parameters() if value.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=case["lr"], weight_decay=0.0)
    loaded_mib, whole_peak = resident_mib("VmRSS"), resident_mib()
    forget_peak()
    seconds, losses = [], []
    for _ in range(case["warmup"] + case["steps"]):
        started, cpu = time.perf_counter(), time.process_time()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
            loss = model(input_ids=ids, **given).loss
        rest(device)
        forward = time.perf_counter()
        loss.backward()
        rest(device)
        backward = time.perf_counter()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        losses.append(loss.item())
        rest(device)
        done = time.perf_counter()
        seconds.append({"step": done - started, "forward": forward - started, "backward": backward - forward, "optimiser": done - backward, "cpu": time.process_time() - cpu})
        if len(losses) == 1:
            first_step_unix = time.time()
    on_device = torch.cuda.max_memory_reserved() / 2**20 if device.type == "cuda" else None
    timed = seconds[case["warmup"] :]
    steps_peak = resident_mib()
    return {
        "variant": variant,
        "tokens": ids.numel(),
        "step_seconds": [round(s["step"], 5) for s in timed],
        "cpu_seconds_per_step": round(statistics.mean(s["cpu"] for s in timed), 4),
        "breakdown_ms": {k: round(1000 * statistics.mean(s[k] for s in timed), 2) for k in ("forward", "backward", "optimiser")},
        "loss_first": losses[0],
        "loss_last": losses[-1],
        "trained": sum(value.numel() for value in trained),
        "imported_mib": round(imported_mib, 1),
        "loaded_mib": round(loaded_mib, 1),
        "peak_steps_mib": round(steps_peak, 1),
        "peak_mib": round(max(whole_peak, steps_peak), 1),
        "device_mib": on_device,
        "first_step_unix": first_step_unix,
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__},
    }


def peak(seconds=0.6):
    """The best of a few large products."""
    best = {}
    for name, dtype in (("f32", torch.float32), ("bf16", torch.bfloat16)):
        for n in (1024, 2048):
            a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
            begun = time.perf_counter()
            while time.perf_counter() - begun < seconds:
                started = time.perf_counter()
                a @ b
                speed = 2 * n**3 / (time.perf_counter() - started) / 1e9
                best[name] = max(best.get(name, 0.0), round(speed, 1))
    return {"torch_gemm_gflops": best}


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("case", nargs="?")
    p.add_argument("--variant", default="weights")
    p.add_argument("--floor", action="store_true")
    p.add_argument("--peak", action="store_true")
    a = p.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if a.floor:
        print(json.dumps({"imported_mib": round(resident_mib(), 1)}))
    elif a.peak:
        print(json.dumps(peak()))
    elif a.case:
        with open(a.case) as f:
            print(json.dumps(run(json.load(f), a.variant)))
    else:
        sys.exit("a case file is missing")


if __name__ == "__main__":
    main()
