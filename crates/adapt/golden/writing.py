"""What the scripts that write golden files of adapters at linears share: one case, from PEFT's configuration to its files."""

import json
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[2] / "benches" / "peers"))

import peft  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import reference as ref  # noqa: E402

ROWS = 32


def save_adapter(model, base, folder):
    """PEFT's own writer; then what would differ from run to run or from machine to machine is made fixed."""
    shutil.rmtree(folder, ignore_errors=True)
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(folder)
    (folder / "README.md").unlink()
    config = json.loads((folder / "adapter_config.json").read_text())
    if isinstance(config["target_modules"], list):
        config["target_modules"].sort()
    ref.save_json(config, folder / "adapter_config.json")
    ref.check_size(folder / "adapter_model.safetensors")


def on_disk(name):
    """A parameter's name as `adapter_model.safetensors` spells it."""
    return name.replace("lora_magnitude_vector.default.weight", "lora_magnitude_vector").replace(".default.", ".").removesuffix(".default")


def write(name, base, config, site, seed, randomise, packed=False, drawn=()):
    """Writes the case `name`: an adapter that `randomise(model, generator)` moved away from its start on one of the small models,
    what it answers, its gradients, and the weight of `site`, if there is one, with it merged. Parameters whose names end in one of
    `drawn` have none, for only what training draws depends on them."""
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    model = peft.get_peft_model(ref.load(ref.MODELS / base), config)
    with torch.no_grad():
        randomise(model, ref.generator(seed))
    save_adapter(model, base, folder / "adapter")

    def fresh():
        loaded = peft.PeftModel.from_pretrained(ref.load(ref.MODELS / base), folder / "adapter", is_trainable=True)
        return loaded.eval()

    document = ref.document(ROWS, model.config.vocab_size, seed)
    expected, gradients = ref.run(fresh, [document])
    expected["base_logits"] = ref.logits_of(ref.load(ref.MODELS / base), document.ids)
    ref.save(expected, folder / "expected.safetensors")
    stored = load_file(folder / "adapter" / "adapter_model.safetensors")
    # A parameter that several modules share has a name at each; the file has one of them.
    names = {}
    for k, p in fresh().named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(k)
    # One that is stored at each has its gradient at each.
    spelt = {k: sorted({on_disk(other) for other in all_of} & set(stored)) for all_of in names.values() for k in all_of}
    own = lambda gradients: {name: v for k, v in gradients.items() for name in spelt.get(k, [])}
    gradients = own(gradients)
    # What is stored and has no gradient is frozen: the random matrices that some methods share, and places, which are whole numbers.
    frozen = {k for k, v in stored.items() if not v.is_floating_point()} | {on_disk(k) for k, p in fresh().named_parameters() if not p.requires_grad} | {on_disk(k) for k, _ in fresh().named_buffers(remove_duplicate=False)}
    frozen |= {k for k in stored if k.endswith(tuple(drawn))} if drawn else set()
    assert {k: v.shape for k, v in stored.items() if k not in frozen} == {k: v.shape for k, v in gradients.items()}
    assert min(v.abs().max() for v in gradients.values()) > 1e-4, "a site without gradient"
    ref.save(gradients, folder / "gradients.safetensors")

    if packed:
        documents = [ref.document(n, model.config.vocab_size, seed + 50 + i) for i, n in enumerate((11, 21))]
        rows, packed_gradients = ref.run(fresh, documents)
        ref.save(rows, folder / "packed.safetensors")
        ref.save(own(packed_gradients), folder / "packed_gradients.safetensors")

    off = (expected["logits"] - expected["base_logits"]).abs().max().item()
    assert off > 0.1
    if site is None:
        print(f"{name}: {len(stored)} tensors, the adapter moves the logits by {off:.2f}, nothing merges")
        return
    merged = fresh().merge_and_unload()
    ref.save({f"{site}.weight": merged.get_submodule(site).weight}, folder / "merged.safetensors")
    merge = (ref.logits_of(merged, document.ids) - expected["logits"]).abs().max().item()
    print(f"{name}: {len(stored)} tensors, the adapter moves the logits by {off:.2f}, merged the same within {merge:.1e}")
    assert merge < 2e-5


def main(cases, write_case):
    """Writes the cases that the command line names, or all."""
    ref.deterministic()
    for name in sys.argv[1:] or cases:
        write_case(name)
