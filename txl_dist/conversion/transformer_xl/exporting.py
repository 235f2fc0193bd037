"""Export Transformer-XL to a folder that transformers 5 loads with trust_remote_code=True, its code included."""

import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from txl_dist.checkpoint.format import save_tensors
from txl_dist.conversion.exported_folder import (
    HUB,
    Exporter,
    generation_config,
    tokenizers_without_code,
    write_json,
    write_tokenizer_with_code,
)
from txl_dist.models.transformer_xl import TransformerXLConfig


class TransformerXLExporter(Exporter):
    """Writes config.json, the weights, the tokenizer, and the code of both."""

    config: TransformerXLConfig
    readers = "transformers 5"
    loader = "AutoModelForCausalLM.from_pretrained({}, trust_remote_code=True)"

    def problems(self) -> Iterator[str]:
        """Yield what the exported code does not have."""
        if self.config.attention != "relative":
            yield f"model.attention={self.config.attention}: a folder is exported with relative attention only"
        if self.config.mem_len == 0:
            yield "model.mem_len=0: a folder generates with memory; give model.mem_len=..."
        yield from tokenizers_without_code(self.tokenizer)

    def write(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Write all files into an empty folder."""
        save_tensors(weights, folder / "model.safetensors")
        write_json(folder / "config.json", hub_config(self.config, self.vocab_size))
        write_json(folder / "generation_config.json", generation_config(self.tokenizer))
        for name in ("configuration_transformer_xl.py", "modeling_transformer_xl.py"):
            shutil.copyfile(HUB / name, folder / name)
        write_tokenizer_with_code(folder, self.tokenizer)


def hub_config(config: TransformerXLConfig, vocab_size: int) -> dict[str, Any]:
    """Return the content of config.json: our hyper-parameters, and where transformers finds the model's code."""
    values = asdict(config) | {"vocab_size": vocab_size, "dtype": "float32", "model_type": "txl_dist"}
    del values["name"]
    return values | {
        "architectures": ["TransformerXLForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_transformer_xl.TransformerXLConfig",
            "AutoModelForCausalLM": "modeling_transformer_xl.TransformerXLForCausalLM",
        },
    }
