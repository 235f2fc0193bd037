"""Reformers, made up: Hugging Face's folders, runs of ours; and hashing by the same rotations in both."""

import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import ReformerConfig as TheirConfig
from transformers import ReformerModelWithLMHead

from tests.conversion.xlnet_models import LINES
from txl_dist.checkpoint.format import CheckpointWriter
from txl_dist.data.tokenizers import SentencePieceTokenizer
from txl_dist.models import registry
from txl_dist.models.layers import hashed_attention

SEED = 5
LENGTH = 64
TOKENIZER = SentencePieceTokenizer.train(LINES, 300, "unigram")
VOCAB = TOKENIZER.vocab_size
SMALL = {"attn_layers": ["local", "lsh"], "hidden_size": 32, "num_attention_heads": 2, "attention_head_size": 8}
SMALL |= {"feed_forward_size": 40, "axial_pos_shape": [8, 8], "axial_pos_embds_dim": [12, 20], "num_buckets": 8}
SMALL |= {"max_position_embeddings": LENGTH, "lsh_attn_chunk_length": 8, "local_attn_chunk_length": 8}
SMALL |= {"num_hashes": 2, "vocab_size": VOCAB, "is_decoder": True}
NO_DROPOUT = dict.fromkeys(["hidden_dropout_prob", "local_attention_probs_dropout_prob"], 0.0)


def draw_weights(model):
    """Draw weights that are large enough for attention to choose."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, float("norm" in name and "weight" in name), 0.3)
    return model


def draw_tokens(vocab_size=VOCAB, lanes=2):
    return torch.randint(vocab_size, (lanes, LENGTH), generator=torch.Generator().manual_seed(1))


def hugging_face_model(kind=ReformerModelWithLMHead, **changes):
    return draw_weights(kind(TheirConfig(**SMALL | NO_DROPOUT | changes)))


def save_folder(model, folder, safe=True):
    """Save Hugging Face's folder, with a vocabulary."""
    model.save_pretrained(folder, safe_serialization=safe)
    (folder / "spiece.model").write_bytes(TOKENIZER.model)
    return folder


def save_run(run_dir, config, tokenizer):
    """Write the run directory of a model, as training does."""
    model = draw_weights(registry.build(config, tokenizer.vocab_size))
    writer = CheckpointWriter(str(run_dir), step=0, rank=0)
    writer.add("weights", {name: parameter.detach() for name, parameter in model.named_parameters()})
    state = {"step": 0, "tokens": 0, "imported": {"from": "", "title": ""}}
    values = {"model": asdict(config), "data": {"dir": None, "reset_memory": "never"}}
    writer.commit(writer.files, state, values, {"fingerprint": None, "vocab_size": tokenizer.vocab_size})
    shutil.rmtree(run_dir / "tokenizer", ignore_errors=True)
    tokenizer.save(Path(run_dir) / "tokenizer")
    return run_dir


def hash_as_transformers(monkeypatch):
    """Draw in every layer the rotations that Hugging Face's model has by hash_seed=SEED in float64."""

    def rotations(seed_of_layer, n_head, d_head, rounds, directions):
        torch.manual_seed(SEED)
        return torch.randn(n_head, d_head, rounds, directions, dtype=torch.float64)

    monkeypatch.setattr(hashed_attention, "draw_rotations", rotations)
