"""A run as a user sees it: its directory, its metrics, a second start, a mistake."""

import json
import math
import shutil
from statistics import fmean

import numpy as np
import pytest
import torch

from tests.batches import batch
from tests.conftest import without_torchrun
from txl_dist.checkpoint.format import latest
from txl_dist.data.index import Index
from txl_dist.data.lanes import LanePlan
from txl_dist.data.samples import SampleReader
from txl_dist.data.segments import Segments
from txl_dist.objectives.causal_lm import CausalLM
from txl_dist.runs.load import load_model


@pytest.fixture(scope="module")
def trained_run(run, small, tmp_path_factory):
    """A finished run of 20 steps, and what the command printed."""
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    return run_dir, run("txl_dist.train", *small, f"run.dir={run_dir}").stdout


def test_metrics_have_their_keys_and_agree_with_each_other(trained_run, metrics, dataset):
    lines = metrics(trained_run[0])
    steps = [line for line in lines if "train/loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 21))
    assert all(line["tokens"] == line["step"] * 8 * 16 for line in lines)
    for key in ("train/lr", "train/grad_norm", "train/tokens_per_second", "train/data_wait", "train/checkpoint_wait"):
        assert all(math.isfinite(line[key]) and line[key] >= 0 for line in steps), key
    assert steps[-1]["train/loss"] < steps[0]["train/loss"] - 1  # it learns
    assert [line["step"] for line in lines if "valid/loss" in line] == [10, 20]
    split = json.loads((dataset / "index.json").read_text())["splits"]["test"]
    last = lines[-1]
    assert last["test/perplexity"] == pytest.approx(math.exp(last["test/loss"]))
    bits = last["test/loss"] / math.log(2) * split["tokens"] / split["bytes"]
    assert last["test/bits_per_byte"] == pytest.approx(bits)


def test_the_run_directory_stands_alone(trained_run):
    run_dir, printed = trained_run
    assert (run_dir / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert "num_lanes: 8" in (run_dir / "config.yaml").read_text()
    assert (run_dir / "tokenizer" / "tokenizer.json").is_file()
    assert not [path for path in run_dir.rglob("*") if "partial" in path.name]
    for words in ("test bits per byte", str(run_dir / "curve.png"), f"txl_dist.evaluate run={run_dir}"):
        assert words in printed


def test_a_start_shorter_than_log_every_is_logged(run, small, metrics, tmp_path):
    done = run("txl_dist.train", *small, f"run.dir={tmp_path}", "train.stop_at=2", "tracking.log_every=10")
    assert [line["step"] for line in metrics(tmp_path)] == [2] and "2 of 20" in done.stdout


def test_the_result_of_a_finished_run_is_only_shown_again(trained_run, run, small, metrics):
    run_dir, printed = trained_run
    before = metrics(run_dir)
    again = run("txl_dist.train", *small, f"run.dir={run_dir}").stdout
    assert metrics(run_dir) == before
    assert "step" not in again.split("test bits per byte")[0]  # no step was trained
    assert again.split("test bits per byte")[1] == printed.split("test bits per byte")[1]


@pytest.mark.parametrize("end", ["train.max_steps=19", "train.stop_at=3"])
def test_a_run_beyond_its_end_is_left_alone(trained_run, run, small, tmp_path, end):
    shutil.copytree(trained_run[0], tmp_path / "run")
    before = (tmp_path / "run/config.yaml").read_bytes()
    more = ["train.max_steps=40"] if "stop" in end else ["schedule.warmup_steps=0"]
    done = run("txl_dist.train", *small, f"run.dir={tmp_path / 'run'}", *more, end)
    assert done.stdout == f"{tmp_path / 'run'}: is at step 20, beyond {end}; nothing to do\n"
    assert (tmp_path / "run/config.yaml").read_bytes() == before


def test_a_finished_run_is_resumed_where_more_steps_are_asked_for(trained_run, run, small, metrics, tmp_path):
    shutil.copytree(trained_run[0], tmp_path / "run")
    run("txl_dist.train", *small, f"run.dir={tmp_path / 'run'}", "train.max_steps=23")
    before = metrics(trained_run[0])
    after = metrics(tmp_path / "run")
    assert after[: len(before)] == before
    assert [line["step"] for line in after[len(before) :]] == [21, 22, 23, 23]


def test_a_run_that_was_killed_resumes_from_its_checkpoint(trained_run, run, small, metrics, tmp_path):
    """Killed after step 13 while a checkpoint was being written: steps 11 to 13 are done again, and logged once."""
    finished = trained_run[0]
    killed = tmp_path / "run"
    shutil.copytree(finished, killed)
    shutil.rmtree(killed / "checkpoints/step-000000020")
    half_written = killed / "checkpoints/.step-000000020.partial"
    half_written.mkdir()
    (half_written / "weights-00000.safetensors").write_bytes(b"half")
    lines = (killed / "metrics.jsonl").read_text().splitlines(keepends=True)
    (killed / "metrics.jsonl").write_text("".join(lines[:13]) + lines[13][:20])
    run("txl_dist.train", *small, f"run.dir={killed}")
    for key in ("step", "train/loss", "valid/loss", "test/loss"):
        logged = [[line[key] for line in metrics(run_dir) if key in line] for run_dir in (finished, killed)]
        assert logged[0] == logged[1], key
    one, two = (latest(run_dir).tensors("weights") for run_dir in (finished, killed))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_a_run_is_not_continued_as_another(trained_run, run, small):
    done = run("txl_dist.train", *small, f"run.dir={trained_run[0]}", "data.num_lanes=4", "model.n_layer=3", expect=2)
    assert "data.num_lanes=4" in done.stderr and "model.n_layer=3" in done.stderr and "Traceback" not in done.stderr


def test_other_lanes_are_refused_with_the_choices(trained_run, run, small):
    done = run("txl_dist.train", *small, f"run.dir={trained_run[0]}", "model.tgt_len=8", "model.mem_len=8", expect=2)
    for words in (
        "model.tgt_len=8",
        "model.mem_len=8",
        "started with 16",
        "run.on_lane_change=reset_memory",
        "run.dir",
    ):
        assert words in done.stderr, words


def test_other_lanes_start_at_the_same_share_of_the_epoch(run, small, metrics, dataset, tmp_path):
    """10 steps of 8 lanes x 16, then 4 lanes x 24: position and history are found in the losses of fresh weights.

    With a learning rate of (almost) nothing a loss shows which tokens were read, and with which memory.
    """
    still = [*small, "optimizer.lr=1e-30", "train.eval_every=1000"]
    lanes = ["data.num_lanes=4", "model.tgt_len=24", "model.mem_len=30", "run.on_lane_change=reset_memory"]
    changed, parts, fresh = (tmp_path / name for name in ("changed", "parts", "fresh"))
    for run_dir, stop in ((changed, 10), (changed, 20), (parts, 10), (parts, 15), (parts, 20)):
        run("txl_dist.train", *still, f"run.dir={run_dir}", *(lanes if stop > 10 else []), f"train.stop_at={stop}")
    lines = [line for line in metrics(changed) if "train/loss" in line]
    tokens = 10 * 8 * 16
    assert [line["tokens"] for line in lines[10:]] == [tokens + step * 4 * 24 for step in range(1, 11)]
    assert latest(changed).state["origin"] == {"step": 10, "tokens": tokens}
    memory = latest(changed).tensors("memory")
    assert memory.keys() == {f"layer.{layer}.lane.{lane}" for layer in range(2) for lane in range(4)}
    assert {tuple(states.shape) for states in memory.values()} == {(30, 32)}

    # Stopped once more on the way, it is the same run to the bit: the new lanes' origin is kept.
    assert [line["train/loss"] for line in metrics(parts) if "train/loss" in line] == [
        line["train/loss"] for line in lines
    ]
    assert all(torch.equal(states, latest(parts).tensors("memory")[name]) for name, states in memory.items())

    # By hand: the same weights, new memories, and each lane at its share of the text.
    run("txl_dist.train", *still, f"run.dir={fresh}", "train.stop_at=1")
    model, _ = load_model(str(fresh), None, {"tgt_len": 24, "mem_len": 30})
    index = Index.open(str(dataset))
    stream = SampleReader(index, "train")
    size = index.splits["train"].tokens
    memory = model.empty_memory(4)
    for step in range(10):
        begins = [lane * size // 4 + tokens // 4 + step * 24 for lane in range(4)]
        read = torch.tensor(np.stack([stream.tokens(begin - 1, 25) for begin in begins]).astype(np.int64))
        lookback = torch.arange(step * 24, step * 24 + 24).expand(4, -1)
        with torch.no_grad():
            loss, memory = model(batch(read[:, :-1], read[:, 1:], lookback), memory)
        assert lines[10 + step]["train/loss"] == pytest.approx(loss.mean().item(), rel=1e-5), step


def test_evaluation_may_have_other_lengths(run, small, metrics, tmp_path):
    """The loss is the one that the evaluate command finds with these lengths."""
    lengths = ["tgt_len=3", "mem_len=2", "clamp_len=1", "same_length=true"]
    run("txl_dist.train", *small, f"run.dir={tmp_path}", *(f"evaluation.{length}" for length in lengths))
    command = ["txl_dist.evaluate", f"run={tmp_path}", "split=valid", "format=json"]
    evaluated = json.loads(run(*command, *(f"model.{length}" for length in lengths)).stdout)
    in_training = [line["valid/loss"] for line in metrics(tmp_path) if "valid/loss" in line][-1]
    assert evaluated["loss"] == pytest.approx(in_training, rel=1e-6)
    plain = json.loads(run(*command).stdout)
    assert plain["loss"] != pytest.approx(in_training, rel=1e-5)


@pytest.mark.distributed
def test_a_mistake_is_reported_once_by_several_processes(run, small):
    done = run("txl_dist.train", *small, "data.num_lanes=7", "+model.zzz=1", processes=2, expect=1)
    ours = without_torchrun(done.stderr)
    assert ours.count("data.num_lanes=7") == ours.count("model.zzz") == 1
    assert "txl_dist" not in ours  # no frame of our code: no stack trace of ours
    assert done.stderr.count("exitcode  : 2") == 2


def test_a_sweep_is_several_runs(run, small, metrics, tmp_path):
    """Hydra's multirun trains them one after the other in one process."""
    run("txl_dist.train", "--multirun", *small, f"run.dir={tmp_path}/${{run.seed}}", "run.seed=1,2", cwd=tmp_path)
    one, two = ([line["train/loss"] for line in metrics(tmp_path / seed) if "train/loss" in line] for seed in "12")
    assert len(one) == len(two) == 20 and one != two


@pytest.mark.parametrize("entry", ["prepare", "train", "evaluate", "generate", "inspect"])
def test_help_shows_groups_keys_and_an_example(run, entry):
    printed = run(f"txl_dist.{entry}", "--help").stdout
    assert f"-m txl_dist.{entry}" in printed
    assert "Groups" in printed and "Examples" in printed and "KEY=VALUE" in printed


def test_a_run_that_another_optimizer_resumes_says_so(run, small, metrics, tmp_path):
    """Without weight decay adamw is adam; with it, it is not."""
    decay = {"none": ["optimizer.weight_decay=0"], "some": ["optimizer.weight_decay=0.1"]}
    for where in decay:
        adam = [f"run.dir={tmp_path / where}", "optimizer=adam"]
        printed = run("txl_dist.train", *small, *adam, "train.stop_at=10").stdout
        assert "starting;" in printed and "in place of" not in printed
        printed = run("txl_dist.train", *small, adam[0], "optimizer=adamw", *decay[where]).stdout
        assert "resuming from step 10 with adamw in place of adam;" in printed
    run("txl_dist.train", *small, f"run.dir={tmp_path / 'adam'}", "optimizer=adam")
    none, some, adam = (
        [line["train/loss"] for line in metrics(tmp_path / where) if "train/loss" in line]
        for where in ("none", "some", "adam")
    )
    assert none == adam and some[:11] == adam[:11] and some != adam


@pytest.mark.parametrize("options", [["optimizer=lamb", "engine.zero_stage=0"], ["optimizer=adamw", "schedule=linear"]])
def test_other_optimizers_learn_and_resume(run, small, metrics, tmp_path, options):
    for name, stops in (("one-start", [[]]), ("two-starts", [["train.stop_at=10"], []])):
        for stop in stops:
            run("txl_dist.train", *small, f"run.dir={tmp_path / name}", *options, *stop)
    one, two = (
        [line["train/loss"] for line in metrics(tmp_path / name) if "train/loss" in line]
        for name in ("one-start", "two-starts")
    )
    assert one == two and one[-1] < one[0] - 0.3


def test_only_the_second_half_counts_where_it_is_asked_for(run, small, metrics, dataset, tmp_path):
    """With a learning rate of (almost) nothing the losses are those of the first weights, computed by hand."""
    still = [*small, "optimizer.lr=1e-30", "train.loss=second_half", "train.stop_at=3", f"run.dir={tmp_path}"]
    run("txl_dist.train", *still)
    logged = [line["train/loss"] for line in metrics(tmp_path) if "train/loss" in line]
    model, _ = load_model(str(tmp_path), None, {})
    index = Index.open(str(dataset))
    plan = LanePlan(index.splits["train"].document_starts, 8, 16, seed=1)
    memory = model.empty_memory(8)
    for segment in Segments(plan, SampleReader(index, "train"), range(8), index.eos, 0, 3):
        with torch.no_grad():
            nats, memory = model(CausalLM().batch(segment), memory)
        assert logged[segment.step] == pytest.approx(nats[:, 8:].mean().item(), rel=1e-5)
        assert logged[segment.step] != pytest.approx(nats.mean().item(), rel=1e-5)


def test_a_scaled_learning_rate_is_another_learning_rate(run, small, metrics, tmp_path):
    options = {"scaled": ["optimizer.lr=6e-3", "optimizer.lr_scale={layers: 0.5, embedding|softmax: 0.5}"]}
    options |= {"plain": ["optimizer.lr=3e-3"], "partly": ["optimizer.lr=3e-3", "optimizer.lr_scale={embedding: 0.5}"]}
    for name, more in options.items():
        run("txl_dist.train", *small, f"run.dir={tmp_path / name}", "train.stop_at=10", *more)
    scaled, plain, partly = (
        [line["train/loss"] for line in metrics(tmp_path / name) if "train/loss" in line] for name in options
    )
    assert scaled == pytest.approx(plain, rel=1e-5) and partly != pytest.approx(plain, rel=1e-3)


def test_the_logged_loss_is_the_mean_since_the_line_before(run, small, metrics, tmp_path):
    """The checkpoint of step 10 lies between two lines, of steps 8 and 12, and holds the losses of steps 9 and 10."""
    run("txl_dist.train", *small, f"run.dir={tmp_path / 'each'}")
    run("txl_dist.train", *small, "tracking.log_every=4", f"run.dir={tmp_path / 'fourth'}")
    each = [line["train/loss"] for line in metrics(tmp_path / "each") if "train/loss" in line]
    lines = [line for line in metrics(tmp_path / "fourth") if "train/loss" in line]
    assert [line["step"] for line in lines] == [4, 8, 12, 16, 20]
    assert [line["train/loss"] for line in lines] == [fmean(each[step - 4 : step]) for step in (4, 8, 12, 16, 20)]
    assert [line["train/step_loss"] for line in lines] == each[3::4]
    shutil.rmtree(tmp_path / "fourth" / "checkpoints" / "step-000000020")
    (tmp_path / "fourth" / "finished.json").unlink()
    run("txl_dist.train", *small, "tracking.log_every=4", f"run.dir={tmp_path / 'fourth'}")
    again = [line for line in metrics(tmp_path / "fourth") if "train/loss" in line]
    assert [line["train/loss"] for line in again] == [line["train/loss"] for line in lines]
