"""Writes the golden files of PEFT's MonteCLoRA, by PEFT. See README.md for names and shapes; pins in benches/peers/requirements.txt.

Usage: drawn.py [case ...]
"""

import peft
import torch
from peft.tuners.lora.config import MontecloraConfig
from peft.tuners.lora.monteclora import MontecloraSampler

import writing
from writing import ref

STD = 0.2

# What only the draws of training reach.
DRAWN = ("lora_monteclora_sampler.std_prior", "lora_monteclora_sampler.expert_weights_prior")

# name: (base, configuration, merged site)
CASES = {
    "llama_monteclora": (
        "llama",
        lambda: peft.LoraConfig(
            r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"], rank_pattern={"down_proj": 2}, monteclora_config=MontecloraConfig(num_samples=4)
        ),
        "model.layers.1.mlp.down_proj",
    ),
    "gpt2_monteclora": (
        "gpt2",
        lambda: peft.LoraConfig(
            r=4,
            lora_alpha=5,
            use_rslora=True,
            target_modules=["c_attn"],
            fan_in_fan_out=True,
            monteclora_config=MontecloraConfig(num_samples=3, use_entropy=True, dirichlet_prior=0.5, sample_scaler=0.01, kl_loss_weight=0.001),
        ),
        "transformer.h.0.attn.c_attn",
    ),
}


def randomise(model, g):
    """Moves what trains from its start."""
    for _, p in sorted((name, p) for name, p in model.named_parameters() if p.requires_grad):
        p.add_(torch.randn(p.shape, generator=g) * STD)


def draw():
    """What one draw makes of a product of factors, its losses, and their gradients: `z_*` are the numbers that were drawn, `chi_r` the
    diagonal of Wishart's matrix."""
    torch.manual_seed(900)
    i, r, o, n = 6, 3, 5, 4
    sampler = MontecloraSampler(i, r, n, use_entropy=True, dirichlet_prior=0.3, sample_scaler=0.05, kl_loss_weight=0.01, buffer_size=1, device="cpu").train()
    normal = lambda *shape: torch.randn(shape)
    x, dy, a, b = normal(7, i), normal(7, o), normal(r, i).requires_grad_(), normal(o, r).requires_grad_()
    sample = sampler.sampler.buffer[0]
    var, weights = sampler()
    perturbed = torch.einsum("n,nij->ij", weights, a.T + var).T
    y = (x @ perturbed.T) @ b.T * 2.0
    kl, entropy = sampler.get_variational_loss()
    ((y * dy).sum() + kl + entropy).backward()
    tensors = {"x": x, "dy": dy, "lora_A": a, "lora_B": b, "std_prior": sampler.std_prior, "expert_weights_prior": sampler.expert_weights_prior}
    tensors |= {f"grad.{name}": tensors[name].grad for name in ("lora_A", "lora_B", "std_prior", "expert_weights_prior")}
    tensors |= {"z_draws": sample["z_mvn"], "chi_r": sample["z_wishart"].diag(), "z_shares": sample["z_dirichlet"]}
    tensors |= {"y": y, "loss": (kl + entropy)[None], "variances": sampler.gaussian_var_prior.diag(), "shares": weights}
    ref.save({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, writing.HERE / "monteclora_draw.safetensors")
    print(f"monteclora_draw: a loss of {(kl + entropy).item():.4f}")


def write(name):
    base, config, site = CASES[name]
    config = config()
    config.task_type = "CAUSAL_LM"
    # The order in which the cases came, so that a new one changes no other's numbers.
    seed = 900 + list(CASES).index(name)
    # What PEFT starts at random.
    torch.manual_seed(seed)
    writing.write(name, base, config, site, seed, randomise, drawn=DRAWN)


if __name__ == "__main__":
    draw()
    writing.main(CASES, write)
