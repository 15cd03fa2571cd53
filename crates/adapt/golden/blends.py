"""Writes the golden files of what mixes LoRAs that are there, by PEFT. See README.md for names and shapes; pins in
benches/peers/requirements.txt.

Usage: blends.py [case ...]
"""

import dataclasses
import shutil

import peft
import torch
from peft.tuners.lora.arrow import create_arrow_model
from peft.tuners.lora.config import ArrowConfig

import writing
from writing import HERE, ROWS, ref

STD = 0.3
# The network's scores differ enough for a choice of the largest to show.
SCORES = 0.8

# name: (base, targets, LoRAs, what mixes them)
CASES = {
    "llama_arrow": ("llama", ["q_proj", "down_proj"], 3, lambda: ArrowConfig(top_k=2, router_temperature=0.5, rng_seed=1)),
    "qwen2_arrow": ("qwen2", ["k_proj", "o_proj", "up_proj"], 2, lambda: ArrowConfig(top_k=1, rng_seed=1)),
    "llama_xlora": ("llama", ["q_proj", "up_proj"], 3, lambda: dict(xlora_depth=2, xlora_size=6, top_k_lora=2, softmax_temperature=0.7, global_scaling_weight=1.5)),
    "llama_xlora_deep": ("llama", ["v_proj", "down_proj"], 2, lambda: dict(xlora_depth=4, xlora_size=5, layerwise_scalings=True)),
    "qwen2_xlora": ("qwen2", ["k_proj", "gate_proj"], 3, lambda: dict(layerwise_scalings=True, enable_softmax=False, enable_softmax_topk=True, top_k_lora=2)),
}


def loras(name, base, targets, count, seed):
    """LoRAs with a direction that is far the largest: PEFT's power iteration has ended long before its last step."""
    folders = []
    for n in range(count):
        model = peft.get_peft_model(ref.load(ref.MODELS / base), peft.LoraConfig(r=3, lora_alpha=6, target_modules=targets))
        g = ref.generator(seed + 10 * n)
        with torch.no_grad():
            for k, p in model.named_parameters():
                if "lora_" in k:
                    p.copy_(torch.randn(p.shape, generator=g) * STD)
                if "lora_B" in k:
                    p.mul_(torch.tensor([1.0, 0.2, 0.1]))
        folder = HERE / name / f"lora-{n}"
        writing.save_adapter(model, base, folder)
        folders.append(folder)
    return folders


def arrow(base, folders, config):
    return lambda: create_arrow_model(ref.load(ref.MODELS / base), [str(folder) for folder in folders], dataclasses.replace(config)).eval()


def xlora(base, folders, keys, seed):
    def fresh():
        model = ref.load(ref.MODELS / base)
        model.config.use_cache = False
        adapters = {str(n): str(folder) for n, folder in enumerate(folders)}
        config = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=model.config.hidden_size, adapters=adapters, **keys)
        model = peft.get_peft_model(model, config).eval()
        g = ref.generator(seed)
        with torch.no_grad():
            for p in model.base_model.internal_xlora_classifier.parameters():
                p.copy_(torch.randn(p.shape, generator=g) * SCORES)
        return model

    return fresh


def write(name):
    base, targets, count, mixes = CASES[name]
    folder, seed = HERE / name, sum(name.encode())
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    folders = loras(name, base, targets, count, seed)
    how = mixes()
    fresh = arrow(base, folders, how) if isinstance(how, ArrowConfig) else xlora(base, folders, how, seed)
    model = fresh()
    document = ref.document(ROWS, model.config.vocab_size, seed)
    expected, gradients = ref.run(fresh, [document])
    # A pass goes before the pass whose rows would be seen.
    expected = {k: v for k, v in expected.items() if not k.startswith("hidden.")}
    expected["base_logits"] = ref.logits_of(ref.load(ref.MODELS / base), document.ids)
    ref.save(expected, folder / "expected.safetensors")
    if isinstance(how, ArrowConfig):
        ref.save_json({"top_k": how.top_k, "router_temperature": how.router_temperature}, folder / "mixture.json")
    else:
        config = {k: v for k, v in model.peft_config["default"].to_dict().items() if k not in ("adapters", "base_model_name_or_path", "revision", "auto_mapping", "peft_version")}
        ref.save_json(config, folder / "mixture.json")
        prefix = "base_model.internal_xlora_classifier."
        own = {k.removeprefix(prefix): p for k, p in model.named_parameters() if k.startswith(prefix)}
        gradients = {k.removeprefix(prefix): g for k, g in gradients.items() if k.startswith(prefix)}
        assert own.keys() == gradients.keys() and own, (own.keys(), gradients.keys())
        assert min(g.abs().max() for g in gradients.values()) > 1e-5
        ref.save(own, folder / "classifier.safetensors")
        ref.save(gradients, folder / "classifier_gradients.safetensors")
    off = (expected["logits"] - expected["base_logits"]).abs().max().item()
    one = peft.PeftModel.from_pretrained(ref.load(ref.MODELS / base), folders[0]).eval()
    apart = (expected["logits"] - ref.logits_of(one, document.ids)).abs().max().item()
    assert off > 0.1 and apart > 0.1
    print(f"{name}: {count} LoRAs move the logits by {off:.2f}, the first alone by {apart:.2f} more")


if __name__ == "__main__":
    writing.main(CASES, write)
