"""Export the Reformer to a folder that transformers' own classes load: of versions 4 and 5."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from txl_dist.checkpoint.format import save_tensors
from txl_dist.conversion import activations
from txl_dist.conversion.exported_folder import (
    Exporter,
    generation_config,
    tokenizers_without_code,
    write_json,
    write_tokenizer_with_code,
)
from txl_dist.conversion.reformer.keys import OWN, THEIRS
from txl_dist.conversion.reformer.weights import to_hugging_face
from txl_dist.models.reformer import ReformerConfig

FORGOTTEN_BIASES = (
    "transformers 5 (as of 5.20.2) leaves out the biases of the softmax; after loading: "
    "model.lm_head.decoder.bias = model.lm_head.bias"
)
AS_PUBLISHED = (
    "transformers hashes as published, but this model is lsh=strict: it computes other numbers there, which depend on "
    "later tokens, too"
)
MORE_AXES = "transformers 5 (as of 5.20.2) evaluates positions of two axes only; transformers 4 evaluates these"


class ReformerExporter(Exporter):
    """Writes config.json, the weights, and the tokenizer with its code; the model needs none."""

    config: ReformerConfig
    readers = "transformers 4 and 5"
    loader = "AutoModelForCausalLM.from_pretrained({})"

    def problems(self) -> Iterator[str]:
        """Yield what Hugging Face's classes do not have."""
        yield from tokenizers_without_code(self.tokenizer)

    def notes(self) -> Iterator[str]:
        """Yield what is not as here in transformers."""
        if self.config.lsh == "strict" and "lsh" in self.config.kinds:
            yield AS_PUBLISHED
        if len(self.config.axial_shape) > 2:
            yield MORE_AXES
        yield FORGOTTEN_BIASES

    def write(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Write all files into an empty folder."""
        save_tensors(to_hugging_face(weights, self.config), folder / "model.safetensors")
        ends = generation_config(self.tokenizer)
        write_json(folder / "config.json", hub_config(self.config, self.vocab_size, ends, list(self.notes())))
        write_json(folder / "generation_config.json", ends)
        write_tokenizer_with_code(folder, self.tokenizer)


def hub_config(config: ReformerConfig, vocab_size: int, ends: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """Return the content of config.json: Hugging Face's keys, and in a section `txl_dist` what those cannot say.

    Args:
        ends: the tokens at which generation begins and ends.
        notes: what is not as here in transformers.
    """
    values = {theirs: getattr(config, ours) for ours, theirs in THEIRS.items()}
    is_axial = len(config.axial_shape) > 1
    if is_axial:
        values |= {"axial_pos_shape": config.axial_shape, "axial_pos_embds_dim": config.axial_widths}
    factors = config.n_buckets
    return values | {
        "model_type": "reformer",
        "architectures": ["ReformerModelWithLMHead"],
        "is_decoder": True,
        "vocab_size": vocab_size,
        "attn_layers": config.kinds,
        "axial_pos_embds": is_axial,
        "max_position_embeddings": config.max_len,
        "num_buckets": factors[0] if len(factors) == 1 else factors,
        "chunk_size_feed_forward": 0,
        "local_num_chunks_after": 0,
        "lsh_num_chunks_after": 0,
        "hidden_act": activations.THEIRS[config.activation],
        "hash_seed": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "eos_token_id": None,
        **ends,
        "txl_dist": {key: getattr(config, key) for key in OWN} | {"notes": notes},
    }
