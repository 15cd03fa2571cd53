"""Writes what PEFT's LoftQ makes of the weights of a small model: for each number of rounds `golden/starts/loftq_N.safetensors` with the
widened base (`quantized.SITE`) and the product of the pair beside it (`change.SITE`), of rank 4 and with no factor, which PEFT leaves
out. PEFT asks for a GPU and uses it for speed alone: here its tensors stay where they are. Pins in benches/peers/requirements.txt.

Usage: loftq.py [rounds ...]
"""

import sys

import bitsandbytes
import torch
from peft.utils.loftq_utils import loftq_init

import writing
from starts import SITES
from writing import HERE, ref

sys.path.insert(0, str(ref.MODELS))
from nf4 import widen  # noqa: E402

CASES = {"1": 1, "3": 3}


def stay(move):
    """`Tensor.to` and `Params4bit.to` that know no GPU."""

    def to(self, *args, **kwargs):
        args = ["cpu" if arg == "cuda" else arg for arg in args]
        kwargs = {key: "cpu" if value == "cuda" else value for key, value in kwargs.items()}
        return move(self, *args, **kwargs)

    return to


def write(name):
    model = ref.load(ref.MODELS / "llama")
    made = {}
    for site in SITES:
        weight = model.get_submodule(site).weight.detach()
        quantized, a, b = loftq_init(weight, num_bits=4, reduced_rank=4, num_iter=CASES[name])
        made[f"quantized.{site}"] = quantized.contiguous()
        made[f"change.{site}"] = (b @ a).contiguous()
    (HERE / "starts").mkdir(exist_ok=True)
    ref.save(made, HERE / "starts" / f"loftq_{name}.safetensors")
    print(f"{name} rounds: {len(made)} tensors")


if __name__ == "__main__":
    torch.Tensor.to = stay(torch.Tensor.to)
    bitsandbytes.nn.Params4bit.to = stay(bitsandbytes.nn.Params4bit.to)
    bitsandbytes.functional.dequantize_4bit = widen
    torch.cuda.empty_cache = lambda: None
    writing.main(CASES, write)
