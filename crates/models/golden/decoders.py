"""Writes the golden files of the decoders. See README.md for names and shapes; pins in benches/peers/requirements.txt.

Usage: decoders.py [case ...]
"""

import json
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[2] / "benches" / "peers"))

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import GenerationConfig, GPT2Config, LlamaConfig, MistralConfig, MixtralConfig, OlmoeConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig  # noqa: E402
from transformers import GPT2LMHeadModel, LlamaForCausalLM, MistralForCausalLM, MixtralForCausalLM, OlmoeForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM, Qwen3MoeForCausalLM  # noqa: E402

import reference as ref  # noqa: E402

STD = 0.2
# Narrow heads need larger weights for their attention to be far from uniform.
STDS = {"gpt2_untied": 0.3, "olmoe": 0.4, "olmoe_normalised": 0.4, "mixtral": 0.4, "mixtral_window": 0.4, "qwen3_moe": 0.4}
NEW_TOKENS = 16
# Below this gap between best and second logit, rounding could turn a greedy token over.
LEAST_MARGIN = 0.03

COMMON = dict(hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
              vocab_size=56, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=None)
# One key-value head of 16: eight frequencies, so that a ramp over them has an inside.
ROPE = COMMON | dict(intermediate_size=16, num_attention_heads=2, num_key_value_heads=1, head_dim=16, vocab_size=40)


def llama(**k):
    return LlamaForCausalLM, LlamaConfig(**(COMMON | k))


def rope(max_positions, **parameters):
    return LlamaForCausalLM, LlamaConfig(**(ROPE | dict(max_position_embeddings=max_positions, rope_parameters={"rope_theta": 100.0} | parameters)))


def mistral(**k):
    return MistralForCausalLM, MistralConfig(**(COMMON | dict(rms_norm_eps=1e-3) | k))


def qwen2(**k):
    return Qwen2ForCausalLM, Qwen2Config(**(COMMON | dict(tie_word_embeddings=True, rms_norm_eps=1e-3) | k))


def qwen3(**k):
    return Qwen3ForCausalLM, Qwen3Config(**(COMMON | dict(hidden_size=24, head_dim=12, intermediate_size=24, tie_word_embeddings=True, rms_norm_eps=1e-3) | k))


def gpt2(**k):
    common = dict(n_embd=24, n_inner=40, n_layer=2, n_head=4, n_positions=48, vocab_size=56, layer_norm_epsilon=1e-3, bos_token_id=1, eos_token_id=2)
    return GPT2LMHeadModel, GPT2Config(**(common | k))


def olmoe(**k):
    own = dict(hidden_size=16, intermediate_size=8, vocab_size=40, num_experts=6, num_experts_per_tok=2, rms_norm_eps=1e-3, router_aux_loss_coef=0.5)
    return OlmoeForCausalLM, OlmoeConfig(**(COMMON | own | k))


def mixtral(**k):
    own = dict(hidden_size=16, intermediate_size=8, vocab_size=40, num_local_experts=4, num_experts_per_tok=2, rms_norm_eps=1e-3, router_aux_loss_coef=0.5)
    return MixtralForCausalLM, MixtralConfig(**(COMMON | own | k))


def qwen3_moe(**k):
    own = dict(hidden_size=16, head_dim=12, moe_intermediate_size=8, vocab_size=40, num_experts=5, num_experts_per_tok=3, norm_topk_prob=True, rms_norm_eps=1e-3, router_aux_loss_coef=0.5)
    return Qwen3MoeForCausalLM, Qwen3MoeConfig(**(COMMON | own | k))


