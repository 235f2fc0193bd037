"""metrics.jsonl, the curve and the table at the end of a start, whatever a run directory is called and contains."""

import json
import math
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from txl_dist.tracking import result
from txl_dist.tracking.curve import draw_curve
from txl_dist.tracking.metrics import MetricsFile, last_line, read_metrics
from txl_dist.tracking.result import show_result

NAN, INFINITY = float("nan"), float("inf")
LINES = [
    {"step": 1, "tokens": 128, "train/loss": 5.5, "train/tokens_per_second": 900.0},
    {"step": 2, "tokens": 256, "train/loss": NAN, "train/grad_norm": INFINITY, "train/tokens_per_second": 1000.0},
    {"step": 3, "tokens": 384, "valid/loss": 2.0, "valid/bits_per_byte": 2.885, "valid/perplexity": 7.39},
]


def show(run_dir, max_steps=3):
    job = SimpleNamespace(
        run=SimpleNamespace(dir=str(run_dir)), train=SimpleNamespace(max_steps=max_steps), objective=None
    )
    show_result(job, ["train", "valid"])


def write(run_dir, lines=LINES):
    run_dir.mkdir(parents=True, exist_ok=True)
    file = MetricsFile(str(run_dir), 0)
    for line in lines:
        file.append(line)


def refuse(word):
    raise AssertionError(f"{word} is not JSON")


def test_metrics_are_json_for_every_reader(tmp_path):
    write(tmp_path)
    texts = (tmp_path / "metrics.jsonl").read_text().splitlines()
    lines = [json.loads(text, parse_constant=refuse) for text in texts]
    assert lines[0] == LINES[0] and lines[1]["train/loss"] is None and lines[1]["train/grad_norm"] is None
    assert math.isnan(read_metrics(str(tmp_path))[1]["train/loss"])


