"""Losses and gradients of TRL's group-relative objectives on fixed numbers.

    pip install torch==2.15.0 transformers==5.24.0 trl==1.16.0
    python grpo.py

writes grpo.json: two prompts with three answers each of unequal length, their log-probabilities under the model, under the
model that made them and under the reference, rewards (one cannot be judged), and for each case the loss as
`GRPOTrainer._compute_loss` computes it with its gradient by every log-probability.
"""

import json
import math
from types import SimpleNamespace

import torch
from trl import GRPOConfig, GRPOTrainer

try:
    from trl.trainer.utils import nanstd
except ImportError:
    from trl.trainer.grpo_trainer import nanstd

LENGTHS = [3, 1, 4, 2, 5, 2]
EACH, MAX = 3, 6
REWARDS = [1.0, 0.0, 0.5, 2.0, math.nan, -1.0]

torch.manual_seed(7)
logp = (-3 * torch.rand(6, MAX, dtype=torch.float64)).round(decimals=3)
made = (logp + 0.5 * torch.randn(6, MAX, dtype=torch.float64)).round(decimals=3)
reference = (logp + 0.5 * torch.randn(6, MAX, dtype=torch.float64)).round(decimals=3)
mask = (torch.arange(MAX)[None, :] < torch.tensor(LENGTHS)[:, None]).long()

CASES = {
    "grpo": dict(loss="grpo"),
    "dapo": dict(loss="dapo"),
    "dapo-high-kl": dict(loss="dapo", epsilon_high=0.28, beta=0.1),
    "dapo-delta": dict(loss="dapo", delta=1.1),
    "dr-grpo": dict(loss="dr_grpo", scale="none"),
    "gspo": dict(loss="grpo", importance="sequence", epsilon=0.05),
    "luspo": dict(loss="luspo", importance="sequence"),
    "cispo": dict(loss="cispo", epsilon_high=1.3),
    "sapo": dict(loss="sapo", sapo_temperatures=[1.0, 1.0625]),  # TRL holds them in f32
    "vespo": dict(loss="vespo"),
    "batch": dict(loss="grpo", scale="batch", beta=0.04),
    "plain-kl": dict(loss="grpo", beta=0.2, unbiased_kl=False),
    "gspo-kl": dict(loss="grpo", importance="sequence", beta=0.2),
    "first": dict(loss="dapo", first=True),
}


def advantages(scale):
    """As in `GRPOTrainer._generate_and_score_completions` with one reward function."""
    rewards = torch.tensor(REWARDS, dtype=torch.float64)
    groups = rewards.view(-1, EACH)
    centred = rewards - torch.nanmean(groups, dim=1).repeat_interleave(EACH)
    if scale == "group":
        centred = centred / (nanstd(groups, dim=1).repeat_interleave(EACH) + 1e-4)
    elif scale == "batch":
        centred = centred / (nanstd(rewards) + 1e-4)
    return torch.nan_to_num(centred, nan=0.0)


def run(case):
    leaf = logp.clone().requires_grad_(True)
    inputs = dict(
        prompt_ids=torch.zeros(6, 1, dtype=torch.long),
        prompt_mask=torch.ones(6, 1, dtype=torch.long),
        completion_ids=torch.zeros(6, MAX, dtype=torch.long),
        completion_mask=mask,
        advantages=advantages(case.get("scale", "group")),
        ref_per_token_logps=reference,
        num_items_in_batch=mask.sum(),
    )
    if not case.get("first"):
        inputs["old_per_token_logps"] = made
    defaults = {name: field.default for name, field in GRPOConfig.__dataclass_fields__.items()}
    trainer = SimpleNamespace(
        args=SimpleNamespace(
            **{
                **defaults,
                "delta": case.get("delta"),
                "use_bias_correction_kl": case.get("unbiased_kl", True),
                "sapo_temperature_neg": case.get("sapo_temperatures", [1.0, 1.05])[1],
                "steps_per_generation": 1,
            }
        ),
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x, sync_gradients=True),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        vllm_importance_sampling_correction=False,
        _entropy_bonus_enabled=False,
        current_gradient_accumulation_steps=1,
        max_completion_length=MAX,
        importance_sampling_level=case.get("importance", "token"),
        loss_type=case["loss"],
        beta=case.get("beta", 0.0),
        epsilon_low=case.get("epsilon", 0.2),
        epsilon_high=case.get("epsilon_high", case.get("epsilon", 0.2)),
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
        _get_per_token_logps_and_entropies=lambda *_, **__: (leaf, torch.zeros_like(leaf), None),
        _metrics={"train": __import__("collections").defaultdict(list)},
    )
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    loss.backward()
    flat = lambda t: [value for row, n in zip(t.tolist(), LENGTHS) for value in row[:n]]
    return dict(loss=loss.item(), gradient=flat(leaf.grad), flat=flat)


def main():
    made_of = {name: run(case) for name, case in CASES.items()}
    flat = made_of["grpo"].pop("flat")
    cases = {
        name: dict(config={k: v for k, v in CASES[name].items() if k != "first"}, first=CASES[name].get("first", False),
                   loss=found["loss"], gradient=found["gradient"])
        for name, found in made_of.items()
    }
    rewards = [None if math.isnan(reward) else reward for reward in REWARDS]
    numbers = dict(lengths=LENGTHS, each=EACH, max_tokens=MAX, rewards=rewards,
                   logp=flat(logp), made=flat(made), reference=flat(reference), cases=cases)
    with open("grpo.json", "w", encoding="utf-8") as file:
        json.dump(numbers, file, indent=1)
        file.write("\n")


main()
