"""Run by test_xlnet_exporting.py with transformers 5: write what an exported XLNet folder computes there.

    python exported_xlnet.py CASE_DIR      has folder/, input.safetensors and texts.json; gets output.safetensors,
                                           output.json and again/

It imports nothing of txl_dist.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, XLNetLMHeadModel

torch.set_num_threads(1)
assert transformers.__version__.startswith("5."), transformers.__version__

case = Path(sys.argv[1])
model, report = AutoModelForCausalLM.from_pretrained(case / "folder", output_loading_info=True)
assert type(model) is XLNetLMHeadModel
tokenizer = AutoTokenizer.from_pretrained(case / "folder")
arguments = load_file(case / "input.safetensors")
with torch.no_grad():
    logits = model.eval()(**arguments).logits
save_file({"logits": logits}, case / "output.safetensors")
texts = json.loads((case / "texts.json").read_text())
facts = {
    "class": type(tokenizer).__name__,
    "ids": [tokenizer(text, add_special_tokens=False).input_ids for text in texts],
    "pair": [tokenizer("one", "two")[key] for key in ("input_ids", "token_type_ids")],
    "specials": {
        name: tokenizer.convert_tokens_to_ids(name) for name in ("<sep>", "<cls>", "<eod>", "<eop>", "<mask>")
    },
    "decoded": tokenizer.decode(tokenizer("one two", add_special_tokens=False).input_ids),
    "unexpected": sorted(map(str, [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]])),
}
(case / "output.json").write_text(json.dumps(facts))
model.save_pretrained(case / "again")
tokenizer.save_pretrained(case / "again")
