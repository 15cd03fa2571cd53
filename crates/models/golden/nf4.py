"""Matrices in four bits as bitsandbytes makes them: `python nf4.py`, with the pinned packages of benches/peers/requirements.txt.
Needs no GPU. Writes nf4/matrices.safetensors: of each case the weight, what it is widened to with plain scales
and with scales in eight bits, and the 256 values of those eight bits. And the folders llama_nf4 and llama_nf4_double, which are
`llama` as transformers saves it in four bits, with `expected.safetensors`: `input_ids` [T] and `logits` [T, V] of one document."""

import json

from pathlib import Path

import torch
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from bitsandbytes.functional import QuantState, create_dynamic_map, dequantize_blockwise, quantize_4bit
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

HERE = Path(__file__).resolve().parent

CASES = {
    # Whole blocks; a last block that is not full, of an odd number; blocks over the ends of rows; a large scale beside a small one.
    "blocks": ((6, 64), torch.float32),
    "odd": ((5, 21), torch.float32),
    "across": ((16, 24), torch.float32),
    "scales": ((4, 128), torch.float32),
    "halves": ((7, 96), torch.bfloat16),
}
# More scales than one block of them holds: numbers by a formula, so that they need not be kept.
MANY = (264, 64)


def many():
    k = torch.arange(MANY[0] * MANY[1])
    return (((k * 7919 + k // 64 * 104729) % 2001 - 1000) * (1 + k // 64 % 17)).float().reshape(MANY) / 2**14


def widen(packed, state):
    """What every backend of bitsandbytes makes of few bits but the one of processors, which counts blocks anew in every row and so is
    right only where rows are whole blocks."""
    absmax = state.absmax
    if state.nested:
        absmax = dequantize_blockwise(absmax, state.state2) + state.offset
    widened = _dequantize_4bit_compute.__wrapped__(packed.reshape(-1), absmax, state.code, state.blocksize, state.shape, state.dtype)
    return widened.contiguous()


def folder(name, nested):
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=nested, bnb_4bit_compute_dtype=torch.float32
    )
    model = AutoModelForCausalLM.from_pretrained(HERE / "llama", quantization_config=config, dtype=torch.float32, device_map="cpu")
    model.save_pretrained(HERE / name)
    (HERE / name / "generation_config.json").unlink(missing_ok=True)
    assert json.loads((HERE / name / "config.json").read_text())["quantization_config"]["load_in_4bit"]
    # The same model with the numbers of that file.
    stored = load_file(HERE / name / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(HERE / "llama", dtype=torch.float32)
    for weight, parameter in model.named_parameters():
        parts = {key.removeprefix(f"{weight}."): value for key, value in stored.items() if key.startswith(f"{weight}.")}
        if parts:
            parameter.data = widen(stored[weight], QuantState.from_dict(parts, torch.device("cpu")))
        else:
            assert torch.equal(parameter, stored[weight]), weight
    ids = torch.arange(20) * 7 % 56
    logits = model(ids[None]).logits[0].detach()
    save_file({"input_ids": ids, "logits": logits.contiguous()}, HERE / name / "expected.safetensors")


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
            tensors[f"{name}.{kind}"] = widen(packed, state)
    packed, state = quantize_4bit(many().bfloat16(), blocksize=64, quant_type="nf4", compress_statistics=True)
    tensors["many.double"] = widen(packed, state)
    (HERE / "nf4").mkdir(exist_ok=True)
    save_file(tensors, HERE / "nf4" / "matrices.safetensors")
    folder("llama_nf4", False)
    folder("llama_nf4_double", True)


if __name__ == "__main__":
    main()