def test_metrics_of_earlier_versions_and_damaged_ones_are_read(tmp_path, caplog):
    deep = "[" * 100_000
    old = ['{"step": 1, "tokens": 128, "train/loss": NaN, "train/grad_norm": -Infinity}', deep, "null", '{"step": 2}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(old) + "\n")
    (line,) = read_metrics(str(tmp_path))
    assert math.isnan(line["train/loss"]) and line["train/grad_norm"] == -INFINITY
    assert caplog.text.count("cannot be read") == 3
    assert last_line(str(tmp_path)) is None
    MetricsFile(str(tmp_path), 1)
    assert (tmp_path / "metrics.jsonl").read_text() == old[0] + "\n"


@pytest.mark.parametrize("name", ["[red]x", "[/bold]", ":bug:", "$x^{", "a $b and $c", "it's 5 %", "{step}", "日本"])
def test_any_name_is_printed_as_it_is_and_drawn(tmp_path, capsys, name):
    write(tmp_path / name)
    show(tmp_path / name, max_steps=4)
    out = capsys.readouterr().out
    assert f"run directory         {tmp_path / name}\n" in out
    assert f"learning curve        {tmp_path / name}/curve.png\n" in out
    assert "valid bits per byte   2.885  (loss 2.0000 nats per token, perplexity 7.39)" in out
    assert "steps                 3 of 4, 384 tokens" in out and "tokens per second     950" in out
    assert (tmp_path / name / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_an_objective_without_bits_per_byte_shows_its_loss(tmp_path, capsys):
    lines = [{"step": 3, "tokens": 384, "valid/loss": 2.0, "valid/perplexity": 7.389}]
    write(tmp_path, lines)
    show(tmp_path)
    out = capsys.readouterr().out
    assert "valid loss            2.0000  (nats per predicted token, perplexity 7.39)\n" in out
    assert "bits per byte" not in out and "  nan" not in out


def test_numbers_have_bits_per_dimension(tmp_path, capsys):
    write(
        tmp_path,
        [{"step": 3, "tokens": 384, "valid/loss": 2.0, "valid/perplexity": 7.389, "valid/bits_per_dimension": 2.9}],
    )
    show(tmp_path)
    out = capsys.readouterr().out
    assert "valid bits per dimension  2.900  (loss 2.0000 nats per token, perplexity 7.39)" in out


@pytest.mark.parametrize("content", [None, "", "damaged\n", '{"step": 3, "tokens": 384, "valid/loss": "low"}\n'])
def test_a_result_without_metrics_is_a_result(tmp_path, capsys, content):
    """Removed or edited by hand while the run was in its last step."""
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    show(tmp_path)
    out = capsys.readouterr().out
    assert f"run directory         {tmp_path}\n" in out and "learning curve" in out
    assert "metrics.jsonl holds none" in out


def test_a_curve_of_losses_that_are_not_finite_is_drawn(tmp_path):
    for value in (NAN, INFINITY):
        assert draw_curve(str(tmp_path), [{"step": 1, "tokens": 1, "train/loss": value, "valid/loss": value}]).is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["curve.png"]


def test_a_curve_that_cannot_be_written_is_said(tmp_path, capsys):
    write(tmp_path)
    (tmp_path / "curve.png").mkdir()
    show(tmp_path)
    assert f"learning curve        could not be drawn: {tmp_path}/curve.png: Is a directory" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curve.png", "metrics.jsonl"]


def test_a_matplotlib_that_cannot_work_is_said(tmp_path):
    """Without a home and a cache; with a backend that does not exist, a style that needs LaTeX, a damaged setting."""
    write(tmp_path / "run")
    (tmp_path / "cache").write_text("")
    (tmp_path / "latex").mkdir()
    (tmp_path / "latex/matplotlibrc").write_text("text.usetex: true\n")
    code = (
        "from types import SimpleNamespace as N\nfrom txl_dist.tracking.result import show_result\n"
        f"show_result(N(run=N(dir={str(tmp_path / 'run')!r}), train=N(max_steps=3), objective=None), ['valid'])"
    )
    root = str(Path(__file__).resolve().parents[2])
    nowhere = str(tmp_path / "cache/in")  # which is below a file
    for change, drawn in (
        ({"MPLCONFIGDIR": nowhere}, True),
        ({"HOME": nowhere, "XDG_CACHE_HOME": nowhere, "XDG_CONFIG_HOME": nowhere}, True),
        ({"MPLBACKEND": "nonsense"}, False),
        ({"MATPLOTLIBRC": str(tmp_path / "latex"), "PATH": nowhere}, False),
    ):
        environment = os.environ | {"PYTHONPATH": root} | change
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=tmp_path
        )
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
        assert ("could not be drawn: " in done.stdout) != drawn, done.stdout


def test_all_offline_parts_of_a_run_are_in_the_command_that_sends_them(tmp_path, capsys):
    run_dir = tmp_path / "it's a run"
    write(run_dir)
    for number, run_id in enumerate(["old", "new", "new"]):
        part = run_dir / "wandb" / f"offline-run-2026_{number}-{run_id}"
        part.mkdir(parents=True)
        (part / f"run-{run_id}.wandb").touch()
        os.utime(part / f"run-{run_id}.wandb", (number, number))
    parts = sorted((run_dir / "wandb").iterdir())

    def sent():
        show(run_dir)
        (line,) = [line for line in capsys.readouterr().out.splitlines() if "wandb sync" in line]
        listed = subprocess.run(["bash", "-c", line.replace("wandb sync", "ls -d --")], capture_output=True, text=True)
        return listed.stdout.splitlines()

    assert sent() == list(map(str, parts[1:]))
    (parts[0] / "run-old.wandb").unlink()
    parts[0].rmdir()
    assert sent() == list(map(str, parts[1:]))
    show(run_dir)
    assert f"wandb sync {shlex.quote(str(run_dir / 'wandb'))}/offline-run-*\n" in capsys.readouterr().out


@pytest.mark.parametrize("version, is_shown", [("0.31.0", True), ("0.32.1rc1", True), ("1.0", True), ("0.30.1", False)])
def test_wandbs_viewer_is_named_where_it_is_there(tmp_path, capsys, monkeypatch, version, is_shown):
    run_dir = tmp_path / "it's a run"
    write(run_dir)
    part = run_dir / "wandb/offline-run-2026_0-abcd"
    part.mkdir(parents=True)
    (part / "run-abcd.wandb").touch()
    monkeypatch.setattr(result, "version", lambda package: version)
    show(run_dir)
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert (f"wandb leet {shlex.quote(str(run_dir / 'wandb'))}" in lines) == is_shown


def test_wandb_has_the_viewer_that_is_named(tmp_path):
    assert result.has_viewer()
    done = subprocess.run([Path(sys.executable).with_name("wandb"), "leet", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "wandb leet ./wandb" in done.stdout
