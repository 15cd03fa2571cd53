"""Does PEFT read an adapter that Attune wrote, and answer as Attune did? Exits 0 if so, 1 if not.

Usage: check_peft_reads.py (BASE ADAPTER LOGITS.safetensors | --cases FOLDER) [--tolerance 1e-4]

LOGITS holds `input_ids` i64 [T], `logits` f32 [T, V] and optionally `doc_lengths` i64 [D]: each document runs alone.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "benches" / "peers"))

import peft  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import reference as ref  # noqa: E402

# Without a GPU PEFT takes BOFT for one of a single factor; this makes its own code run here.
import turns  # noqa: E402, F401
import wider  # noqa: E402
# So does this for QA-LoRA on linears that are not quantised.
import variants  # noqa: E402, F401

# What Attune keeps beside what PEFT reads, which finds it again by the base.
SAID_BY_BASE = ("dropped_left", "dropped_right", *(f"osf_{name}_start" for name in "USV"), "osf_U_high", "osf_V_high")

# An AdaMSS of a single subspace groups nothing, for which PEFT would want scikit-learn.
wider.grouped_by_number()


def logits_of(model, ids):
    """Those of the one task, where PEFT asks for one."""
    if model.peft_config["default"].peft_type not in ("MULTITASK_PROMPT_TUNING", "POLY"):
        return ref.logits_of(model, ids)
    with torch.no_grad():
        return model(input_ids=ids[None], task_ids=torch.zeros(1, dtype=torch.long)).logits[0]


def check(base, adapter, logits, tolerance):
    """What PEFT makes of one adapter, as a line."""
    given = load_file(logits)
    ids, want = given["input_ids"], given["logits"].float()
    lengths = given.get("doc_lengths", torch.tensor([len(ids)])).tolist()
    if sum(lengths) != len(ids) or want.shape[0] != len(ids):
        raise SystemExit(f"{logits}: {len(ids)} input_ids, documents of {lengths} rows, logits {tuple(want.shape)}")
    stored = set(load_file(adapter / "adapter_model.safetensors"))
    got, loaded = [], set()
    for part in ids.split(lengths):
        model = peft.PeftModel.from_pretrained(ref.load(base), adapter).eval()
        loaded = set(peft.get_peft_model_state_dict(model))
        # Rows before a document have logits, too.
        got.append(logits_of(model, part)[-len(part):])
    difference = (torch.cat(got) - want).abs().max().item()
    # PEFT only warns of tensors that it did not expect or did not find: a name that is wrong on both sides stays silent. What PEFT
    # keeps again and again, once in its own file as well, is held to what is there.
    names = sorted(name for name in stored - loaded if not name.endswith(SAID_BY_BASE))
    ok = difference <= tolerance and not names
    return {"ok": ok, "max_difference": difference, "tolerance": tolerance, "tensors": len(stored), "names_not_matched": names, "peft": peft.__version__}


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("base", type=Path, nargs="?")
    p.add_argument("adapter", type=Path, nargs="?")
    p.add_argument("logits", type=Path, nargs="?")
    p.add_argument("--cases", type=Path, help="a folder of cases as the battery leaves them with ATTUNE_WRITTEN")
    p.add_argument("--tolerance", type=float, default=1e-4)
    a = p.parse_args()
    ref.deterministic()
    if a.cases:
        found = {}
        # What is in our own layout PEFT does not have.
        ours = lambda case: "attune" in json.loads((case / "adapter" / "adapter_config.json").read_text())
        for case in sorted(path for path in a.cases.iterdir() if path.is_dir() and not ours(path)):
            base = ref.MODELS / (case / "base").read_text()
            found[case.name] = check(base, case / "adapter", case / "logits.safetensors", a.tolerance)
            print(case.name, json.dumps(found[case.name]))
        print(f"{sum(one['ok'] for one in found.values())} of {len(found)} read")
        sys.exit(0 if found and all(one["ok"] for one in found.values()) else 1)
    if not a.logits:
        p.error("expected BASE ADAPTER LOGITS.safetensors, or --cases FOLDER")
    line = check(a.base, a.adapter, a.logits, a.tolerance)
    print(json.dumps(line))
    sys.exit(0 if line["ok"] else 1)


if __name__ == "__main__":
    main()
