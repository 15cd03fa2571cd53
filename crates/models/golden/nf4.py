"""Matrices in four bits as bitsandbytes makes them: `python nf4.py`, with the pinned packages of benches/peers/requirements.txt and
bitsandbytes 0.50.2. Needs no GPU. Writes nf4/matrices.safetensors: of each case the weight, what it is widened to with plain scales
and with scales in eight bits, and the 256 values of those eight bits."""

from pathlib import Path

import torch
from bitsandbytes.functional import create_dynamic_map, dequantize_4bit, quantize_4bit
from safetensors.torch import save_file

CASES = {
    # Whole blocks; a last block that is not full, of an odd number; blocks over the ends of rows; a large scale beside a small one.
    "blocks": ((6, 64), torch.float32),
    "odd": ((5, 21), torch.float32),
    "across": ((16, 24), torch.float32),
    "scales": ((4, 128), torch.float32),
    "halves": ((7, 96), torch.bfloat16),
    # More scales than one block of them holds.
    "many": ((264, 64), torch.bfloat16),
}


def main():
    tensors = {"dynamic_map": create_dynamic_map(signed=True)}
    for seed, (name, (shape, dtype)) in enumerate(CASES.items()):
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(shape, generator=generator) * 0.05
        if name == "scales":
            weight *= torch.logspace(-3, 1, 4)[:, None]
        weight = weight.to(dtype)
        tensors[f"{name}.weight"] = weight
        for kind, nested in [("plain", False), ("double", True)]:
            packed, state = quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=nested)
            tensors[f"{name}.{kind}"] = dequantize_4bit(packed, state).contiguous()
    folder = Path(__file__).parent / "nf4"
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "matrices.safetensors")


if __name__ == "__main__":
    main()