# name: (maker, rows of the document, rows of the packed documents or None, gradients?, prompt rows or None, largest shard)
CASES = {
    "llama": (lambda: llama(), 40, (13, 22), True, 12, "1MB"),
    "llama_head_dim": (lambda: llama(hidden_size=24, head_dim=8, tie_word_embeddings=True, rope_parameters={"rope_theta": 500.0, "rope_type": "default"}), 24, None, False, 12, "1MB"),
    "llama_attention_bias": (lambda: llama(attention_bias=True), 24, None, False, 12, "1MB"),
    "llama_rope_linear": (lambda: rope(32, rope_type="linear", factor=2.0), 56, None, False, 28, "1MB"),
    "llama_rope_dynamic": (lambda: rope(32, rope_type="dynamic", factor=2.0), 56, (20, 44), False, None, "1MB"),
    "llama_rope_llama3": (lambda: rope(128, rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32), 56, None, False, 28, "1MB"),
    "llama_rope_yarn": (lambda: rope(128, rope_type="yarn", factor=4.0, original_max_position_embeddings=32), 56, None, True, 28, "1MB"),
    "mistral": (lambda: mistral(sliding_window=8), 40, (13, 22), True, 12, "40KB"),
    "mistral_no_window": (lambda: mistral(sliding_window=None), 40, None, False, 12, "1MB"),
    "qwen2": (lambda: qwen2(), 40, (13, 22), True, 12, "1MB"),
    "qwen3": (lambda: qwen3(), 40, (13, 22), True, 12, "1MB"),
    "olmoe": (lambda: olmoe(), 40, (13, 22), True, 12, "1MB"),
    "olmoe_normalised": (lambda: olmoe(norm_topk_prob=True, num_experts=3, tie_word_embeddings=True), 24, None, True, 12, "1MB"),
    "mixtral": (lambda: mixtral(), 40, (13, 22), True, 12, "1MB"),
    "mixtral_window": (lambda: mixtral(sliding_window=8, num_local_experts=3, tie_word_embeddings=True), 24, None, False, 12, "1MB"),
    "qwen3_moe": (lambda: qwen3_moe(), 40, (13, 22), True, 12, "1MB"),
    "gpt2": (lambda: gpt2(), 40, (13, 22), True, 12, "1MB"),
    "gpt2_untied": (lambda: gpt2(n_embd=20, n_inner=None, tie_word_embeddings=False, activation_function="relu"), 24, None, True, None, "1MB"),
    "qwen2_window": (lambda: qwen2(use_sliding_window=True, sliding_window=8, max_window_layers=1), 40, None, False, 12, "1MB"),
}

