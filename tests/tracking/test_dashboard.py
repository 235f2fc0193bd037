"""What the dashboard is made of: thinned curves, heat maps, times, starts, differences; whatever a run's files hold."""

import json
import math
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.tracking.recorded import CONFIG, TIME, event, heads, lines, serving, start, write, write_usual
from txl_dist.tracking.dashboard.dashboard import DashboardFile, dashboard_data, write_dashboard
from txl_dist.tracking.dashboard.history import TrainingClock, differences, flatten
from txl_dist.tracking.dashboard.panels import MAX_GRIDS, MAX_POINTS, evenly
from txl_dist.tracking.dashboard.thinning import means, smooth, thin
from txl_dist.tracking.schema import SECTIONS
from txl_dist.tracking.tracker import Tracker

REPO = Path(__file__).resolve().parents[2]
NAN = math.nan


def panels(data):
    return {panel["title"]: panel for section in data["sections"] for panel in section["panels"]}


def curves(data, title):
    return {(curve["run"], curve["label"]): curve for curve in panels(data)[title]["curves"]}


def data_in(page):
    """Return the data of a page, as its script reads them."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


# ------------------------------------------------------------------------------------------------- long curves


def test_a_thinned_curve_keeps_its_extremes_its_gaps_and_its_ends():
    rng = random.Random(1)
    values = [rng.gauss(0, 1) for _ in range(40_000)]
    values[123], values[20_001], values[31_313] = 99.0, -99.0, NAN
    places = thin(values, MAX_POINTS)
    assert len(places) <= MAX_POINTS + 2 and places == sorted(set(places))
    assert {0, 123, 20_001, 31_313, 39_999} <= set(places)
    stretch = len(values) // (MAX_POINTS // 3)
    assert max(after - before for before, after in zip(places, places[1:], strict=False)) <= 2 * stretch


def test_a_short_curve_is_not_thinned():
    assert thin([3.0, NAN, 1.0], 3) == [0, 1, 2]


def test_a_thinned_curve_of_nan_is_a_gap():
    places = thin([1.0] * 5000 + [NAN] * 5000, 300)
    assert [sum(place < 5000 for place in places), sum(place >= 5000 for place in places)] == [50, 51]


def test_means_are_those_of_stretches():
    middles, averages = means([1.0, 3.0, NAN, NAN, 5.0, NAN], 9)
    assert middles == [0, 2, 4] and averages[0] == 2 and math.isnan(averages[1]) and averages[2] == 5


def test_smoothing_keeps_a_straight_line_its_length_and_gaps():
    line = [float(number) for number in range(100)]
    assert smooth(line)[:90] == pytest.approx(line[:90])
    noisy = [number % 2 for number in range(1000)]
    assert smooth(noisy)[500] == pytest.approx(0.5, abs=0.02)
    assert smooth([1.0] * 49) == [1.0] * 49 and smooth([0.0, 1.0] * 10) == [0.0, 1.0] * 10
    gap = [1.0] * 50 + [NAN] + [1.0] * 50
    assert [math.isnan(value) for value in smooth(gap)] == [math.isnan(value) for value in gap]


# -------------------------------------------------------------------------------------------------- one run


def test_only_panels_and_sections_with_data_are_there_in_order(tmp_path):
    data = dashboard_data([str(write(tmp_path, lines()))])
    titles = [section["title"] for section in data["sections"]]
    assert titles == [title for title in SECTIONS if title in ("Loss", "Optimization", "Speed")]
    assert list(panels(data))[:2] == ["Loss", "Loss of a step"] and "Gain of memory" not in panels(data)


def test_a_curve_has_the_rows_and_values_of_its_metric(tmp_path):
    data = dashboard_data([str(write(tmp_path, lines()))])
    curve = curves(data, "Loss")[0, "validation"]
    (run,) = data["runs"]
    places = [run["rows"].index(row) for row in curve["rows"]]
    assert [run["axes"]["step"][place] for place in places] == [50, 100, 150, 200, 250, 300, 350, 400]
    assert [run["axes"]["tokens"][place] for place in places][-1] == 400_000
    assert curve["values"] == pytest.approx([line["valid/loss"] for line in lines() if "valid/loss" in line])


def test_what_is_not_finite_is_null(tmp_path):
    record = list(lines(3))
    record[1] |= {"train/loss": None, "train/lr": math.inf}
    data = dashboard_data([str(write(tmp_path, record))])
    assert curves(data, "Loss")[0, "training"]["values"][1] is None
    assert curves(data, "Learning rate")[0, "learning rate"]["values"][1] is None
    json.dumps(data, allow_nan=False)


def test_a_long_run_is_thinned_and_has_means(tmp_path):
    record = [{"step": step, "tokens": step, "train/loss": float(step % 7)} for step in range(1, 5001)]
    data = dashboard_data([str(write(tmp_path, record))])
    curve = curves(data, "Loss")[0, "training"]
    assert len(curve["rows"]) == len(curve["values"]) <= MAX_POINTS + 2
    assert {min(curve["values"]), max(curve["values"])} == {0, 6}
    assert curve["means"]["values"] == pytest.approx([3.0] * 500, abs=0.61)
    (run,) = data["runs"]
    assert set(curve["rows"]) | set(curve["means"]["rows"]) == set(run["rows"])
    assert len(run["axes"]["step"]) == len(run["rows"]) < 2100


def test_heads_are_a_heat_map_with_the_means_of_layers_and_distances_as_curves(tmp_path):
    data = dashboard_data([str(write(tmp_path, lines(3, **heads())))])
    found = curves(data, "Attention on memory")
    assert list(found) == [(0, "all heads"), (0, "layer 0"), (0, "layer 1")]
    assert found[0, "layer 1"]["values"] == pytest.approx([0.5] * 3)
    assert curves(data, "Attention by distance")[0, "distance 16"]["values"] == pytest.approx([0.5] * 3)
    (share,) = panels(data)["Attention on memory"]["grids"]
    (block,) = share["blocks"]
    assert block["rows"] == ["layer 0", "layer 1"] and block["columns"] == ["0", "1", "2"]
    assert block["values"][2][1] == pytest.approx([0.4, 0.5, 0.6]) and share["steps"][2]["step"] == 30
    (distance,) = panels(data)["Attention by distance"]["grids"]
    assert [block["title"] for block in distance["blocks"]] == ["layer 0", "layer 1"]
    assert distance["blocks"][0]["rows"] == ["head 0", "head 1", "head 2"]
    assert distance["blocks"][1]["values"][0][2] == [0.25, 0.5]


def test_heat_maps_are_there_at_some_steps_and_at_the_last(tmp_path):
    data = dashboard_data([str(write(tmp_path, lines(200, **heads())))])
    steps = [at["step"] for at in panels(data)["Attention on memory"]["grids"][0]["steps"]]
    assert len(steps) == MAX_GRIDS and steps[0] == 10 and steps[-1] == 2000
    assert evenly([1, 2, 3], 1) == [3] and evenly(list(range(9)), 3) == [0, 4, 8]


def test_layers_are_in_the_order_of_their_numbers(tmp_path):
    norms = {f"watch/weights/{part}": 1.0 for part in ("layer.10", "layer.2", "embedding", "head")}
    labels = [
        label for _, label in curves(dashboard_data([str(write(tmp_path, lines(2, **norms)))]), "Norm of weights")
    ]
    assert labels == ["embedding", "head", "layer.2", "layer.10"]


def test_the_time_of_training_leaves_out_pauses_and_what_was_done_again():
    """Two starts: the first ends at 100 or is killed after 90, the second begins an hour later."""
    ended = TrainingClock([1000, 1050, 1100, 4700, 4760], [1000, 4700])
    assert [ended.seconds(time) for time in (1000, 1050, 1100, 4700, 4760)] == [0, 50, 100, 100, 160]
    killed = TrainingClock([1000, 1090, 4700, 4760], [1000, 4700])
    assert [killed.seconds(time) for time in (1090, 4000, 4760)] == [90, 90, 150]
    without_starts = TrainingClock([1000, 1090, NAN, None], [])
    assert [without_starts.seconds(time) for time in (1090, NAN, None)] == [90, None, None]
    assert TrainingClock([], []).seconds(1000) is None


def test_the_time_axis_is_of_training(tmp_path):
    record = list(lines(40))
    for line in record[20:]:
        line["time"] += 3600
    events = [start(), event("end", 200, reason="preempted", detail=""), start(200, TIME + 3800)]
    (run,) = dashboard_data([str(write(tmp_path, record, events))])["runs"]
    assert run["axes"]["seconds"] == [line["step"] for line in lines(40)] and run["last"]["seconds"] == 400


def test_starts_say_what_differs_from_the_start_before(tmp_path):
    (run,) = dashboard_data([str(write_usual(tmp_path))])["runs"]
    first, second = run["starts"]
    assert first["config"]["model.mem_len"] == "64" and first["changes"] == []
    assert first["end"] == "preempted: after step 200" and second["end"] == "ended"
    assert second["origin"] == "resuming from step 200" and second["split"] == "1 x cpu, ZeRO 1"
    assert second["changes"] == [{"key": "engine.zero_stage", "values": [None, "2"]}]
    assert [mark["kind"] for mark in run["marks"]].count("checkpoint") == 2
    assert {"the loss is nan: skip", "validation loss 3.5000", "not evaluated"} <= {m["text"] for m in run["marks"]}
    assert run["max_steps"] == 400 and run["state"] == "ended"


def test_a_config_that_stays_is_there_once(tmp_path):
    (run,) = dashboard_data([str(write(tmp_path, lines(2), [start(), start(10), start(20)]))])["runs"]
    assert [begun["config"] is None for begun in run["starts"]] == [False, True, True]


def test_samples_are_there_newest_first(tmp_path):
    (run,) = dashboard_data([str(write_usual(tmp_path))])["runs"]
    assert [sampled["step"] for sampled in run["samples"]] == [400, 100]
    assert run["samples"][0]["samples"][1] == {"prompt": "import ", "text": "os\nimport sys"}


# ------------------------------------------------------------------------------------------------ several runs


def test_several_runs_are_drawn_over_one_another(tmp_path):
    other = CONFIG | {"run": {"dir": "runs/y"}, "model": {"n_layer": 2, "mem_len": 0}}
    runs = [write_usual(tmp_path / "a"), write_usual(tmp_path / "b", loss=5.0, config=other)]
    data = dashboard_data(list(map(str, runs)))
    assert [run["name"] for run in data["runs"]] == ["a", "b"] and data["title"] == "2 runs"
    found = curves(data, "Loss")
    assert {run for run, _ in found} == {0, 1} and found[1, "training"]["values"][0] > 4.9
    assert data["differences"] == [{"key": "model.mem_len", "values": ["64", "0"]}]
    assert [grid["run"] for grid in panels(data)["Attention on memory"]["grids"]] == [0, 1]


def test_runs_of_one_name_are_named_by_their_paths(tmp_path):
    paths = [str(write(tmp_path / folder / "run", lines(2))) for folder in "ab"]
    assert [run["name"] for run in dashboard_data(paths)["runs"]] == paths


def test_in_an_overlay_a_family_is_one_curve(tmp_path):
    norms = {"watch/weights/layer.0": 1.0, "watch/weights/layer.1": 3.0, **heads()}
    runs = [str(write(tmp_path / name, lines(2, **norms))) for name in "ab"]
    data = dashboard_data(runs)
    assert curves(data, "Norm of weights")[1, "mean"]["values"] == [2.0, 2.0]
    assert list(curves(data, "Attention on memory")) == [(0, "all heads"), (1, "all heads")]


def test_differences_are_those_of_the_last_starts(tmp_path):
    first = write(tmp_path / "a", lines(2), [start(config={"x": 1}), start(10, config={"x": 2, "y": [1, None]})])
    second = write(tmp_path / "b", lines(2), [start(config={"x": 2, "z": {"deep": {"er": "text"}}})])
    old = write(tmp_path / "old", lines(2))
    assert dashboard_data([str(first), str(second)])["differences"] == [
        {"key": "y", "values": ["[1, null]", None]},
        {"key": "z.deep.er", "values": [None, "text"]},
    ]
    assert dashboard_data([str(first), str(old)])["differences"] == []
    assert differences([flatten({"a": {"b": 1}}), flatten({"a": {"b": 1}})]) == []


# -------------------------------------------------------------------------------- whatever the files of a run hold


def test_a_run_without_files_has_a_page(tmp_path):
    page = write_dashboard(str(tmp_path)).read_text()
    assert data_in(page)["sections"] == [] and "Nothing is recorded yet" in page


def test_a_run_of_an_earlier_version_has_a_page():
    """It has no times and no events."""
    data = dashboard_data([str(REPO / "tests/fixtures/v0_1/run")])
    assert len(curves(data, "Loss")[0, "training"]["values"]) > 1
    assert set(data["runs"][0]["axes"]["seconds"]) == {None} and data["runs"][0]["starts"] == []


def test_damaged_lines_and_events_are_left_out(tmp_path, caplog):
    record = [json.dumps(line) for line in lines(4)]
    record[1] = record[1][:30]
    (tmp_path / "metrics.jsonl").write_text("\n".join(record) + "\n" + record[0][:20])
    events = [
        start(config="not a section") | {"versions": 7, "origin": None},
        event("samples", 10, samples=[3, {"prompt": ["x"]}, None]),
        event("samples", 10, samples="none"),
        event("checkpoint", 20, valid_loss="low"),
        event("bad_step", 20, time=10**400),
        event("end", 20, time=NAN),
    ]
    texts = [*map(json.dumps, events), "null", '{"event": "start"}', "[" * 100_000]
    (tmp_path / "events.jsonl").write_text("\n".join(texts) + "\n")
    data = dashboard_data([str(tmp_path)])
    assert len(curves(data, "Loss")[0, "training"]["values"]) == 3 and not caplog.text
    (run,) = data["runs"]
    assert [mark["kind"] for mark in run["marks"]] == ["start", "checkpoint", "bad_step", "end"]
    assert run["marks"][2]["seconds"] is None and run["samples"][1]["samples"] == [{"prompt": "['x']", "text": ""}]
    write_dashboard(str(tmp_path))
    assert caplog.text.count("cannot be read") == 4


def test_a_text_of_a_run_cannot_leave_its_place_in_the_page(tmp_path):
    run_dir = tmp_path / "<b>&lone\udc80" if sys.getfilesystemencoding() == "utf-8" else tmp_path / "<b>&"
    hostile = "</script><script>alert(1)</script><!-- \u2028 \ud800"
    events = [start(origin=hostile), event("samples", 10, samples=[{"prompt": hostile, "text": hostile}])]
    page = write_dashboard(str(write(run_dir, lines(2), events))).read_text()
    assert "alert(1)</script>" not in page and "<b>" not in page
    assert data_in(page)["runs"][0]["samples"][0]["samples"][0]["text"] == hostile


def test_the_page_holds_all_it_needs_and_the_licence_of_uplot(tmp_path):
    page = write_dashboard(str(write(tmp_path, lines()))).read_text()
    assert "Permission is hereby granted, free of charge" in page and "Leon Sorokin" in page
    assert not re.findall(r"(?:src|href)=[\"']?(?!#|data:)\w", page)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dashboard.html", "events.jsonl", "metrics.jsonl"]


# ----------------------------------------------------------------------------------------------------- training


def test_a_dashboard_that_is_slow_to_write_is_written_rarely(tmp_path, monkeypatch):
    clock = iter([0.0, 0.0, 2.0, 39.0, 40.0, 40.0, 40.5, 41.0, 41.0, 41.5])
    monkeypatch.setattr("txl_dist.tracking.dashboard.dashboard.time", SimpleNamespace(monotonic=lambda: next(clock)))
    file = DashboardFile(str(tmp_path))
    written = []
    for _ in range(4):
        file.update()
        written.append((tmp_path / "dashboard.html").exists())
        (tmp_path / "dashboard.html").unlink(missing_ok=True)
    assert written == [True, False, True, True]


def test_training_writes_the_dashboard_and_names_it(run, small, tmp_path):
    run_dir = tmp_path / "run"
    first = run("txl_dist.train", *small, f"run.dir={run_dir}", "train.stop_at=10").stdout
    assert f"dashboard             {run_dir}/dashboard.html\n" in first
    data = data_in((run_dir / "dashboard.html").read_text())
    assert data["runs"][0]["last"]["step"] == 10 and data["runs"][0]["state"] == "ended"
    (run_dir / "dashboard.html").unlink()
    (run_dir / "dashboard.html").mkdir()  # cannot be written
    done = run("txl_dist.train", *small, f"run.dir={run_dir}")
    assert (done.stdout + done.stderr).count("the dashboard cannot be written") == 1
    assert "Is a directory); training continues" in done.stdout + done.stderr
    assert (run_dir / "finished.json").is_file()


def test_the_dashboard_is_written_at_an_evaluation(tmp_path, caplog):
    tracking = SimpleNamespace(to=[], mode="disabled")
    job = SimpleNamespace(run=SimpleNamespace(dir=str(tmp_path)), tracking=tracking)
    page = tmp_path / "dashboard.html"
    with Tracker(job, 0, 0, 10, records=True) as tracker:
        tracker.log({"step": 1, "tokens": 5, "train/loss": 2.0})
        assert not page.exists()
        tracker.log({"step": 2, "tokens": 9, "train/loss": 2.0, "valid/loss": 1.0})
        assert data_in(page.read_text())["runs"][0]["last"]["step"] == 2
    with Tracker(job, 2, 256, 10, records=False) as tracker:
        page.unlink()
        tracker.log({"step": 3, "tokens": 12, "valid/loss": 1.0})
    assert not page.exists() and not caplog.records


# ------------------------------------------------------------------------------------------------------ command


def test_the_command_writes_a_page_for_one_run_or_several(run, tmp_path):
    for name in ("a", "b"):
        write_usual(tmp_path / "runs" / name)
    (tmp_path / "runs" / "empty").mkdir()
    one = run("txl_dist.dashboard", "run=runs/a", cwd=tmp_path).stdout
    assert one == "runs/a/dashboard.html\n" and (tmp_path / "runs/a/dashboard.html").is_file()
    several = run("txl_dist.dashboard", "run=runs/*", cwd=tmp_path).stdout
    assert several == "dashboard.html\n"
    names = [shown["name"] for shown in data_in((tmp_path / "dashboard.html").read_text())["runs"]]
    assert names == ["a", "b"]
    run("txl_dist.dashboard", "run=[runs/b,runs/a]", f"to={tmp_path}/page.html", cwd=tmp_path)
    assert data_in((tmp_path / "page.html").read_text())["title"] == "2 runs"


@pytest.mark.parametrize(
    "arguments, problem",
    [
        (["run=nowhere"], "run=nowhere: there is no such run directory"),
        (["run=nowhere/*"], "run=nowhere/*: matches no run directory with metrics.jsonl or events.jsonl"),
        (["run=.", "to=."], "to=.: is not the name of a page; give one that ends with .html"),
        (["run=.", "to=x.html", "serve=true"], "to=x.html: with serve=true no file is written"),
        (["run=.", "port=70000"], "port=70000: should be"),
    ],
)
def test_mistakes_are_refused_with_their_key(run, tmp_path, arguments, problem):
    assert problem in run("txl_dist.dashboard", *arguments, cwd=tmp_path, expect=2).stderr


def test_the_command_imports_no_torch(tmp_path):
    write_usual(tmp_path)
    code = (
        "import sys\nsys.argv[1:] = ['run=.']\nfrom txl_dist.dashboard import main\nmain()\n"
        "print(*{'torch', 'deepspeed', 'safetensors', 'wandb', 'matplotlib'} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "\n"), done.stderr


@pytest.fixture
def served(tmp_path):
    """Serve a run; yields its directory and the address."""
    run_dir = write_usual(tmp_path / "run")
    with serving(f"{tmp_path}/*") as address:
        yield run_dir, address


def fetch(address, **headers):
    with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=60) as answer:
        return answer.status, answer.read().decode()


def test_new_data_are_served_where_there_are_some(served):
    run_dir, address = served
    page = data_in(fetch(address)[1])
    query = urllib.request.quote(page["version"], safe="")
    assert fetch(f"{address}data?{query}") == (204, "")
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 410, "tokens": 410000, "train/loss": 2.0}\n')
    status, text = fetch(f"{address}data?{query}")
    assert status == 200 and json.loads(text)["runs"][0]["last"]["step"] == 410
    write_usual(run_dir.parent / "second")
    assert len(json.loads(fetch(f"{address}data?")[1])["runs"]) == 2
    shutil.rmtree(run_dir.parent / "second")


def test_only_browsers_of_this_machine_are_answered(served):
    _, address = served
    for path, headers, status in (("", {"Host": "evil.example"}, 403), ("../etc/passwd", {}, 404)):
        with pytest.raises(urllib.error.HTTPError) as refused:
            fetch(address + path, **headers)
        assert refused.value.code == status


def test_a_port_in_use_is_refused(run, tmp_path):
    write_usual(tmp_path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refused = run("txl_dist.dashboard", f"run={tmp_path}", "serve=true", f"port={port}", expect=2)
    assert f"port={port}: is in use; give another one, or port=0" in refused.stderr
