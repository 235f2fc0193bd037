"""What W&B has of a run: read back from its own offline files, or from what a server on loopback was sent."""

import json
import logging
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from tests.tracking.services.wandb_files import read_samples, read_starts
from tests.tracking.services.wandb_server import wandb_server
from txl_dist.checkpoint.format import CheckpointWriter, directory
from txl_dist.tracking.result import wandb_commands
from txl_dist.tracking.schema import METRICS, PANELS
from txl_dist.tracking.services import wandb_run

pytestmark = pytest.mark.usefixtures("bare")

SAMPLES = {"samples": [{"prompt": "It was", "text": " a night"}, {"prompt": "She", "text": " said"}]}


def samples(text):
    return {"samples": [{"prompt": "It was", "text": text}]}


@pytest.fixture
def server(monkeypatch):
    with wandb_server() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        yield server


# ------------------------------------------------------------------------------------------------------- metrics


def test_parts_of_an_offline_run_do_not_overlap_and_lose_nothing(start, tmp_path):
    """The second part resumes from a step before the first one's last, as after a kill; step 7 is logged twice, as the
    last step of training and for its test; the third one was preempted before, and goes on."""
    start(tmp_path / "run", steps=(1, 2, 3, 4, 5))
    start(tmp_path / "run", steps=(4, 5, 6, 7, 7), end="preempted")
    start(tmp_path / "run", steps=(8, 9))
    parts = read_starts(tmp_path / "run")
    steps = [[int(row["_step"]) for row in part["history"]] for part in parts]
    assert steps == [[1, 2, 3, 4, 5], [4, 5, 6, 7], [8, 9]]
    for part in parts:
        for row in part["history"]:
            assert float(row["train/loss"]) == 1 / int(row["step"])


def test_all_parts_of_an_offline_run_are_sent_as_one_run(start, server, tmp_path):
    """By the command that the result names; the parts of test_parts_of_an_offline_run_do_not_overlap."""
    run_dir = tmp_path / "run"
    start(run_dir, steps=(1, 2, 3, 4, 5))
    start(run_dir, steps=(4, 5, 6, 7), end="preempted")
    start(run_dir, steps=(8, 9))
    (command,) = [command for command in wandb_commands(str(run_dir)) if "sync" in command]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    subprocess.run(["bash", "-c", command], check=True, capture_output=True, env=os.environ | {"PATH": path})
    (rows,) = server.rows.values()
    assert list(server.runs) == [(run_dir / "wandb_id").read_text().strip()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 4, 5, 6, 7, 8, 9]
    assert all(row["train/loss"] == 1 / row["step"] for row in rows)
    assert [row["_step"] for row in rows] == list(range(1, 12))  # W&B's own: it moves those that are done again
    (run,) = server.runs.values()
    assert json.loads(run["summary"])["train/loss"] == {"min": 1 / 9, "last": 1 / 9}


def test_metrics_are_defined_by_the_schema(start, tmp_path):
    start(tmp_path / "run")
    (part,) = read_starts(tmp_path / "run")
    assert part["metric"]["*"].step_metric == "tokens"
    for axis in ("tokens", "step", "time"):
        assert part["metric"][axis].options.hidden
    for panel in PANELS:
        for metric in panel.metrics:
            key = metric.key.partition("{")[0] + "*" * metric.is_family
            if panel.better:
                summary = part["metric"][key].summary
                assert (summary.min, summary.max) == (panel.better == "lower", panel.better == "higher"), key
                assert summary.last and part["metric"][key].step_metric == "tokens", key
            else:
                assert key not in part["metric"]


def test_the_summary_is_of_all_starts(start, tmp_path):
    """W&B's own has the best value of the last start only, and none of a run with a loss that is not finite."""
    start(tmp_path / "run", steps=(1, 2), losses={1: 0.25, 2: float("nan")})
    start(tmp_path / "run", steps=(3, 4), losses={3: 3.0, 4: 2.0})
    first, second = read_starts(tmp_path / "run")
    assert json.loads(first["summary"]["train/loss"])["min"] == 0.25
    assert json.loads(second["summary"]["train/loss"]) == {"min": 0.25, "last": 2.0}
    assert second["summary"]["step"] == "4"


# -------------------------------------------------------------------------------------------------------- events


def test_the_last_part_of_an_offline_run_has_all_samples(start, tmp_path):
    """Those of steps that are done again are those of the last time."""
    start(tmp_path / "run", steps=(1, 2, 3), events=[("samples", step, samples(f"first {step}")) for step in (1, 3)])
    start(tmp_path / "run", steps=(2, 3, 4), events=[("samples", step, samples(f"again {step}")) for step in (3, 4)])
    first, second = read_starts(tmp_path / "run")
    assert read_samples(first) == [[1, 128, "It was", "first 1"], [3, 384, "It was", "first 3"]]
    assert [(row[0], row[3]) for row in read_samples(second)] == [(1, "first 1"), (3, "again 3"), (4, "again 4")]
    assert [int(row["_step"]) for part in (first, second) for row in part["history"]] == [1, 2, 3, 2, 3, 4]


