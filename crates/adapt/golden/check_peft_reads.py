"""Does PEFT read an adapter that Attune wrote, and answer as Attune did? Exits 0 if so, 1 if not.

Usage: check_peft_reads.py BASE ADAPTER LOGITS.safetensors [--tolerance 1e-4]

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


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("base", type=Path)
    p.add_argument("adapter", type=Path)
    p.add_argument("logits", type=Path)
    p.add_argument("--tolerance", type=float, default=1e-4)
    a = p.parse_args()
    ref.deterministic()
    given = load_file(a.logits)
    ids, want = given["input_ids"], given["logits"].float()
    lengths = given.get("doc_lengths", torch.tensor([len(ids)])).tolist()
    if sum(lengths) != len(ids) or want.shape[0] != len(ids):
        p.error(f"{a.logits}: {len(ids)} input_ids, documents of {lengths} rows, logits {tuple(want.shape)}")
    stored = set(load_file(a.adapter / "adapter_model.safetensors"))
    got, loaded = [], set()
    for part in ids.split(lengths):
        model = peft.PeftModel.from_pretrained(ref.load(a.base), a.adapter).eval()
        loaded = {k.replace(".default.", ".") for k in model.state_dict() if "lora_" in k}
        got.append(ref.logits_of(model, part))
    difference = (torch.cat(got) - want).abs().max().item()
    # PEFT only warns of tensors that it did not expect or did not find: a name that is wrong on both sides stays silent.
    names = sorted(stored ^ loaded)
    ok = difference <= a.tolerance and not names
    print(json.dumps({"ok": ok, "max_difference": difference, "tolerance": a.tolerance, "sites": len(stored) // 2, "names_not_matched": names, "peft": peft.__version__}))
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    main()
