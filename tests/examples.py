"""Small datasets of examples: labelled texts, pairs with scores, questions about passages."""

import json
import random


def sentence(draw, words):
    return " ".join("".join(draw.choices("bcdefgh", k=draw.randint(1, 5))) for _ in range(words))


def write_labels(folder, counts=(60, 20, 20), longest=30):
    """Write texts of which the first word says the class, as JSON lines: train, valid and test."""
    draw = random.Random(1)
    for split, count in zip(("train", "valid", "test"), counts, strict=True):
        rows = []
        for _ in range(count):
            label = draw.choice(["bad", "good", "so-so"])
            rows.append({"sentence": f"{label[:2]} {sentence(draw, draw.randint(2, longest))} .", "label": label})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [f"corpus.{split}={folder}/{split}.jsonl" for split in ("train", "valid", "test")]


def write_scores(folder, counts=(60, 20, 20)):
    """Write pairs of texts with the share of words that they have in common, as TSV."""
    draw = random.Random(2)
    for split, count in zip(("train", "valid", "test"), counts, strict=True):
        lines = ["a\tb\tscore"]
        for _ in range(count):
            first, second = (sentence(draw, draw.randint(2, 12)).split() for _ in range(2))
            common = first[: draw.randint(0, len(first))]
            lines.append(f"{' '.join(first)}\t{' '.join(common + second)}\t{len(common) / len(first):.3f}")
        (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    columns = ["corpus.text=a", "corpus.text_pair=b", "corpus.label=score", "corpus.kind=scores"]
    return [*(f"corpus.{split}={folder}/{split}.tsv" for split in ("train", "valid", "test")), *columns]


def write_squad(folder, counts=(12, 4, 4)):
    """Write passages of some sentences, each with a question that is answered by a word of it and one that is not."""
    draw = random.Random(3)
    for split, count in zip(("train", "valid", "test"), counts, strict=True):
        paragraphs = []
        for number in range(count):
            context = " . ".join(sentence(draw, draw.randint(4, 9)) for _ in range(draw.randint(1, 5)))
            words = context.split()
            at = draw.randrange(len(words))
            begin = len(" ".join(words[:at])) + bool(at)
            answer = {"text": words[at], "answer_start": begin}
            asked = {"id": f"{split}-{number}-a", "question": f"what is {words[at - 1]} ?", "answers": [answer]}
            unasked = {"id": f"{split}-{number}-n", "question": "what is zzz ?", "answers": [], "is_impossible": True}
            paragraphs.append({"context": context, "qas": [asked | {"is_impossible": False}, unasked]})
        articles = [{"title": "made up", "paragraphs": paragraphs}]
        (folder / f"{split}.json").write_text(json.dumps({"version": "v2.0", "data": articles}))
    return [f"corpus.{split}={folder}/{split}.json" for split in ("train", "valid", "test")]