def test_a_table_of_samples_is_continued_where_wandb_resumes_the_run(start, server, tmp_path):
    for step in (1, 2, 3):
        said, facts = start(tmp_path / "run", steps=(step,), events=[("samples", step, SAMPLES)], mode="online")
        assert facts.resumed == (step > 1)
    tables = [row["samples"] for row in server.rows[facts.run_id] if "samples" in row]
    assert [table["increment_num"] for table in tables] == [0, 1, 2]
    assert [len(table["previous_increments_paths"]) for table in tables] == [0, 1, 2]
    assert [table["nrows"] for table in tables] == [2, 2, 2]  # and those before, in their increments


def test_alerts_are_sent_for_bad_steps_and_the_end(start, tmp_path):
    bad = ("bad_step", 1, {"why": "the loss is not finite", "action": "skip"})
    for end in ("ended", "preempted", "failed"):
        start(tmp_path / "run", end=end, events=[bad] if end == "ended" else [])
    parts = read_starts(tmp_path / "run")
    alerts = [(alert.title, alert.level) for part in parts for alert in part["alert"]]
    ends = [("Training has ended", "INFO"), ("Training was preempted", "WARN"), ("Training has failed", "ERROR")]
    assert alerts == [("Bad step", "WARN"), *ends]
    assert parts[0]["alert"][0].text == "step 1: the loss is not finite (skip)"
    assert [part["exit"] for part in parts] == [0, 75, 1]


# ----------------------------------------------------------------------------------------------------- artifacts

DATA = {"fingerprint": "f" * 64, "vocab_size": 256, "tokenizer": {}, "place": "/data/text"}


@pytest.fixture
def save(make_config):
    """Write a checkpoint of a run, with a file of some bytes."""

    def save(run_dir, step, valid_loss=None, content=b"weights"):
        writer = CheckpointWriter(str(run_dir), step, 0)
        writer.add("weights", {"content": torch.tensor(list(content))})
        state = {"step": step, "tokens": 128 * step, "origin": {}, "optimizer": OPTIMIZER, "valid_loss": valid_loss}
        config = CONFIG | {"model": asdict(make_config()) | {"name": "transformer_xl"}}
        writer.commit(writer.files, state, config, DATA)

    return save


OPTIMIZER = {"state": {}, "group": {"step": 1}, "loss_scaler": {}}
CONFIG = {
    "run": {"seed": 1},
    "data": {"dir": "data", "num_lanes": 8, "order": "corpus", "reset_memory": "never"},
    "optimizer": {"name": "adamw"},
    "train": {"max_steps": 10},
    "engine": {"pipeline_stages": 1, "zero_stage": 0, "gradient_accumulation": 1, "offload": "none"},
}


def models(part):
    return [artifact for artifact in part["artifact"] if artifact.type == "model"]


def test_checkpoints_are_logged_once_and_by_reference(start, save, tmp_path, monkeypatch):
    run_dir = tmp_path / "it's a rün"
    monkeypatch.setenv("WANDB_RUN_ID", "my run")
    run_dir.mkdir()
    save(run_dir, 1, valid_loss=2.5)
    save(run_dir, 2)
    start(run_dir)  # logs both
    start(run_dir)  # nothing new
    save(run_dir, 3, valid_loss=2.0)
    (directory(run_dir, 2) / "weights-00000.safetensors").unlink()  # damaged
    start(run_dir)  # logs the new one, which is the best
    first, second, third = map(models, read_starts(run_dir))
    assert [sorted(artifact.aliases) for artifact in first] == [["best", "latest", "step-1"], ["latest", "step-2"]]
    assert second == []
    (artifact,) = third
    assert sorted(artifact.aliases) == ["best", "latest", "step-3"]
    assert artifact.name == "checkpoints-my-run"
    facts = json.loads(artifact.metadata)
    assert (facts["step"], facts["tokens"], facts["valid_loss"]) == (3, 384, 2.0) and len(facts["sha256"]) == 64
    references = [content.ref for content in artifact.manifest.contents]
    assert sorted(Path(reference).name for reference in references) == ["checkpoint.json", "weights-00000.safetensors"]
    assert all(reference.startswith(directory(run_dir, 3).as_uri()) for reference in references)
    assert not any(content.local_path for content in artifact.manifest.contents)  # nothing is copied or uploaded


