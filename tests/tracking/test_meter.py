"""Model FLOPs utilisation as a run reports it."""

import pytest
from omegaconf import OmegaConf

from txl_dist.data.index import Index
from txl_dist.models import registry
from txl_dist.models.transformer_xl import TransformerXLConfig

STAGES = ["engine.pipeline_stages=2", "engine.gradient_accumulation=2"]


@pytest.mark.parametrize(
    "processes, options",
    [
        (None, []),
        pytest.param(2, [], marks=pytest.mark.distributed),
        pytest.param(2, [*STAGES, "engine.activation_checkpointing=true"], marks=pytest.mark.distributed),
    ],
)
def test_mfu_is_the_share_of_all_devices_peak(run, small, metrics, dataset, tmp_path, processes, options):
    """The model's operations are the same however it is split; two devices have twice the peak of one."""
    command = [*small, *options, f"run.dir={tmp_path}", "train.stop_at=3", "engine.peak_tflops=0.002"]
    printed = run("txl_dist.train", *command, processes=processes).stdout
    model = TransformerXLConfig(**OmegaConf.to_container(OmegaConf.load(tmp_path / "config.yaml").model))
    built = registry.build(model, Index.open(str(dataset)).vocab_size)
    flops_per_token = built.training_flops(lanes=8, targets=16) / (8 * 16)
    lines = [line for line in metrics(tmp_path) if "train/tokens_per_second" in line]
    assert len(lines) == 3
    for line in lines:
        expected = line["train/tokens_per_second"] * flops_per_token / ((processes or 1) * 0.002e12)
        assert line["train/mfu"] == pytest.approx(expected, rel=1e-12)
        assert f"tokens/s  MFU {line['train/mfu']:.1%}" in printed


def test_an_unknown_peak_gives_no_mfu(run, small, metrics, tmp_path):
    """A CPU has none in the table."""
    run("txl_dist.train", *small, f"run.dir={tmp_path}", "train.stop_at=2", CUDA_VISIBLE_DEVICES="")
    lines = metrics(tmp_path)
    assert len(lines) == 2 and all("train/tokens_per_second" in line and "train/mfu" not in line for line in lines)
