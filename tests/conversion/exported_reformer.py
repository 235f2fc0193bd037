"""Run by test_reformer_exporting.py with transformers 5: write what exported Reformers compute there.

    python exported_reformer.py CASE_DIR...      each has folder/, input.safetensors and texts.json; gets
                                                 output.safetensors, output.json and again/

It imports nothing of txl_dist.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, ReformerModelWithLMHead

torch.set_num_threads(1)
assert transformers.__version__.startswith("5."), transformers.__version__
SEED = 5


@torch.no_grad()
def run(case):
    folder = case / "folder"
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(model) is ReformerModelWithLMHead
    model.save_pretrained(case / "again")
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    tokenizer.save_pretrained(case / "again")
    tokens = load_file(case / "input.safetensors")["tokens"]
    model = AutoModelForCausalLM.from_pretrained(folder, hash_seed=SEED).double().eval()
    as_loaded = model(tokens).logits
    model.lm_head.decoder.bias = model.lm_head.bias
    save_file({"as_loaded": as_loaded, "logits": model(tokens).logits}, case / "output.safetensors")
    texts = json.loads((case / "texts.json").read_text())
    ids = [tokenizer(text).input_ids for text in texts]
    generated = model.generate(tokens[:1, :20], max_new_tokens=3, do_sample=False, eos_token_id=None)
    facts = {
        "ids": ids,
        "decoded": [tokenizer.decode(tokens[1:]) for tokens in ids],
        "generated": generated.size(1) - 20,
        "ends": [values.eos_token_id for values in (model.config, model.generation_config)],
        "unexpected": sorted(
            map(str, [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]])
        ),
    }
    (case / "output.json").write_text(json.dumps(facts))


for argument in sys.argv[1:]:
    run(Path(argument))
