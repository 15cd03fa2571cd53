"""Writes the golden files of variants of LoRA that PEFT runs on other linears or other inputs than these models', QA-LoRA and Activated LoRA, of VeLoRA, and of LoRA on repeated layers. See
README.md for names and shapes; pins in benches/peers/requirements.txt.

Usage: variants.py [case ...]
"""

import peft
import torch
from peft import peft_model
from peft.tuners.lora import layer, variants

import writing
from writing import ref

STD = 0.3


def grouped_on_any_linear():
    """PEFT resolves QA-LoRA for linears of GPTQ alone; its own code runs on any."""
    resolve = layer.Linear.resolve_lora_variant

    def resolved(self, *, config, **how):
        return variants.QALoraLinearVariant() if config.use_qalora else resolve(self, config=config, **how)

    layer.Linear.resolve_lora_variant = resolved


def invoked_by_embeddings():
    """An invocation is looked for among tokens; where embeddings are given, they are those of tokens."""
    offsets = peft_model.get_alora_offsets_for_forward

    def found(model, input_ids=None, inputs_embeds=None, **kwargs):
        if input_ids is None and inputs_embeds is not None:
            table = model.get_input_embeddings().weight
            ids = [(table == row).all(-1).nonzero()[0, 0] for row in inputs_embeds[0]]
            input_ids, inputs_embeds = torch.stack(ids)[None], None
        return offsets(model, input_ids, inputs_embeds, **kwargs)

    peft_model.get_alora_offsets_for_forward = found


grouped_on_any_linear()
invoked_by_embeddings()


def invocation(base, seed, start, count):
    """Some tokens of the case's document."""
    vocab = ref.load(ref.MODELS / base).config.vocab_size
    return ref.document(writing.ROWS, vocab, seed).ids[start : start + count].tolist()


# name: (base, configuration by the seed)
CASES = {
    "llama_qalora": ("llama", lambda _: peft.LoraConfig(r=3, lora_alpha=6, use_qalora=True, qalora_group_size=4, target_modules="all-linear")),
    "qwen2_qalora": (
        "qwen2",
        lambda _: peft.LoraConfig(
            r=2, lora_alpha=5, use_rslora=True, use_qalora=True, qalora_group_size=8, target_modules=["q_proj", "down_proj"], alpha_pattern={"q_proj": 3}
        ),
    ),
    "llama_alora": ("llama", lambda seed: peft.LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", alora_invocation_tokens=invocation("llama", seed, 13, 2))),
    "qwen2_alora": (
        "qwen2",
        lambda seed: peft.LoraConfig(
            r=4, lora_alpha=4, use_rslora=True, target_modules=["q_proj", "v_proj", "up_proj"], rank_pattern={"v_proj": 2}, alora_invocation_tokens=invocation("qwen2", seed, 8, 3)
        ),
    ),
    # What it saves while it trains changes nothing that it computes.
    "llama_velora": (
        "llama",
        lambda _: peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"], velora_config=peft.VeloraConfig(num_groups=4, init_type="random")),
    ),
    "llama_replicated": (
        "llama",
        lambda _: peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"], layer_replication=[[0, 2], [1, 2], [0, 1]]),
    ),
}


def randomise(model, g):
    for name, p in sorted((name, p) for name, p in model.named_parameters() if "lora_" in name):
        p.copy_(torch.randn(p.shape, generator=g) * STD)


def write(name):
    base, config = CASES[name]
    # The order in which the cases came, so that a new one changes no other's numbers.
    seed = 1000 + list(CASES).index(name)
    config = config(seed)
    config.task_type = "CAUSAL_LM"
    torch.manual_seed(seed)
    writing.write(name, base, config, None, seed, randomise)


if __name__ == "__main__":
    writing.main(CASES, write)
