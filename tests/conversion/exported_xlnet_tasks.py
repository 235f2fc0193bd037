"""Compute with transformers what exported folders of fine-tuned XLNets say of texts.

    python exported_xlnet_tasks.py CASES_DIR      has examples.json, {NAME: texts}, and NAME/folder of each; gets
                                                  NAME/output.safetensors and unexpected.json

test_xlnet_fine_tuned.py runs it with transformers 5, and imports it with transformers 4. It imports nothing of
txl_dist.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoTokenizer


@torch.no_grad()
def outputs_of(folder, texts):
    """Return the outputs, where answers can be, and the names of tensors that are missing or left over.

    texts: lists of one or two texts; of questions in the order in which the folder's notes say that they are given.
    """
    config = json.loads((folder / "config.json").read_text())
    kind = getattr(transformers, config["architectures"][0])
    model, report = kind.from_pretrained(folder, output_loading_info=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    columns = [list(column) for column in zip(*texts, strict=True)]
    encoded = tokenizer(*columns, padding=True, return_tensors="pt")
    given = dict(encoded)
    is_question = "QuestionAnswering" in kind.__name__
    if is_question:
        passage = 0 if config["txl_dist"]["objective"]["passage_first"] else 1
        impossible = torch.ones(encoded["input_ids"].shape)
        for row in range(len(texts)):
            impossible[row, [part == passage for part in encoded.sequence_ids(row)]] = 0
        impossible[:, -1] = 0
        if kind.__name__ == "XLNetForQuestionAnswering":
            given["p_mask"] = impossible
    output = model.eval()(**given)
    assert getattr(output, "mems", None) is None
    tensors = {name: value.contiguous() for name, value in output.items()}
    if is_question:
        tensors["impossible"] = impossible
    names = [name for key in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in report[key]]
    return tensors, sorted(map(str, names))


if __name__ == "__main__":
    torch.set_num_threads(1)
    assert transformers.__version__.startswith("5."), transformers.__version__
    cases = Path(sys.argv[1])
    unexpected = {}
    for name, texts in json.loads((cases / "examples.json").read_text()).items():
        outputs, unexpected[name] = outputs_of(cases / name / "folder", texts)
        save_file(outputs, cases / name / "output.safetensors")
    (cases / "unexpected.json").write_text(json.dumps(unexpected))
