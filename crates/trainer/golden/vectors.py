"""Writes the golden files of tunes of vectors, by sentence-transformers on models of PEFT. See README.md for names; pins in
benches/peers/requirements.txt.

Usage: vectors.py [case ...]
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[2] / "benches" / "peers"))
sys.path.insert(0, str(HERE.parents[1] / "adapt" / "golden"))

import peft  # noqa: E402
import torch  # noqa: E402
from sentence_transformers import SentenceTransformer  # noqa: E402
from sentence_transformers.sentence_transformer import losses as losses_of  # noqa: E402
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402

import reference as ref  # noqa: E402
from classes import LR, STEPS, moved, tokenizer, tuned  # noqa: E402
from writing import save_adapter  # noqa: E402

ROWS = 8
# name: (model in crates/models/golden, pooling, whether rows see all others, linears with LoRA, loss, seed)
CASES = {
    "bert_vectors": ("bert", "mean", False, ["query", "value"], "plain", 4),
    "llama_vectors": ("llama", "lasttoken", False, ["q_proj", "v_proj"], "matryoshka", 5),
    "llama_vectors_bidirectional": ("llama", "mean", True, ["q_proj", "down_proj"], "symmetric", 6),
}


def rows(g, negatives):
    """A word of a query says which word what belongs to it has; its negative has a word beside that."""
    made = []
    for row in range(ROWS):
        words = lambda n: [f"w{i}" for i in torch.randint(20, 40, (n,), generator=g).tolist()]  # noqa: E731
        text = lambda key, n: " ".join([f"w{key}", *words(n)])  # noqa: E731
        made.append({"query": text(4 + row, 3 + row % 3), "positive": text(12 + row, 5 - row % 3)})
        if negatives:
            made[-1]["negative"] = text(12 + (row + 1) % ROWS, 4)
    return made


def opened(base, pooling, bidirectional, config):
    """The model with its tokenizer, as sentence-transformers has it, around a model of PEFT's."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ref.MODELS / base, folder, dirs_exist_ok=True)
        ref.save_json(tokenizer(base == "bert"), Path(folder) / "tokenizer.json")
        read = PreTrainedTokenizerFast(tokenizer_file=str(Path(folder) / "tokenizer.json"), pad_token="w0", padding_side="right")
        read.save_pretrained(folder)
        if bidirectional:
            said = json.loads((Path(folder) / "config.json").read_text())
            ref.save_json(said | {"is_causal": False}, Path(folder) / "config.json")
        transformer = Transformer(folder, model_kwargs={"dtype": torch.float32, "attn_implementation": "eager"})
    transformer.model = peft.get_peft_model(transformer.model, config)
    width = transformer.model.config.hidden_size
    return SentenceTransformer(modules=[transformer, Pooling(width, pooling)], device="cpu"), transformer.model


def write(name):
    base, pooling, bidirectional, targets, kind, seed = CASES[name]
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    g = ref.generator(seed)
    made = rows(g, kind != "symmetric")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    ref.save_json(tokenizer(base == "bert"), folder / "tokenizer.json")
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=targets, task_type="FEATURE_EXTRACTION")
    model, inner = opened(base, pooling, bidirectional, config)
    model.eval()
    parameters = moved(inner, g)
    save_adapter(inner, base, folder / "before")
    if kind == "symmetric":
        both = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
        loss_of, objective = losses_of.MultipleNegativesRankingLoss(model, scale=4.0, **both), {"temperature": 0.25, "symmetric": True}
    else:
        loss_of, objective = losses_of.MultipleNegativesRankingLoss(model, scale=4.0), {"temperature": 0.25}
    if kind == "matryoshka":
        dims, weights = [32, 12], [1, 0.3]
        loss_of = losses_of.MatryoshkaLoss(model, loss_of, dims, weights)
        objective |= {"dims": dims, "weights": weights}
    texts = [[row[column] for row in made] for column in made[0]]

    def loss():
        return loss_of([dict(model.preprocess(column)) for column in texts], None)

    def found():
        """The share of queries whose most similar passage belongs to them."""
        with torch.no_grad():
            queries, *passages = (model(dict(model.preprocess(column)))["sentence_embedding"] for column in texts)
        norm = lambda x: torch.nn.functional.normalize(x, dim=-1)  # noqa: E731
        nearest = (norm(queries) @ norm(torch.cat(passages)).T).argmax(-1)
        return (nearest == torch.arange(ROWS)).float().mean().item()

    ends = [(loss().item(), found())]
    losses = tuned(parameters, loss)
    ends.append((loss().item(), found()))
    save_adapter(inner, base, folder / "after")
    with torch.no_grad():
        vectors = model(dict(model.preprocess(texts[0])))["sentence_embedding"]
    lengths = [int(sum(mask)) for column in texts for mask in model.preprocess(column)["attention_mask"]]
    ref.save_json({
        "length": max(lengths), "tokens": sum(lengths), "base": base, "pooling": {"lasttoken": "last"}.get(pooling, pooling), "bidirectional": bidirectional, "objective": objective,
        "steps": STEPS, "lr": LR, "losses": losses,
        "before": ends[0], "after": ends[1], "vectors": vectors.tolist(),
    }, folder / "expected.json")
    print(f"{name}: loss {losses[0]:.3f} -> {ends[1][0]:.3f}, found {ends[0][1]:.2f} -> {ends[1][1]:.2f}")
    assert ends[1][0] < 0.9 * losses[0]


def main():
    ref.deterministic()
    for name in sys.argv[1:] or CASES:
        write(name)


if __name__ == "__main__":
    main()
