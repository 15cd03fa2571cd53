"""Writes the golden files of methods that turn a weight or change it by few numbers, by PEFT. See README.md for names and shapes; pins in benches/peers/requirements.txt.

Usage: turns.py [case ...]
"""

import types

import peft
import torch

import writing


class BlockDiagonal:
    """What PEFT's CUDA kernel computes, by torch: without it PEFT has one butterfly factor, whatever it is asked for."""

    @staticmethod
    def apply(blocks):
        return torch.stack([torch.block_diag(*factor) for factor in blocks])


peft.tuners.boft.layer.get_fbd_cuda = lambda: True
peft.tuners.boft.layer.FastBlockDiag = BlockDiagonal


class Differentiated:
    """PEFT's circular convolution with the reverse by torch: the one that comes with it takes gradients by its input of another
    kernel (of K[-l] in place of K[l]), as `torch.autograd.gradcheck` shows."""

    @staticmethod
    def apply(x, kernel, forward=peft.tuners.c3a.layer.BlockCircularConvolution.forward):
        return forward(types.SimpleNamespace(save_for_backward=lambda *_: None), x, kernel)


peft.tuners.c3a.layer.BlockCircularConvolution = Differentiated

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]

# name: (base, configuration, merged site)
CASES = {
    "llama_oft": ("llama", lambda: peft.OFTConfig(oft_block_size=8, target_modules="all-linear"), "model.layers.1.mlp.down_proj"),
    "qwen2_oft": (
        "qwen2",
        lambda: peft.OFTConfig(r=4, oft_block_size=0, use_cayley_neumann=False, block_share=True, target_modules=ATTENTION),
        "model.layers.0.self_attn.q_proj",
    ),
    "llama_boft": ("llama", lambda: peft.BOFTConfig(boft_block_size=4, target_modules=["q_proj", "v_proj", "down_proj"]), "model.layers.0.mlp.down_proj"),
    "qwen2_boft": (
        "qwen2",
        lambda: peft.BOFTConfig(boft_block_size=0, boft_block_num=8, boft_n_butterfly_factor=3, target_modules=["k_proj", "o_proj"]),
        "model.layers.1.self_attn.k_proj",
    ),
    "llama_hra": ("llama", lambda: peft.HRAConfig(r=4, target_modules="all-linear"), "model.layers.1.mlp.up_proj"),
    "qwen2_hra": ("qwen2", lambda: peft.HRAConfig(r=3, apply_GS=True, target_modules=["q_proj", "gate_proj"]), "model.layers.0.mlp.gate_proj"),
    "llama_c3a": ("llama", lambda: peft.C3AConfig(block_size=8, target_modules="all-linear"), "model.layers.0.mlp.down_proj"),
    "qwen2_c3a": (
        "qwen2",
        lambda: peft.C3AConfig(block_size=4, block_size_pattern={"q_proj": 16}, init_weights=True, target_modules=["q_proj", "up_proj"]),
        "model.layers.1.self_attn.q_proj",
    ),
    "llama_shira": ("llama", lambda: peft.ShiraConfig(r=2, random_seed=3, target_modules=["q_proj", "down_proj"]), "model.layers.1.mlp.down_proj"),
    "qwen2_shira": ("qwen2", lambda: peft.ShiraConfig(r=4, random_seed=4, target_modules=["v_proj", "gate_proj"]), "model.layers.0.self_attn.v_proj"),
    "gpt2_fourierft": (
        "gpt2",
        lambda: peft.FourierFTConfig(n_frequency=40, scaling=20.0, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True),
        "transformer.h.1.attn.c_attn",
    ),
    "llama_fourierft": (
        "llama",
        lambda: peft.FourierFTConfig(n_frequency=24, n_frequency_pattern={"q_proj": 60}, random_loc_seed=5, init_weights=True, target_modules="all-linear"),
        "model.layers.0.self_attn.q_proj",
    ),
}
STD = 0.2
# Kernels are divided by the input width.
KERNELS = 2.0


def randomise(model, g):
    for name, p in sorted(model.named_parameters()):
        if p.requires_grad:
            p.add_(torch.randn(p.shape, generator=g) * (KERNELS if "c3a" in name else STD))


def write(name):
    base, config, site = CASES[name]
    config = config()
    config.task_type = "CAUSAL_LM"
    # The order in which the cases came, so that a new one changes no other's numbers.
    seed = 300 + list(CASES).index(name)
    # What PEFT starts at random.
    torch.manual_seed(seed)
    writing.write(name, base, config, site, seed, randomise)


if __name__ == "__main__":
    writing.main(CASES, write)
