"""Does transformers read the models that Attune wrote, and answer as Attune did? Exits 0 if so, 1 if not.

Usage: check_transformers_reads.py FOLDER [--tolerance 1e-4]

FOLDER holds cases, as the tests of surgeries leave them with ATTUNE_WRITTEN: `model`, a model's folder, and
`logits.safetensors` with `input_ids` i64 [T], `logits` f32 [T, V] and optionally `doc_lengths` i64 [D]: each document runs
alone.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "benches" / "peers"))

import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import reference as ref  # noqa: E402


def check(case, tolerance):
    """What transformers makes of one model, as a line."""
    given = load_file(case / "logits.safetensors")
    ids, want = given["input_ids"], given["logits"].float()
    lengths = given.get("doc_lengths", torch.tensor([len(ids)])).tolist()
    if sum(lengths) != len(ids) or want.shape[0] != len(ids):
        raise SystemExit(f"{case}: {len(ids)} input_ids, documents of {lengths} rows, logits {tuple(want.shape)}")
    # Names that do not match are only warned of, unless one asks.
    how = dict(dtype=torch.float32, attn_implementation="eager", experts_implementation="eager")
    model, told = transformers.AutoModelForCausalLM.from_pretrained(case / "model", output_loading_info=True, **how)
    model.eval()
    names = sorted(name for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in map(str, told[kind]))
    with torch.no_grad():
        got = torch.cat([ref.logits_of(model, part) for part in ids.split(lengths)])
    difference = (got - want).abs().max().item()
    ok = difference <= tolerance * max(1.0, want.abs().max().item()) and not names
    return {"ok": ok, "class": type(model).__name__, "max_difference": difference, "tolerance": tolerance, "names_not_matched": names, "transformers": transformers.__version__}


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("folder", type=Path)
    p.add_argument("--tolerance", type=float, default=1e-4)
    a = p.parse_args()
    ref.deterministic()
    found = {case.name: check(case, a.tolerance) for case in sorted(a.folder.iterdir()) if case.is_dir()}
    for name, line in found.items():
        print(name, json.dumps(line))
    print(f"{sum(line['ok'] for line in found.values())} of {len(found)} read")
    sys.exit(0 if found and all(line["ok"] for line in found.values()) else 1)


if __name__ == "__main__":
    main()
