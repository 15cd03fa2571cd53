"""The models that both sides of a comparison of speed read: random weights of a fixed seed as a Hugging Face folder, a PEFT
adapter whose B is not zero, and one batch of token ids.

Usage: shapes.py SHAPE f32|bf16 OUT      (writes OUT/base, OUT/adapter, OUT/batch.json)

Random weights cost as much time as trained ones. Biases and norms are made random as well, so that a side that forgets
them computes another loss.
"""

import argparse
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

RANK = 16
ALPHA = 32
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Shape:
    """A model of `family` (transformers' name of the configuration) and the batch that it is trained on."""

    family: str
    documents: int
    length: int
    config: dict
    targets: list = field(default_factory=lambda: LINEARS)
    # A class of every document is learnt instead of the next tokens.
    classifies: bool = False

    @property
    def model(self):
        """The class of transformers that reads it."""
        return "AutoModelForSequenceClassification" if self.classifies else "AutoModelForCausalLM"

    @property
    def tokens(self):
        return self.documents * self.length


SHAPES = {
    # A small Llama: everything fits the caches but the head.
    "S": Shape("LlamaConfig", 8, 256, {
        "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 4,
        "intermediate_size": 688, "vocab_size": 4096, "max_position_embeddings": 2048, "tie_word_embeddings": False,
    }),
    # Qwen2.5-0.5B.
    "M": Shape("Qwen2Config", 2, 256, {
        "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
        "intermediate_size": 4864, "vocab_size": 151936, "max_position_embeddings": 32768, "tie_word_embeddings": True,
        "rope_theta": 1000000.0, "rms_norm_eps": 1e-6,
    }),
    # S with eight experts of half its MLP's width, two of them a token: as many operations a token. PEFT gives adapters to
    # linears, and these experts are none to transformers: attention's are tuned, the experts stay frozen.
    "E": Shape("OlmoeConfig", 8, 256, {
        "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 4,
        "intermediate_size": 344, "num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True, "vocab_size": 4096,
        "max_position_embeddings": 2048, "tie_word_embeddings": False, "pad_token_id": 1,
    }, targets=["q_proj", "k_proj", "v_proj", "o_proj"]),
    # BERT base as a classifier. Attune has no dropout of hidden rows: neither side drops any.
    "B": Shape("BertConfig", 8, 128, {
        "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
        "vocab_size": 30522, "max_position_embeddings": 512, "num_labels": 2, "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }, targets=["query", "key", "value", "dense"], classifies=True),
}

# Ways of PyTorch to train in a precision: type of the base's weights, type of the adapter's, whether under bf16 autocast.
VARIANTS = {
    "f32": {"weights": ("float32", "float32", False)},
    "bf16": {
        "widened": ("float32", "float32", False),
        "weights": ("bfloat16", "float32", False),
        "weights-and-adapter": ("bfloat16", "bfloat16", False),
        "weights-under-autocast": ("bfloat16", "float32", True),
        "autocast": ("float32", "float32", True),
    },
}


def write(shape, precision, out, seed=0):
    """Makes the folders of `shape` in `out`, with weights of `precision`."""
    import torch  # noqa: PLC0415  (the driver reads SHAPES without paying for these)
    import transformers  # noqa: PLC0415

    import peft  # noqa: PLC0415

    torch.manual_seed(seed)
    transformers.logging.set_verbosity_error()
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[precision]
    config = getattr(transformers, shape.family)(**shape.config, use_cache=False, bos_token_id=0, eos_token_id=1)
    # Random numbers are drawn in f32, so that both precisions are the same model up to rounding.
    model = getattr(transformers, shape.model).from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("bias"):
                value.normal_(0.0, 0.02)
            elif "norm" in name.lower():
                value.normal_(1.0, 0.1)
    model.to(dtype).save_pretrained(out / "base")

    lora = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, bias="none", target_modules=shape.targets)
    model = peft.get_peft_model(model, lora)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.normal_(0.0, 0.02)
    model.save_pretrained(out / "adapter")

    ids = torch.randint(0, shape.config["vocab_size"], (shape.documents, shape.length))
    batch = {"documents": ids.tolist()}
    if shape.classifies:
        batch["classes"] = torch.randint(0, shape.config["num_labels"], (shape.documents,)).tolist()
    (out / "batch.json").write_text(json.dumps(batch))


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("shape", choices=SHAPES)
    p.add_argument("precision", choices=["f32", "bf16"])
    p.add_argument("out", type=Path)
    a = p.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    write(SHAPES[a.shape], a.precision, a.out)


if __name__ == "__main__":
    main()
