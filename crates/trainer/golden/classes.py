"""Writes the golden files of tunes of heads over classes, by PEFT with modules that it saves whole. See README.md for names; pins in
benches/peers/requirements.txt.

Usage: classes.py [case ...]
"""

import json
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[2] / "benches" / "peers"))
sys.path.insert(0, str(HERE.parents[1] / "adapt" / "golden"))

import peft  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, PreTrainedTokenizerFast  # noqa: E402
from transformers import get_cosine_schedule_with_warmup  # noqa: E402

import reference as ref  # noqa: E402
from writing import save_adapter  # noqa: E402

STEPS = 12
ROWS = 12
LR = 0.01
# name: (what has a class, linears with LoRA, modules that are saved, seed)
CASES = {
    "bert_sequence": (AutoModelForSequenceClassification, ["query", "value"], ["bert.pooler.dense", "classifier"], 1),
    "bert_tokens": (AutoModelForTokenClassification, ["query", "value"], ["classifier"], 2),
    "llama_sequence": (AutoModelForSequenceClassification, ["q_proj", "v_proj"], ["score"], 3),
}


def tokenizer(is_bert):
    """Each word is a token, between two others in encoders and after one in decoders."""
    cls, sep, bos = ["w2", 2], ["w3", 3], {"SpecialToken": {"id": "w1", "type_id": 0}}
    first, second = ({"Sequence": {"id": which, "type_id": kind}} for which, kind in (("A", 0), ("B", 1)))
    around = {"type": "BertProcessing", "sep": sep, "cls": cls} if is_bert else {
        "type": "TemplateProcessing", "single": [bos, first], "pair": [bos, first, second],
        "special_tokens": {"w1": {"id": "w1", "ids": [1], "tokens": ["w1"]}},
    }
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": around, "decoder": None,
        "model": {"type": "WordLevel", "vocab": {f"w{i}": i for i in range(40)}, "unk_token": "w0"},
    }


def rows(name, classes, g):
    """Rows of one length, of which classes can be told by their words."""
    made = []
    for row in range(ROWS):
        words = [f"w{i}" for i in torch.randint(4, 40, (9,), generator=g).tolist()]
        if name == "bert_tokens":
            made.append({"tokens": words, "tags": [f"c{int(word[1:]) % classes}" for word in words]})
        else:
            label = row % classes
            words[2] = f"w{4 + label}"
            made.append({"text": " ".join(words[:6]), "text_pair": " ".join(words[6:]), "label": f"c{label}"})
    return made


def encoded(row, read):
    """Tokens, their types and labels as `transformers` has them: of words the first token has the label."""
    if "tokens" in row:
        read_row = read(row["tokens"], is_split_into_words=True, return_token_type_ids=True)
        words = read_row.word_ids()
        firsts = [i for i, word in enumerate(words) if word is not None and word not in words[:i]]
        labels = torch.full((len(words),), ref.IGNORED)
        labels[firsts] = torch.tensor([int(row["tags"][words[i]][1:]) for i in firsts])
        return read_row, labels
    return read(row["text"], row["text_pair"], return_token_type_ids=True), torch.tensor([int(row["label"][1:])])


def moved(model, g):
    """What trains of a model, no longer at its start."""
    trained = sorted((n, p) for n, p in model.named_parameters() if p.requires_grad)
    with torch.no_grad():
        for _, p in trained:
            p.add_(torch.randn(p.shape, generator=g) * 0.05)
    return [p for p in model.parameters() if p.requires_grad]


def tuned(parameters, loss_of):
    """The loss before each step of a tune."""
    optimiser = torch.optim.AdamW(parameters, lr=LR, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, foreach=False)
    schedule = get_cosine_schedule_with_warmup(optimiser, 0, STEPS)
    losses = []
    for _ in range(STEPS):
        loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    return losses


def write(name):
    kind, targets, saved, seed = CASES[name]
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    base = kind.from_pretrained(ref.MODELS / name, dtype=torch.float32, attn_implementation="eager")
    is_bert = base.config.model_type == "bert"
    ref.save_json(tokenizer(is_bert), folder / "tokenizer.json")
    read = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    g = ref.generator(seed)
    made = rows(name, base.config.num_labels, g)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    task = "TOKEN_CLS" if name == "bert_tokens" else "SEQ_CLS"
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=targets, modules_to_save=saved, task_type=task)
    torch.manual_seed(seed)
    model = peft.get_peft_model(base, config).eval()
    parameters = moved(model, g)
    save_adapter(model, name, folder / "before")

    def measured():
        """The mean loss of a label, and how many are found."""
        sums, right, count = [], 0, 0
        for row in made:
            given, labels = encoded(row, read)
            inputs = {"input_ids": torch.tensor([given["input_ids"]])}
            if is_bert:
                inputs["token_type_ids"] = torch.tensor([given["token_type_ids"]])
            logits = model(**inputs).logits.reshape(-1, base.config.num_labels)
            sums.append(F.cross_entropy(logits, labels, ignore_index=ref.IGNORED, reduction="sum"))
            labelled = labels != ref.IGNORED
            right += int((logits.argmax(-1) == labels)[labelled].sum())
            count += int(labelled.sum())
        return torch.stack(sums).sum() / count, right / count

    first = measured()
    losses = tuned(parameters, lambda: measured()[0])
    after = measured()
    save_adapter(model, name, folder / "after")
    length = len(encoded(made[0], read)[0]["input_ids"])
    assert all(len(encoded(row, read)[0]["input_ids"]) == length for row in made)
    ref.save_json({
        "length": length, "steps": STEPS, "lr": LR, "losses": losses, "before": [first[0].item(), first[1]],
        "after": [after[0].item(), after[1]], "labels": [f"c{i}" for i in range(base.config.num_labels)],
    }, folder / "expected.json")
    print(f"{name}: loss {losses[0]:.3f} -> {after[0].item():.3f}, found {first[1]:.2f} -> {after[1]:.2f}")
    assert after[0].item() < 0.9 * losses[0]


def main():
    ref.deterministic()
    for name in sys.argv[1:] or CASES:
        write(name)


if __name__ == "__main__":
    main()
