"""Attune and PyTorch + transformers + PEFT in turn on the same models, adapters and tokens: speed, memory, losses.

Usage: compare.py STEP_BINARY OUT [--cases NAME...] [--rounds N] [--evidence FILE.jsonl]

A round runs each side once, in a process of its own; who begins changes from round to round. A process makes some steps that
are not measured and then some that are; its speed is tokens / the median step. What is reported is the median of the rounds
and their range. Every process's line is kept in FILE.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from shapes import SHAPES, VARIANTS

HERE = Path(__file__).resolve().parent
LR = 1e-4
# How far the two sides' losses may be apart: different orders of summation, and in bf16 different roundings between kernels.
LOSS_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Case:
    shape: str
    trains: str
    precision: str
    warmup: int
    steps: int
    shards: int = 1
    recompute: bool = False
    # The number of an NVIDIA device; the processor without.
    device: int | None = None
    # How exactly both sides multiply in f32: PyTorch's words.
    matmul: str = "highest"

    @property
    def name(self):
        exactness = "" if self.matmul == "highest" else f"-{self.matmul}"
        return f"{self.shape}-{self.trains}-{self.precision}{exactness}" + ("" if self.device is None else "-cuda")


CASES = [
    Case("S", "lora", "f32", 2, 10),
    Case("S", "lora", "bf16", 2, 10),
    Case("S", "full", "f32", 2, 10),
    Case("E", "lora", "f32", 2, 10),
    Case("B", "lora", "f32", 1, 5),
    Case("M", "lora", "f32", 1, 3),
    Case("M", "lora", "bf16", 1, 3),
]
CASES += [replace(case, matmul="high") for case in CASES if case.precision == "f32"]
# The same on an NVIDIA device, where one is asked for; more steps, for they are short.
CASES_ON_DEVICE = [replace(case, warmup=5, steps=20, device=0) for case in CASES]
# Eight jobs on one base, side by side against in turn, by tokens of a job's step: Attune against itself.
LANES = {f"S-lanes-{precision}-{tokens}": (precision, tokens) for precision, tokens in (("f32", 256), ("bf16", 256), ("f32", 32))}


def environment():
    """Both sides get all processors; what could make either slower by accident is left out."""
    threads = str(len(os.sched_getaffinity(0)))
    wanted = {k: v for k, v in os.environ.items() if not k.startswith(("OPENBLAS_", "MKL_", "OMP_", "KMP_", "GOTO_", "NVPL_", "RAYON_"))}
    return wanted | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "RAYON_NUM_THREADS": threads}


def process(command, timeout=None):
    """Runs a command that prints one JSON line; adds the seconds from its start to the end of its first step. None if it is
    not done after `timeout` seconds."""
    begun = time.time()
    try:
        done = subprocess.run([str(c) for c in command], env=environment(), stdout=subprocess.PIPE, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return None
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))} failed with status {done.returncode}")
    line = json.loads(done.stdout.splitlines()[-1])
    if "first_step_unix" in line:
        line["first_step_seconds"] = round(line.pop("first_step_unix") - begun, 3)
    return line


class Comparison:
    def __init__(self, step, out, evidence):
        self.step, self.out, self.evidence = step, out, evidence
        self.written = []

    def keep(self, line):
        self.written.append(line)
        if self.evidence:
            with open(self.evidence, "a") as f:
                f.write(json.dumps(line) + "\n")

    def files(self, case, warmup=None, steps=None):
        """The case file for both sides; its model is made if it is missing."""
        made = self.out / f"{case.shape}-{case.precision}"
        if not (made / "batch.json").is_file():
            shutil.rmtree(made, ignore_errors=True)
            subprocess.run([sys.executable, HERE / "shapes.py", case.shape, case.precision, made], check=True, stderr=subprocess.DEVNULL)
        value = {
            "base": str(made / "base"),
            "model": SHAPES[case.shape].model,
            "adapter": str(made / "adapter") if case.trains == "lora" else None,
            "batch": str(made / "batch.json"),
            "precision": case.precision,
            "matmul": case.matmul,
            "lr": LR,
            "warmup": case.warmup if warmup is None else warmup,
            "steps": case.steps if steps is None else steps,
            "shards": case.shards,
            "recompute": case.recompute,
            "device": case.device,
        }
        path = self.out / f"{case.name}{'' if warmup is None else '-short'}.json"
        path.write_text(json.dumps(value))
        return path

    def attune(self, path):
        return process([self.step, path])

    def torch(self, path, variant="weights", timeout=None):
        return process([sys.executable, HERE / "step_torch.py", path, "--variant", variant], timeout)

    def best_variant(self, case):
        """The fastest way of PyTorch to train in this precision, by a short run of each."""
        if len(VARIANTS[case.precision]) == 1:
            return "weights"
        path, speeds, patience = self.files(case, warmup=1, steps=2), {}, None
        for variant in VARIANTS[case.precision]:
            begun = time.time()
            line = self.torch(path, variant, patience)
            self.keep({"case": case.name, "side": "torch", "choosing": True, "variant": variant, **(line or {"given_up_after_seconds": patience})})
            if line is None:
                say(f"  torch {variant}: given up after {patience:.0f} s")
                continue
            speeds[variant] = speed(line)
            # Without the processor's own bf16 products some ways are a hundred times slower than others.
            patience = min(patience or 1e9, 3 * (time.time() - begun))
            say(f"  torch {variant}: {speeds[variant]:.1f} tokens/s, {line['peak_mib']:.0f} MiB")
        return max(speeds, key=speeds.get)

    def run(self, case, rounds):
        say(f"== {case.name}")
        variant = self.best_variant(case)
        path = self.files(case)
        lines = {"attune": [], "torch": []}
        for number in range(rounds):
            order = ["attune", "torch"] if number % 2 == 0 else ["torch", "attune"]
            for side in order:
                line = self.attune(path) if side == "attune" else self.torch(path, variant)
                lines[side].append(line)
                self.keep({"case": case.name, "side": side, "round": number, **line})
                say(f"  {side}: {speed(line):.1f} tokens/s, {line['peak_mib']:.0f} MiB, loss {line['loss_first']:.5f} to {line['loss_last']:.5f}")
        return Result(case, lines["attune"], lines["torch"])


    def lanes(self, name, rounds):
        say(f"== {name}")
        precision, tokens = LANES[name]
        line = process([self.step, "lanes", precision, str(rounds), str(tokens)])
        self.keep(line)
        for each in line["rounds"]:
            say(f"  {each['in_turn']['tokens_per_second']:.1f} tokens/s in turn, {each['together']['tokens_per_second']:.1f} together")
        return line


def say(text):
    print(text, file=sys.stderr, flush=True)


def speed(line):
    return line["tokens"] / statistics.median(line["step_seconds"])


@dataclass
class Result:
    case: Case
    attune: list
    torch: list

    def losses_differ_by(self):
        return max(abs(a[k] - t[k]) for a in self.attune for t in self.torch for k in ("loss_first", "loss_last"))

    def row(self, gemm_peak, floor_mib):
        ours, theirs = [speed(line) for line in self.attune], [speed(line) for line in self.torch]
        ratios = [a / t for a, t in zip(ours, theirs)]
        memory, other = (statistics.median(line["peak_mib"] for line in lines) for lines in (self.attune, self.torch))
        gflops = statistics.median(line["model_gflop"] / statistics.median(line["step_seconds"]) for line in self.attune)
        cells = [
            self.case.name, spread(ours), f"{spread(theirs)} ({self.torch[0]['variant']})",
            f"**{statistics.median(ratios):.2f}** ({min(ratios):.2f}–{max(ratios):.2f})",
            f"{memory:.0f}", f"{other:.0f} (its import {floor_mib:.0f})", f"**{memory / other:.2f}**",
            # The peak is the processor's.
            "–" if self.case.device is not None else f"{100 * gflops / gemm_peak:.0f} %", f"{self.losses_differ_by():.1e}",
        ]
        return f"| {' | '.join(cells)} |"

    def breakdown(self):
        parts = {k: statistics.median(line["breakdown_ms"][k] for line in self.attune) for k in self.attune[0]["breakdown_ms"]}
        step = 1000 * statistics.median(statistics.median(line["step_seconds"]) for line in self.attune)
        return f"| {self.case.name} | {step:.0f} | {', '.join(f'{k} {v:.1f}' for k, v in parts.items())} |"


def spread(values):
    return f"{statistics.median(values):.1f} ({min(values):.1f}–{max(values):.1f})"


def lanes_row(line):
    each = line["rounds"]
    of = lambda side, what: [r[side][what] for r in each]  # noqa: E731
    memory = [statistics.median(of(side, "peak_mib")) for side in ("in_turn", "together")]
    cells = [
        line["case"], spread(of("in_turn", "tokens_per_second")), spread(of("together", "tokens_per_second")),
        *(f"**{statistics.median(r[what] for r in each):.2f}** ({min(r[what] for r in each):.2f}–{max(r[what] for r in each):.2f})"
          for what in ("ratio", "cpu_ratio")),
        ", ".join(f"{m:.0f}" for m in memory),
    ]
    return f"| {' | '.join(cells)} |"


def machine():
    with open("/proc/cpuinfo") as f:
        fields = dict(line.split(":", 1) for line in f.read().split("\n\n")[0].splitlines() if ":" in line)
    fields = {k.strip(): v.strip() for k, v in fields.items()}
    known = ["avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16"]
    return {
        "processor": f"{fields.get('model name', platform.processor())} family {fields.get('cpu family')} model {fields.get('model')}",
        "processors": len(os.sched_getaffinity(0)),
        "instructions": [k for k in known if k in fields.get("flags", "").split()],
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(),
        "load": os.getloadavg()[0],
    }


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("step", type=Path, help="the built example `step`")
    p.add_argument("out", type=Path, help="a folder for models and cases")
    p.add_argument("--cases", nargs="*", default=[], help="names or their beginnings; all without")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--evidence", type=Path, help="JSON lines are added to this file")
    p.add_argument("--cuda", action="store_true", help="on an NVIDIA device; `step` must be built with the feature `cuda`")
    a = p.parse_args()
    is_chosen = lambda known: not a.cases or any(known.startswith(name) for name in a.cases)  # noqa: E731
    cases, lanes = (CASES_ON_DEVICE, {}) if a.cuda else (CASES, LANES)
    chosen, lanes = [c for c in cases if is_chosen(c.name)], [name for name in lanes if is_chosen(name)]
    if not chosen and not lanes:
        sys.exit(f"no case begins with {a.cases}; there are {[c.name for c in CASES] + list(LANES)}")
    a.out.mkdir(parents=True, exist_ok=True)
    compare = Comparison(a.step.resolve(), a.out.resolve(), a.evidence)
    here = machine()
    say(json.dumps(here))
    peaks = process([compare.step, "peak"]) | process([sys.executable, HERE / "step_torch.py", "--peak"])
    floor = process([sys.executable, HERE / "step_torch.py", "--floor"])
    say(json.dumps(peaks | {"torch_import_mib": floor["imported_mib"]}))
    compare.keep({"machine": here, "peaks": peaks, "torch_import_mib": floor["imported_mib"]})
    gemm_peak = max(v for k, v in flat(peaks) if "gemm" in k and "f32" in k)
    results = [compare.run(case, a.rounds) for case in chosen]
    lanes = [compare.lanes(name, a.rounds) for name in lanes]

    print("| case | Attune, tokens/s | PyTorch, tokens/s | ratio | Attune, MiB | PyTorch, MiB | ratio | of the f32 GEMM peak | losses differ by |")
    print("|---|---|---|---|---|---|---|---|---|")
    for result in results:
        print(result.row(gemm_peak, floor["imported_mib"]))
    print("\n| case | step, ms | of these |\n|---|---|---|")
    for result in results:
        print(result.breakdown())
    print("\n| case | in turn, tokens/s | together, tokens/s | ratio | by processor time | MiB in turn, together |\n|---|---|---|---|---|---|")
    for line in lanes:
        print(lanes_row(line))
    off = [r.case.name for r in results if r.losses_differ_by() > LOSS_TOLERANCE]
    if off:
        sys.exit(f"losses differ by more than {LOSS_TOLERANCE}: {', '.join(off)}")


def flat(value, path=""):
    """Leaves of nested objects with the path to them."""
    if isinstance(value, dict):
        return [leaf for k, v in value.items() for leaf in flat(v, f"{path} {k}")]
    return [(path, value)]


if __name__ == "__main__":
    main()
