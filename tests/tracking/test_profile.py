"""The profile of some steps, of real runs."""

import gzip
import json

import pytest
import torch
from rich.console import Console
from torch.profiler import record_function

from txl_dist.tracking.profile import costliest_operators

STAGES = ["engine.pipeline_stages=2", "engine.gradient_accumulation=2"]


def names(first, last, ranks):
    """Return the files that RUN_DIR/profile/ is to hold."""
    kinds = [".json.gz", "-memory.pickle"] if torch.cuda.is_available() else [".json.gz"]
    return {f"steps-{first}-{last}-rank-{rank}{kind}" for rank in range(ranks) for kind in kinds}


def trace(run_dir, first, last, rank):
    """Return each marked step with the names of its operators; and how many operators are in none."""
    with gzip.open(run_dir / "profile" / f"steps-{first}-{last}-rank-{rank}.json.gz") as file:
        events = [event for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]
    marks = [
        event for event in events if event["name"].startswith("ProfilerStep#") and event["cat"] == "user_annotation"
    ]
    steps = {mark["name"]: [] for mark in marks}
    assert len(steps) == len(marks)
    outside = 0
    for event in events:
        if event.get("cat") == "cpu_op":
            within = [mark for mark in marks if mark["ts"] <= event["ts"] <= mark["ts"] + mark["dur"]]
            outside += not within
            for mark in within:
                steps[mark["name"]].append(event["name"])
    return steps, outside


def losses(lines):
    return [line["train/loss"] for line in lines if "train/loss" in line]


@pytest.fixture(scope="module")
def plain(run, small, metrics, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("plain")
    run("txl_dist.train", *small, f"run.dir={run_dir}", "train.stop_at=6")
    assert not (run_dir / "profile").exists()
    return losses(metrics(run_dir))


def test_exactly_the_asked_steps_are_recorded_and_nothing_changes(run, small, metrics, plain, tmp_path):
    options = ["train.stop_at=6", "train.profile=[3,5]", "engine.gradient_accumulation=1"]
    printed = run("txl_dist.train", *small, f"run.dir={tmp_path}", *options).stdout
    assert losses(metrics(tmp_path)) == plain
    assert {path.name for path in (tmp_path / "profile").iterdir()} == names(3, 5, 1)
    steps, outside = trace(tmp_path, 3, 5, 0)
    assert list(steps) == ["ProfilerStep#3", "ProfilerStep#4", "ProfilerStep#5"]
    for operators in steps.values():
        assert operators.count("aten::embedding") == 1 and operators.count("aten::embedding_backward") == 1
    assert outside < len(steps["ProfilerStep#4"]) / 4  # what is logged, and no step
    assert "operator" in printed and "aten::" in printed and str(tmp_path / "profile") in printed
    for word in ("calls per step", "ms per step"):
        assert printed.count(word) == 1


@pytest.mark.distributed
@pytest.mark.parametrize("options, embeds", [([], [1, 1]), (STAGES, [2, 0])])
def test_every_rank_has_its_trace(run, small, metrics, tmp_path, options, embeds):
    """Of the data-parallel ranks each embeds its lanes; of the stages the first one, a micro-batch after the other."""
    logged = []
    for name, profile in ("plain", "null"), ("profiled", "[1,2]"):
        run_dir = tmp_path / name
        command = [*small, *options, f"run.dir={run_dir}", "train.stop_at=3", f"train.profile={profile}"]
        done = run("txl_dist.train", *command, processes=2)
        logged.append(losses(metrics(run_dir)))
    assert logged[0] == logged[1] and len(logged[0]) == 3
    assert {path.name for path in (run_dir / "profile").iterdir()} == names(1, 2, 2)
    for rank, count in enumerate(embeds):
        steps, _ = trace(run_dir, 1, 2, rank)
        assert list(steps) == ["ProfilerStep#1", "ProfilerStep#2"]
        assert [operators.count("aten::embedding") for operators in steps.values()] == [count] * 2
        assert all("aten::mm" in operators for operators in steps.values())
    assert done.stdout.count("calls per step") == 1  # the first rank's


def test_a_later_start_profiles_what_is_left(run, small, plain, metrics, tmp_path):
    command = [*small, f"run.dir={tmp_path}"]
    run("txl_dist.train", *command, "train.stop_at=3")
    run("txl_dist.train", *command, "train.stop_at=6", "train.profile=[2,5]")
    assert {path.name for path in (tmp_path / "profile").iterdir()} == names(4, 5, 1)
    assert list(trace(tmp_path, 4, 5, 0)[0]) == ["ProfilerStep#4", "ProfilerStep#5"]
    assert losses(metrics(tmp_path)) == plain
    printed = run("txl_dist.train", *command, "train.stop_at=7", "train.profile=[5,6]").stdout
    assert "train.profile=[5, 6]: these steps are done already" in printed
    assert {path.name for path in (tmp_path / "profile").iterdir()} == names(4, 5, 1)


@pytest.mark.distributed
def test_training_continues_without_a_profile_that_cannot_be_written(run, small, metrics, tmp_path):
    (tmp_path / "profile").write_text("")
    done = run("txl_dist.train", *small, f"run.dir={tmp_path}", "train.stop_at=6", "train.profile=[3,5]", processes=2)
    refused = f"steps 3 to 5: a trace could not be written: {tmp_path}/profile: File exists"
    assert f"{refused}; the costliest operators are" in done.stdout
    assert f"rank 1 WARNING txl_dist.tracking.profile: {refused}\n" in done.stderr
    assert "Traceback" not in done.stderr and len(losses(metrics(tmp_path))) == 6


def test_operators_are_listed_by_their_own_time_per_step():
    big = torch.ones(400, 400)
    profiler = torch.profiler.profile()
    with profiler:
        for step in (7, 8):
            with record_function(f"ProfilerStep#{step}"), record_function("of mine"):
                for _ in range(3):
                    big.matmul(big).relu()
    spent = {event.key: event.self_cpu_time_total for event in profiler.key_averages()}
    console = Console(record=True, width=120, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(costliest_operators(profiler, gpu=False, rows=2))
    header, first, second, *more = console.export_text().splitlines()
    assert header.split() == ["operator", "calls", "per", "step", "ms", "per", "step", "share"] and not more
    operators = sum(spent[key] for key in spent if key.startswith("aten::"))
    milliseconds = spent["aten::mm"] / 2 / 1000
    assert first.split() == ["aten::mm", "3", f"{milliseconds:,.2f}", f"{spent['aten::mm'] / operators:.1%}"]
    assert second.split()[0].startswith("aten::")