def test_a_checkpoint_that_is_written_again_is_another_version(start, save, tmp_path):
    """At the same place: W&B itself takes it for the same, as its contents are not read."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    for content in (b"one", b"two"):
        save(run_dir, 1, content=content)
        start(run_dir)
    (run_dir / "wandb_artifacts.json").write_text("damaged")
    start(run_dir)
    digests = [artifact.digest for part in read_starts(run_dir) for artifact in models(part)]
    assert len(digests) == 3 and len(set(digests)) == 2 and digests[1] == digests[2]


def test_the_dataset_is_used_online_and_in_the_config_offline(start, save, server, tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    save(run_dir, 1)
    assert start(run_dir)[0] == []
    (part,) = read_starts(run_dir)
    facts = {"fingerprint": "f" * 64, "location": "/data/text"}
    assert json.loads(part["config"]["dataset"]) == facts
    assert [artifact.type for artifact in part["artifact"]] == ["model"]
    start(run_dir, mode="online")
    (dataset,) = server.artifacts("dataset")
    assert dataset["artifactCollectionName"] == f"dataset-{'f' * 16}" and json.loads(dataset["metadata"]) == facts
    assert len(server.sent("UseArtifact")) == 1
    assert server.artifacts("model") == []  # was logged offline, and is sent by `wandb sync`


# ---------------------------------------------------------------------------------------------------------- view


def test_a_view_is_saved_once_with_all_sections_and_panels(start, server, tmp_path, caplog):
    caplog.set_level(logging.INFO, "txl_dist")
    said, facts = start(tmp_path / "run", mode="online", end="preempted")
    assert server.sent("UpsertView2") == []
    for _ in range(2):
        said, _ = start(tmp_path / "run", mode="online")
    (view,) = server.sent("UpsertView2")
    assert (view["entityName"], view["projectName"]) == ("us", "project")
    assert (tmp_path / "run/wandb_view").read_text().startswith(f"{server.url}/us/project?nw=")
    spec = json.loads(view["spec"])["section"]
    bank = spec["panelBankConfig"]["sections"]
    names = [section["name"] for section in bank if section["panels"]]
    assert names == ["Loss", "Task", "Optimization", "Memory", "Speed", "Health", "Samples"]
    plots = [panel["config"] for section in bank for panel in section["panels"] if "chartTitle" in panel["config"]]
    assert [plot["chartTitle"] for plot in plots] == [panel.title for panel in PANELS]
    assert {plot["xAxis"] for plot in plots} == {"tokens"}
    shown = [key for plot in plots for key in plot.get("metrics") or []]
    expressions = [plot["metricRegex"] for plot in plots if plot.get("useMetricRegex")]
    for metric in METRICS:
        example = metric.key.format(layer=0, head=1, part="layer.0", position=16, distance="ahead")
        assert example in shown or sum(bool(re.search(it, example)) for it in expressions) == 1, metric.key


def test_a_view_that_cannot_be_saved_is_one_line(start, server, tmp_path, monkeypatch):
    server.refused.add("UpsertView2")
    said, _ = start(tmp_path / "run", mode="online")
    (line,) = said
    assert line.startswith("W&B: no view was saved (") and "UpsertView2 is refused" in line
    server.refused.clear()
    server.stuck.add("UpsertView2")
    monkeypatch.setattr(wandb_run, "SERVER", 0.5)
    said, _ = start(tmp_path / "run", mode="online")
    assert said == ["W&B: no view was saved (no answer within 0 seconds)"]


def test_without_the_package_no_view_is_saved(start, server, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "txl_dist")
    for name in [name for name in sys.modules if name.partition(".")[0] == "wandb_workspaces"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    said, _ = start(tmp_path / "run", mode="online")
    assert said == ["W&B: for a saved view with the sections of the dashboard, pip install 'txl_dist[workspaces]'"]
    assert not (tmp_path / "run/wandb_view").exists()


def test_an_artifact_that_is_refused_leaves_the_metrics(start, save, server, tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    save(run_dir, 1)
    server.refused |= {"ArtifactType", "CreateArtifact"}
    said, facts = start(run_dir, steps=(1, 2), events=[("samples", 1, SAMPLES)], mode="online")
    assert said and all(line.startswith("W&B: ") for line in said)
    assert [row["step"] for row in server.rows[facts.run_id] if "train/loss" in row] == [1, 2]
    assert json.loads(server.runs[facts.run_id]["summary"])["train/loss"] == {"min": 0.5, "last": 0.5}
    rows = [("train/loss" in row, row["step"]) for row in server.rows[facts.run_id]]
    assert rows == [(True, 1), (False, 1), (True, 2)]  # of the samples one, and no others
