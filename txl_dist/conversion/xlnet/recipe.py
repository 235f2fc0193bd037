"""What XLNet checkpoints do not state: the values of the authors' recipe for their released models."""

from typing import Any

RECIPE: dict[str, Any] = {
    "name": "xlnet",
    "tgt_len": 512,
    "mem_len": 384,
    "reuse_len": 256,
    "clamp_len": -1,
    "dropout": 0.1,
    "dropatt": 0.1,
    "init_std": 0.02,
    "layer_norm_eps": 1e-12,
}

# What a user may know better than a checkpoint: Hugging Face's configs call the released models' activation "gelu",
# which there is erf's, but the models were trained with the other.
ALSO_ACCEPTED = ("activation",)

# What a fine-tuned model's config does not state of how passages and questions were read (the authors' run_squad.py).
QUESTIONS: dict[str, Any] = {
    "passage_first": True,
    "doc_stride": 128,
    "max_question_tokens": 64,
    "max_answer_tokens": 64,
}

# What an exported folder keeps, in a section of its own, because Hugging Face's config has no such key or means another
# thing: there reuse_len cuts the memory of every call, and one dropout is that of all.
OWN_KEYS = ("tgt_len", "mem_len", "reuse_len", "dropatt")
