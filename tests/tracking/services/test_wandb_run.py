"""The W&B run of a run directory, without training: its ID, where its settings come from, and what can be wrong."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import wandb

from tests.tracking.services.wandb_files import read_starts
from txl_dist.config.schema import TrackingConfig
from txl_dist.tracking.services.wandb_settings import default_mode, refused_settings

REPO = Path(__file__).resolve().parents[3]


pytestmark = pytest.mark.usefixtures("bare")


def tracking(mode="offline", project=None, name=None, **keys):
    return TrackingConfig(mode, log_every=1, project=project, name=name, **keys)


def wandb_id(run_dir):
    return (run_dir / "wandb_id").read_text().strip()


# ------------------------------------------------------------------------------------------------------ settings

WRONG = {
    "WANDB_MODE": "foo",
    "WANDB_SILENT": "banana",
    "WANDB_RUN_ID": "a/b",
    "WANDB_PROJECT": "a/b",
    "WANDB_NAME": "n" * 129,
    "WANDB_RUN_GROUP": "g" * 200,
    "WANDB_JOB_TYPE": "j" * 65,
    "WANDB_TAGS": "one,,two",
    "WANDB_BASE_URL": "nonsense",
    "WANDB_RESUME": "sometimes",
    "WANDB_RESUME_FROM": "other?_step=3",
    "WANDB_FINISH_TIMEOUT": "soon",
    "WANDB_CONFIG_PATHS": "there",
    "WANDB_API_KEY": " secret ",
}


def test_every_variable_that_wandb_refuses_is_named(monkeypatch):
    assert list(refused_settings(tracking())) == []
    for name, value in WRONG.items():
        monkeypatch.setenv(name, value)
    refused = list(refused_settings(tracking()))
    assert [line.partition(":")[0] for line in refused] == sorted(WRONG)
    assert any(line.startswith("WANDB_MODE: W&B refuses it (Input should be 'online'") for line in refused)
    assert all("\n" not in line and "validation error" not in line and "secret" not in line for line in refused)


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("project", "a/b", "cannot contain"),
        ("project", "p" * 200, "128 characters"),
        ("name", "n" * 129, "129 characters, and W&B accepts 128"),
        ("entity", "us/them", "is not the name of a W&B user or team"),
        ("group", "g" * 129, "129 characters, and W&B accepts 128"),
        ("job_type", "j" * 65, "65 characters, and W&B accepts 64"),
        ("tags", ["good", "t" * 65], "Tags must be between 1 and 64 characters"),
    ],
)
def test_a_key_that_wandb_refuses_is_named(key, value, words):
    (line,) = refused_settings(tracking(**{key: value}))
    assert line.startswith(f"tracking.{key}") and words in line


def test_variables_are_checked_with_the_config(run, small, tmp_path):
    keys = ["tracking.mode=auto", "tracking.project=a?b", f"tracking.tags=[{'x' * 65}]"]
    command = [*small, f"run.dir={tmp_path}/run", *keys]
    done = run("txl_dist.train", *command, expect=2, WANDB_MODE="foo", WANDB_TAGS="x" * 70)
    assert "The config has 4 problems" in done.stderr and "Traceback" not in done.stderr
    for name in ("WANDB_MODE", "WANDB_TAGS", "tracking.project", "tracking.tags"):
        assert f"  {name}: W&B refuses it (" in done.stderr
    assert not (tmp_path / "run").exists()


def test_variables_are_taken_where_the_config_has_its_default(start, monkeypatch, tmp_path):
    given = {"PROJECT": "mine", "NAME": "called", "RUN_ID": "this-one", "ENTITY": "us", "RUN_GROUP": "group"}
    given |= {"NOTES": "some words", "TAGS": "one,two", "MODE": "offline"}
    for name, value in given.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    said, facts = start(tmp_path / "run", mode="auto")
    assert said == []
    assert (facts.project, facts.run_name, facts.run_id, facts.entity) == ("mine", "called", "this-one", "us")
    assert (facts.run_group, facts.run_notes, facts.run_tags) == ("group", "some words", ("one", "two"))
    assert wandb_id(tmp_path / "run") == "this-one"


def test_keys_of_the_config_go_before_variables(start, monkeypatch, tmp_path):
    keys = {"entity": "us", "group": "seeds", "job_type": "train", "tags": ["one", "two"], "notes": "some words"}
    monkeypatch.setenv("WANDB_ENTITY", "them")
    monkeypatch.setenv("WANDB_TAGS", "one,two")
    said, _ = start(tmp_path / "run", **keys)
    assert said == ["W&B: not taken from the environment: WANDB_ENTITY (tracking.entity has us)"]
    (part,) = read_starts(tmp_path / "run")
    run = part["run"]
    assert (run.entity, run.run_group, run.job_type, list(run.tags), run.notes) == tuple(keys.values())


@pytest.mark.parametrize("mode, parts", [("disabled", 0), ("dryrun", 1), ("offline", 1)])
def test_the_mode_of_the_environment_is_taken(start, monkeypatch, tmp_path, mode, parts):
    monkeypatch.setenv("WANDB_MODE", mode)
    said, _ = start(tmp_path / "run", mode="auto", steps=(5, 6))
    assert said == [] and len(read_starts(tmp_path / "run")) == parts
    assert [int(row["_step"]) for part in read_starts(tmp_path / "run") for row in part["history"]] == [5, 6] * parts


def test_a_key_that_is_none_keeps_the_run_offline(start, monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_API_KEY", "short")
    said, _ = start(tmp_path / "run", mode="auto")
    assert len(said) == 1 and "this run is kept offline" in said[0] and "short" not in said[0]
    assert len(read_starts(tmp_path / "run")) == 1


def test_what_the_config_or_the_run_has_is_kept_and_said(start, monkeypatch, tmp_path):
    _, first = start(tmp_path / "run")
    assert (first.project, first.run_name) == ("txl_dist", "run")
    for name in ("PROJECT", "NAME", "RUN_ID", "DIR"):
        monkeypatch.setenv(f"WANDB_{name}", "/other" if name == "DIR" else "other")
    said, second = start(tmp_path / "run", project="theirs", name="named")
    assert (second.project, second.run_name, second.run_id) == ("theirs", "named", first.run_id)
    (line,) = said
    for words in ("WANDB_PROJECT (tracking.project has theirs)", "WANDB_NAME (tracking.name has named)"):
        assert words in line
    assert f"WANDB_RUN_ID (RUN_DIR/wandb_id has {first.run_id})" in line
    assert f"WANDB_DIR (run.dir has {tmp_path}/run)" in line
    assert len(read_starts(tmp_path / "run")) == 2


@pytest.fixture
def mode_by_default():
    yield lambda: default_mode(wandb.setup().settings)
    wandb.teardown()


KEY = "machine {} login user password " + "0" * 40 + "\n"


@pytest.mark.parametrize(
    "host, url, settings, mode",
    [
        ("api.wandb.ai", None, None, "online"),
        ("wandb.example.org", "https://wandb.example.org", None, "online"),
        ("wandb.example.org:8080", "http://wandb.example.org:8080", None, "online"),
        ("api.wandb.ai", "https://wandb.example.org", None, "offline"),
        ("wandb.example.org", None, None, "offline"),
        ("wandb.example.org", None, "base_url = https://wandb.example.org", "online"),
        ("api.wandb.ai", None, "mode = offline", "offline"),
    ],
)
def test_auto_is_online_with_a_key_for_the_server_in_use(
    mode_by_default, monkeypatch, tmp_path, host, url, settings, mode
):
    """settings: what `wandb login --host` and `wandb offline` write."""
    (tmp_path / "netrc").write_text(KEY.format(host))
    if url:
        monkeypatch.setenv("WANDB_BASE_URL", url)
    if settings:
        (tmp_path / "home/.config/wandb").mkdir(parents=True)
        (tmp_path / "home/.config/wandb/settings").write_text(f"[default]\n{settings}\n")
    assert mode_by_default() == mode


def test_a_netrc_that_cannot_be_read_is_no_key(mode_by_default, tmp_path):
    for content in (b"\xff\xfe", b"machine"):
        (tmp_path / "netrc").write_bytes(content)
        assert mode_by_default() == "offline"


# ------------------------------------------------------------------------------------------------------------ id


def test_a_copied_run_directory_is_a_run_of_its_own(start, tmp_path):
    original, copy = tmp_path / "original", tmp_path / "copy"
    _, first = start(original)
    shutil.copytree(original, copy, symlinks=True)
    said, second = start(copy)
    assert second.run_id != first.run_id and wandb_id(copy) == second.run_id
    assert said == [
        f"{copy}: is a copy of {original}, which is W&B run {first.run_id}; this one becomes one of its own"
    ]
    for run_dir, facts in ((original, first), (copy, second)):
        said, again = start(run_dir, steps=(2,))
        assert said == [] and again.run_id == facts.run_id


def test_a_moved_run_directory_is_the_same_run(start, tmp_path):
    before, after = tmp_path / "before", tmp_path / "after"
    _, first = start(before)
    before.rename(after)
    start(before)  # another run, at the old place
    said, second = start(after)
    assert second.run_id == first.run_id and len(said) == 1
    assert f"was {before} before, and stays W&B run {first.run_id}" in said[0]
    assert start(after)[0] == []


def test_one_directory_at_two_places_is_one_run(start, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "run")
    _, first = start(tmp_path / "run")
    assert start(tmp_path / "link")[1].run_id == first.run_id
    (tmp_path / "mount").mkdir()
    bound = subprocess.run(["mount", "--bind", tmp_path / "run", tmp_path / "mount"], capture_output=True)
    if bound.returncode:
        pytest.skip(f"no file system can be mounted here: {bound.stderr.decode().strip()}")
    try:
        assert start(tmp_path / "mount")[1].run_id == first.run_id
    finally:
        subprocess.run(["umount", tmp_path / "mount"], check=True)
    names = ["events.jsonl", "metrics.jsonl", "wandb", "wandb_id", "wandb_path"]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == names


def test_a_run_directory_of_an_earlier_version_keeps_its_id(start, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/wandb_id").write_text("0a1b2c3d\n")
    for _ in range(2):
        said, facts = start(tmp_path / "run")
        assert said == [] and facts.run_id == wandb_id(tmp_path / "run") == "0a1b2c3d"


DAMAGES = [b"", b"\n", b"\xff\xfe\x00", b"a/b", b"two\nlines", b"x" * 200, b"\x00" * 8]


def test_a_damaged_id_is_restored_from_wandbs_own_files(start, tmp_path):
    _, first = start(tmp_path / "run")
    for damage in DAMAGES:
        (tmp_path / "run/wandb_id").write_bytes(damage)
        said, facts = start(tmp_path / "run")
        assert facts.run_id == wandb_id(tmp_path / "run") == first.run_id
        assert said == [f"{tmp_path}/run/wandb_id: does not hold a W&B ID; W&B's own files have {first.run_id}"]
    shutil.rmtree(tmp_path / "run/wandb")
    (tmp_path / "run/wandb_id").write_bytes(b"")
    (tmp_path / "run/wandb_path").write_bytes(b"\xff\x00")
    said, facts = start(tmp_path / "run")
    assert facts.run_id == wandb_id(tmp_path / "run") != first.run_id
    assert said == [f"{tmp_path}/run/wandb_id: does not hold a W&B ID; a new one is made"]
    assert start(tmp_path / "run")[0] == []


# -------------------------------------------------------------------------------------------------------- broken


@pytest.mark.parametrize("name", ["wandb_id", "wandb_path", "wandb"])
def test_something_else_in_a_files_place_leaves_wandb_out(start, tmp_path, name):
    path = tmp_path / "run" / name
    path.parent.mkdir()
    path.write_text("") if name == "wandb" else path.mkdir()
    said, facts = start(tmp_path / "run", end="preempted")
    assert facts is None and len(said) == 1
    assert said[0].startswith("W&B is left out (") and str(path) in said[0] and "training continues" in said[0]


@pytest.mark.parametrize("content", ["mode = offline", "[default]\nmode = foo", "[default]\nproject = a/b"])
def test_settings_that_wandb_cannot_use_are_one_line(start, tmp_path, capfd, content):
    (tmp_path / "work/wandb").mkdir()
    (tmp_path / "work/wandb/settings").write_text(content)
    wandb.termsetup(wandb.Settings(), None)  # as at the first start in a process: later ones are silent
    said, facts = start(tmp_path / "run", mode="auto")
    assert len(said) == 1 and said[0].startswith("W&B: ") and f"{tmp_path}/work/wandb/settings" in said[0]
    assert facts.project == "txl_dist" and capfd.readouterr().err == ""


def test_damaged_settings_leave_wandb_out(start, monkeypatch, tmp_path):
    (tmp_path / "work/wandb").mkdir()
    (tmp_path / "work/wandb/settings").write_bytes(b"\xff\xfe")
    said, facts = start(tmp_path / "run", mode="auto")
    assert facts is None and len(said) == 1 and said[0].startswith("W&B is left out (")
    (tmp_path / "work/wandb/settings").unlink()
    monkeypatch.setenv("WANDB_SERVICE", "nonsense")
    said, facts = start(tmp_path / "run", mode="auto")
    assert facts is None and len(said) == 1 and said[0].startswith("W&B is left out (")


def test_a_full_disk_stops_wandb_only(start, tmp_path, capfd):
    (tmp_path / "disk").mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path / "disk"], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        (tmp_path / "disk/ballast").write_bytes(bytes(48 << 10))
        (tmp_path / "run").mkdir()
        (tmp_path / "run/wandb").symlink_to(tmp_path / "disk")
        for _ in range(2):
            said, _ = start(tmp_path / "run", steps=range(1, 500))
        assert len(said) == 1 and "No space left on device); training continues" in said[0], said
        assert wandb_id(tmp_path / "run")
        assert "Traceback" not in capfd.readouterr().err
    finally:
        subprocess.run(["umount", tmp_path / "disk"], check=True)


@pytest.mark.slow
def test_a_broken_package_is_left_out_and_not_imported_where_it_is_disabled(run, small, metrics, tmp_path):
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb/__init__.py").write_text("print('imported')\nraise RuntimeError('broken')\n")
    for mode in ("disabled", "offline"):
        overrides = [*small, f"run.dir={tmp_path}/{mode}", f"tracking.mode={mode}", "train.stop_at=2"]
        done = run("txl_dist.train", *overrides, PYTHONPATH=f"{tmp_path}{os.pathsep}{REPO}", WANDB_TAGS="one")
        left_out = "W&B is left out (broken); training continues, and metrics.jsonl has everything"
        assert done.stdout.count(left_out) == (mode == "offline")
        assert ("imported" in done.stdout) == (mode == "offline") and "Traceback" not in done.stderr
        assert len(metrics(tmp_path / mode)) == 2
