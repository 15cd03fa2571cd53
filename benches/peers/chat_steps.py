"""Makes a file of optimiser steps from chat data with transformers' own tokenizer, so that the peer can be run without Attune.

Usage: chat_steps.py BASE DATA.jsonl OUT.jsonl --rows-per-step 48 --steps 200 --seed 0
       chat_steps.py BASE DATA.jsonl OUT.jsonl --all            (validation: one line, every row in order)
"""

import argparse
import json
import os
import random

os.environ.setdefault("HF_HUB_OFFLINE", "1")
from transformers import AutoTokenizer  # noqa: E402

TURN_END = "<|im_end|>\n"


def document(tokenizer, messages, domain):
    """The whole rendering. Supervised are the tokens of each assistant turn's text and of all that the ChatML template ends it
    with: `<|im_end|>` and the newline (leaving the newline out makes the mean higher, for it is the easy one)."""
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    spans, at = [], 0
    for m in messages:
        start = text.index(m["content"], at)
        at = start + len(m["content"])
        if m["role"] == "assistant":
            spans.append((start, text.index(TURN_END, at) + len(TURN_END)))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    mask = [int(any(s <= a and b <= e for s, e in spans)) for a, b in encoded["offset_mapping"]]
    assert sum(mask) >= 3, text
    return {"ids": encoded["input_ids"], "labels_mask": mask, "domain": domain}


def main():
    p = argparse.ArgumentParser()
    p.add_argument("base")
    p.add_argument("data")
    p.add_argument("out")
    p.add_argument("--rows-per-step", type=int, default=48)
    p.add_argument("--steps", type=int, default=200)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--all", action="store_true")
    a = p.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(a.base)
    with open(a.data) as f:
        rows = [json.loads(line) for line in f]
    documents = [document(tokenizer, r["messages"], r.get("domain", "data")) for r in rows]
    choose = random.Random(a.seed)
    lines = [documents] if a.all else [choose.sample(documents, a.rows_per_step) for _ in range(a.steps)]
    with open(a.out, "w") as f:
        f.writelines(json.dumps({"documents": d}) + "\n" for d in lines)
    print(f"{len(lines)} lines, {sum(len(d['ids']) for line in lines for d in line) / len(lines):.0f} tokens a line")


if __name__ == "__main__":
    main()
