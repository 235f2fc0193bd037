"""Export XLNet to a folder that transformers' own classes load: of versions 4 and 5, without any code in it."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from txl_dist.checkpoint.format import save_tensors
from txl_dist.config.schema import TaskConfig
from txl_dist.conversion import activations
from txl_dist.conversion.exported_folder import Exporter, write_json
from txl_dist.conversion.xlnet import fine_tuned, vocabulary
from txl_dist.conversion.xlnet.recipe import OWN_KEYS
from txl_dist.conversion.xlnet.tokenizer_json import SPECIAL_TOKENS, tokenizer_json
from txl_dist.conversion.xlnet.weights import task_head_names, to_hugging_face
from txl_dist.data.format import Examples
from txl_dist.data.tokenizers import Tokenizer, XLNetTokenizer
from txl_dist.models.xlnet import XLNetConfig


class XLNetExporter(Exporter):
    """Writes config.json, the weights, spiece.model and the same vocabulary as tokenizer.json."""

    config: XLNetConfig
    readers = "transformers 4 and 5"
    loader = "AutoModelForCausalLM.from_pretrained({})"

    def problems(self) -> Iterator[str]:
        """Yield what Hugging Face's classes do not have."""
        config = self.config
        if config.n_head * config.d_head != config.d_model:
            yield (
                f"model.d_head={config.d_head}: Hugging Face's XLNet has heads of model.d_model / model.n_head = "
                f"{config.d_model} / {config.n_head}; such a model cannot be exported"
            )
        if not isinstance(self.tokenizer, XLNetTokenizer):
            yield (
                f"tokenizer.name={self.tokenizer.kind}: Hugging Face's XLNet has tokenizers of the kind xlnet only; "
                "such a model cannot be exported"
            )

    def write(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Write all files into an empty folder."""
        assert isinstance(self.tokenizer, XLNetTokenizer)
        save_tensors(self.tensors(weights), folder / "model.safetensors")
        write_json(folder / "config.json", self.hub_config())
        (folder / vocabulary.FILE).write_bytes(self.tokenizer.model)
        write_json(folder / "tokenizer.json", tokenizer_json(self.tokenizer.model, self.tokenizer.lower))
        write_json(folder / "tokenizer_config.json", tokenizer_config(self.tokenizer.lower))

    def tensors(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return Hugging Face's tensors."""
        return to_hugging_face(weights, self.config)

    def hub_config(self) -> dict[str, Any]:
        """Return the content of config.json."""
        assert isinstance(self.tokenizer, XLNetTokenizer)
        return hub_config(self.config, self.vocab_size, self.tokenizer.specials)


class XLNetTaskExporter(XLNetExporter):
    """Writes the folder of a model that has learnt a task, for the class of transformers that has such a head.

    Args:
        objective: what it has learnt.
        examples: on what.
    """

    def __init__(
        self, config: XLNetConfig, tokenizer: Tokenizer, vocab_size: int, objective: TaskConfig, examples: Examples
    ):
        super().__init__(config, tokenizer, vocab_size)
        self.objective = objective
        self.examples = examples
        self.hub_class = fine_tuned.class_of(objective)
        self.loader = f"{self.hub_class}.from_pretrained({{}})"

    def notes(self) -> Iterator[str]:
        """Yield how examples are given, and what is not as here in transformers."""
        yield from fine_tuned.reading_notes(self.objective, self.examples, self.config.tgt_len)

    def tensors(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return Hugging Face's tensors, with those of the head."""
        head = {theirs: weights[ours] for ours, theirs in task_head_names(self.hub_class, weights).items()}
        return super().tensors(weights) | head

    def hub_config(self) -> dict[str, Any]:
        """Return the content of config.json, with what was learnt."""
        values = super().hub_config()
        own = {"objective": asdict(self.objective), "pairs": self.examples.pairs, "notes": list(self.notes())}
        task = fine_tuned.task_keys(self.objective, self.examples, self.config.dropout)
        return values | task | {"txl_dist": values["txl_dist"] | own}


def hub_config(config: XLNetConfig, vocab_size: int, specials: dict[str, int]) -> dict[str, Any]:
    """Return the content of config.json: Hugging Face's keys, and in a section `txl_dist` what those cannot say."""
    same = ("n_layer", "d_model", "n_head", "d_head", "d_inner", "dropout", "clamp_len", "layer_norm_eps")
    return {key: getattr(config, key) for key in same} | {
        "model_type": "xlnet",
        "architectures": ["XLNetLMHeadModel"],
        "vocab_size": vocab_size,
        "ff_activation": activations.THEIRS[config.activation],
        "initializer_range": config.init_std,
        "mem_len": config.mem_len or None,
        "reuse_len": None,  # a memory of all that a call reads; with a number, of the first tokens of every call
        "use_mems_eval": config.mem_len > 0,
        "attn_type": "bi",
        "bi_data": False,
        "same_length": False,
        "untie_r": True,
        "pad_token_id": specials["<pad>"],
        "bos_token_id": specials["<s>"],
        "eos_token_id": specials["</s>"],
        "torch_dtype": "float32",
        "txl_dist": {key: getattr(config, key) for key in OWN_KEYS},
    }


def tokenizer_config(lower: bool) -> dict[str, Any]:
    """Return the content of tokenizer_config.json."""
    return SPECIAL_TOKENS | {
        "tokenizer_class": "XLNetTokenizer",
        "additional_special_tokens": ["<eop>", "<eod>"],
        "do_lower_case": lower,
        "keep_accents": False,
        "remove_space": True,
        "padding_side": "left",
        "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],  # transformers 5 leaves segments out
        "clean_up_tokenization_spaces": False,
    }
