"""Run by test_exporting.py with transformers 5: write what exported folders compute there, on the text beside them.

    python exported.py CASE_DIR...      each has folder/, input.safetensors and texts.json, and gets output.safetensors
                                        and output.json

It imports nothing of txl_dist.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

torch.set_num_threads(1)
assert transformers.__version__.startswith("5."), transformers.__version__


def work_of_a_token(model, stream):
    """The rows that a layer's linear modules see when one more token is read, and the length of the cache then."""
    memory = model(stream).past_key_values
    rows = []
    hooks = [
        module.register_forward_hook(lambda module, args, out: rows.append(args[0].shape[-2]))
        for module in model.layers[0].modules()
        if isinstance(module, torch.nn.Linear)
    ]
    model(stream[:, :1], past_key_values=memory)
    for hook in hooks:
        hook.remove()
    return {"rows": rows, "kept": memory.layers[0].keys.size(2)}


@torch.no_grad()
def run(case):
    model = AutoModelForCausalLM.from_pretrained(case / "folder", trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(case / "folder", trust_remote_code=True)
    stream = load_file(case / "input.safetensors")["stream"]
    in_one_call = model(stream, labels=stream)
    memory = None
    pieces = []
    for piece in stream.split(model.config.tgt_len, dim=1):
        result = model(piece, past_key_values=memory)
        memory = result.past_key_values
        pieces.append(result.logits)
    prompt = stream[:1, : model.config.tgt_len]
    greedy = dict(do_sample=False, max_new_tokens=20, eos_token_id=None)
    short = stream[1:, : model.config.tgt_len - 2]
    padded = torch.cat([torch.zeros(len(short), 2, dtype=torch.int64), short], dim=1)
    mask = torch.ones_like(torch.cat([prompt, padded]))
    mask[1:, :2] = 0
    save_file(
        {
            "logits": in_one_call.logits,
            "loss": in_one_call.loss,
            "pieces": torch.cat(pieces, dim=1),
            "greedy": model.generate(prompt, **greedy),
            "uncached": model.generate(prompt, use_cache=False, **(greedy | {"max_new_tokens": 3})),
            "beams": model.generate(prompt, num_beams=3, **greedy),
            "short": model.generate(short, **greedy),
            "together": model.generate(torch.cat([prompt, padded]), attention_mask=mask, **greedy),
        },
        case / "output.safetensors",
    )
    texts = json.loads((case / "texts.json").read_text())
    ids = [tokenizer(text).input_ids for text in texts]
    facts = {
        "parameters": {name: list(value.shape) for name, value in model.named_parameters()},
        "work": work_of_a_token(model, stream),
        "ids": ids,
        "decoded": [tokenizer.decode(tokens[1:]) for tokens in ids],
        "vocabulary": [tokenizer.vocab_size, len(tokenizer)],
    }
    (case / "output.json").write_text(json.dumps(facts))
    model.save_pretrained(case / "again")
    tokenizer.save_pretrained(case / "again")


for argument in sys.argv[1:]:
    run(Path(argument))