# Folders with the same weights and answers, whose config is spelt as transformers 4 wrote it.
# name: (case, keys that change, keys that go)
NEWER_KEYS = ["rope_parameters", "dtype", "head_dim", "layer_types"]
OLD_CONFIGS = {
    "llama_old_config": ("llama", dict(rope_theta=10000.0, rope_scaling=None, torch_dtype="float32"), NEWER_KEYS),
    "llama_rope_linear_old_config": ("llama_rope_linear", dict(rope_theta=100.0, rope_scaling={"type": "linear", "factor": 2.0}, torch_dtype="float32"), ["rope_parameters", "dtype"]),
    "llama_rope_dynamic_old_config": ("llama_rope_dynamic", dict(rope_theta=100.0, rope_scaling={"type": "dynamic", "factor": 2.0}, torch_dtype="float32"), ["rope_parameters", "dtype"]),
    "llama_rope_llama3_old_config": ("llama_rope_llama3", dict(rope_theta=100.0, rope_scaling={"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32, "rope_type": "llama3"}, torch_dtype="float32"), ["rope_parameters", "dtype"]),
    "llama_rope_yarn_old_config": ("llama_rope_yarn", dict(rope_theta=100.0, rope_scaling={"factor": 4.0, "original_max_position_embeddings": 32, "type": "yarn"}, torch_dtype="float32"), ["rope_parameters", "dtype"]),
    "qwen2_old_config": ("qwen2", dict(rope_theta=10000.0, use_sliding_window=False, sliding_window=8, max_window_layers=1, torch_dtype="float32"), NEWER_KEYS),
}


def randomise(model, seed, std):
    g = ref.generator(seed)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            norm = name.endswith("weight") and any(part in name.lower() for part in ("norm", "ln_"))
            p.copy_(torch.randn(p.shape, generator=g) * std + (1.0 if norm else 0.0))


def check(folder, doc, expected):
    """The reference agrees with itself: sdpa with eager, f64 matrix products with f32; attention is not uniform."""
    want = expected["logits"]
    sdpa = (ref.logits_of(ref.load(folder, "sdpa"), doc.ids) - want).abs().max().item()
    double = (ref.logits_of(ref.load(folder).double(), doc.ids) - want).abs().max().item()
    with torch.no_grad():
        attentions = ref.load(folder)(input_ids=doc.ids[None], output_attentions=True, use_cache=False).attentions
    # Entropy of the last row's attention over the log of what it may see: 1 = uniform.
    share = []
    for a in attentions:
        last = a[0, :, -1]
        seen = last > 0
        share.append((-(last * last.clamp_min(1e-30).log()).sum(-1) / seen.sum(-1).float().log()).mean().item())
    print(f"  sdpa {sdpa:.1e}  f64 {double:.1e}  attention entropy {share[0]:.2f} {share[1]:.2f}  logits std {want.std():.2f}")
    assert sdpa < 2e-5 and double < 2e-5, "the reference does not agree with itself"
    assert max(share) < 0.95, "attention is close to uniform"
    # A loader that ignores what the case is about must fail by far.
    plain = ref.load(folder).config
    if getattr(plain, "rope_parameters", None) is None:
        return
    if plain.rope_parameters["rope_type"] != "default":
        plain.rope_parameters = {"rope_type": "default", "rope_theta": plain.rope_parameters["rope_theta"]}
    elif getattr(plain, "sliding_window", None) is not None:
        plain.sliding_window = 10_000
    else:
        return
    ignorant = ref.load(folder, config=plain)
    difference = (ref.logits_of(ignorant, doc.ids) - want).abs().max().item()
    print(f"  without the scaling or the window the logits differ by {difference:.2f}")
    assert difference > 0.1


def generate(folder, rows, vocab):
    """Greedy tokens with a cache, of the first seed whose answer has no close call and no end of text."""
    how = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, use_cache=True, eos_token_id=None, pad_token_id=0)
    for seed in range(7000, 7200):
        prompt = ref.document(rows, vocab, seed).ids
        out = ref.load(folder).generate(prompt[None], attention_mask=torch.ones_like(prompt[None]), generation_config=how, return_dict_in_generate=True, output_logits=True)
        new, logits = out.sequences[0, rows:], torch.cat(out.logits)
        best = logits.topk(2).values
        margin = (best[:, 0] - best[:, 1]).min()
        if margin < LEAST_MARGIN or (new == 2).any() or len(new) != NEW_TOKENS or len(set(new.tolist())) < 5:
            continue
        whole = ref.logits_of(ref.load(folder), torch.cat([prompt, new]))[rows - 1 : -1]
        difference = (whole - logits).abs().max().item()
        assert difference < 2e-5, f"{folder.name}: the cache changes the logits by {difference}"
        print(f"  generated with seed {seed}: margin {margin:.3f}, without cache the same within {difference:.1e}")
        return {"prompt": prompt, "generated": new, "logits": logits, "margin": margin.reshape(1)}
    raise AssertionError(f"{folder.name}: no prompt without a close call")


def per_expert(gradients, kind):
    """Gradients of experts that the reference holds as one tensor, by the names of the files."""
    mixtral = kind is MixtralForCausalLM
    gate_name, up_name, down_name = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    found = {}
    for name, g in gradients.items():
        stem, _, last = name.rpartition(".")
        if mixtral:
            stem, name = (text.replace(".mlp", ".block_sparse_moe") for text in (stem, name))
        if last == "gate_up_proj":
            for e, (gate, up) in enumerate(pair.chunk(2) for pair in g):
                found |= {f"{stem}.{e}.{gate_name}.weight": gate, f"{stem}.{e}.{up_name}.weight": up}
        elif stem.endswith("experts"):
            found |= {f"{stem}.{e}.{down_name}.weight": down for e, down in enumerate(g)}
        else:
            found[name] = g
    return found


def auxiliary(model, doc):
    """The load-balancing loss, the routers' logits, and the gradients of the whole loss with it: of routers and of a linear
    below one."""
    out = model(input_ids=doc.ids[None], use_cache=False, output_router_logits=True)
    margins = [p.softmax(-1).topk(model.config.num_experts_per_tok + 1).values[:, -2:] for p in out.router_logits]
    margin = min((m[:, 0] - m[:, 1]).min().item() for m in margins)
    used = {int(e) for p in out.router_logits for e in p.topk(model.config.num_experts_per_tok).indices.flatten()}
    print(f"  auxiliary loss {out.aux_loss:.3f}, least margin of a choice {margin:.1e}, experts used {sorted(used)}")
    assert margin > 1e-5, "rounding could send a row elsewhere"
    mean = torch.nn.functional.cross_entropy(out.logits[0], doc.labels, ignore_index=ref.IGNORED)
    (mean + model.config.router_aux_loss_coef * out.aux_loss).backward()
    names = ("mlp.gate.weight", "o_proj.weight", "embed_tokens.weight")
    found = {n: p.grad for n, p in model.named_parameters() if n.endswith(names)}
    found = {f"gradient.{n}": g for n, g in per_expert(found, type(model)).items()}
    found |= {f"router_logits.{i}": p.detach() for i, p in enumerate(out.router_logits)}
    return found | {"auxiliary_loss": out.aux_loss.detach().reshape(1)}


def seed_of(name):
    """Stable whatever the order of the cases."""
    return sum((i + 1) * b for i, b in enumerate(name.encode())) % 10_000


def write(name):
    make, rows, packed, gradients, prompt, shard = CASES[name]
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    kind, config = make()
    config._attn_implementation = "eager"
    model = kind(config)
    randomise(model, seed_of(name), STDS.get(name, STD))
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2)
    model.save_pretrained(folder, max_shard_size=shard)
    print(name)
    fresh = lambda: ref.load(folder)  # noqa: E731
    document = ref.document(rows, config.vocab_size, seed_of(name) + 1)
    expected, grads = ref.run(fresh, [document])
    assert torch.equal(expected["logits"], ref.logits_of(fresh(), document.ids)), "embeddings as input change the logits"
    check(folder, document, expected)
    ref.save(expected, folder / "expected.safetensors")
    if gradients:
        grads = per_expert(grads, kind)
        ref.save(grads, folder / "gradients.safetensors")
    if packed:
        documents = [ref.document(n, config.vocab_size, seed_of(name) + 2 + i) for i, n in enumerate(packed)]
        expected, grads = ref.run(fresh, documents)
        ref.save(expected, folder / "packed.safetensors")
        if name == "llama":
            ref.save(grads, folder / "packed_gradients.safetensors")
    if kind in (MixtralForCausalLM, OlmoeForCausalLM, Qwen3MoeForCausalLM):
        ref.save(auxiliary(fresh(), document), folder / "auxiliary.safetensors")
    if prompt:
        ref.save(generate(folder, prompt, config.vocab_size), folder / "generated.safetensors")
    for f in folder.iterdir():
        ref.check_size(f)


def write_old_config(name):
    case, changed, gone = OLD_CONFIGS[name]
    source, folder = HERE / case, HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    config = json.loads((source / "config.json").read_text())
    config = {k: v for k, v in config.items() if k not in gone} | changed | {"transformers_version": "4.44.0"}
    ref.save_json(config, folder / "config.json")
    for f in source.iterdir():
        if f.name == "generation_config.json" or (f.suffix == ".safetensors" and "gradients" not in f.name):
            shutil.copy(f, folder / f.name)
    expected = load_file(folder / "expected.safetensors")
    difference = (ref.logits_of(ref.load(folder), expected["input_ids"]) - expected["logits"]).abs().max().item()
    print(f"{name}: differs from {case} by {difference}")
    assert difference == 0.0


def write_bare(name, case):
    """The folder of `case` as the first GPT-2 was published: no prefix, buffers of masks among the weights, `n_ctx`."""
    source, folder = HERE / case, HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    config = json.loads((source / "config.json").read_text())
    config = {k: v for k, v in config.items() if k != "dtype"} | {"n_ctx": config["n_positions"], "torch_dtype": "float32", "transformers_version": "4.44.0"}
    ref.save_json(config, folder / "config.json")
    tensors = {k.removeprefix("transformer."): v for k, v in load_file(source / "model.safetensors").items()}
    for layer in range(config["n_layer"]):
        tensors[f"h.{layer}.attn.bias"] = torch.tril(torch.ones(1, 1, 8, 8))
        tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    ref.save(tensors, folder / "model.safetensors")
    for f in ("expected.safetensors", "generation_config.json"):
        shutil.copy(source / f, folder / f)
    expected = load_file(folder / "expected.safetensors")
    difference = (ref.logits_of(ref.load(folder), expected["input_ids"]) - expected["logits"]).abs().max().item()
    print(f"{name}: differs from {case} by {difference}")
    assert difference == 0.0


def main():
    ref.deterministic()
    wanted = sys.argv[1:] or [*CASES, *OLD_CONFIGS, "gpt2_bare"]
    for name in wanted:
        if name in CASES:
            write(name)
        elif name in OLD_CONFIGS:
            write_old_config(name)
        else:
            write_bare(name, "gpt2")


if __name__ == "__main__":
    main()
