"""A small dataset whose tokens the tests know."""

from pathlib import Path

import numpy as np

from txl_dist.data.preparing import shards
from txl_dist.data.preparing.shards import SplitWriter
from txl_dist.data.text_size import TextSize
from txl_dist.data.tokenizers import BytesTokenizer

SAMPLE_TOKENS = 16
SHARD_SAMPLES = 3


def write(folder: Path, documents: dict[str, list[np.ndarray]], step: int = 7) -> Path:
    """Write a dataset of these documents [n] of each split, which go in `step` tokens at a time."""
    tokenizer = BytesTokenizer()
    tokenizer.save(folder / "tokenizer")
    splits = {}
    for split, split_documents in documents.items():
        writer = SplitWriter(folder, split, tokenizer.dtype, SAMPLE_TOKENS, SHARD_SAMPLES)
        for document in split_documents:
            for start in range(0, len(document), step):
                tokens = document[start : start + step]
                writer.add(tokens, [0] if start == 0 else [], TextSize(len(tokens), None, None))
        splits[split] = writer.close()
    shards.write_index(folder, {"fingerprint": "of a test"}, tokenizer, SAMPLE_TOKENS, SHARD_SAMPLES, splits)
    return folder


def random_documents(lengths: list[int], seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, length).astype("<u2") for length in lengths]


TRAIN = random_documents([20, 1, 1, 58, 16, 12, 100, 5])  # 213 tokens: 14 samples in 5 shards
VALID = random_documents([48], seed=1)  # fills samples and shard exactly
STREAM = np.concatenate(TRAIN)
