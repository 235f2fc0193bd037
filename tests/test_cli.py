"""Commands as a shell starts them: their output, their input, their errors, and what they print to be pasted."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from txl_dist.cli import errors_reported
from txl_dist.data.store import how_to_prepare
from txl_dist.tracking.result import show_result

REPO = Path(__file__).resolve().parents[1]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def trained(run, small, tmp_path_factory):
    """A run whose directory has a name of all that shells and grammars stumble over, and what its training printed."""
    run_dir = tmp_path_factory.mktemp("cli") / "it's my $x$ книга =1, [2] (3)"
    return run_dir, run("txl_dist.train", *small, f"run.dir={run_dir}", "train.max_steps=1").stdout


def start(module, *arguments, **options):
    command = [sys.executable, "-m", f"txl_dist.{module}", *map(str, arguments)]
    return subprocess.run(command, cwd=REPO, env=ENVIRONMENT, timeout=300, **options)


def test_what_training_prints_can_be_pasted(trained):
    commands = [line[line.index("python -m") :] for line in trained[1].splitlines() if "python -m" in line]
    assert len(commands) == 2
    for command in commands:
        line = f"{sys.executable} {command.removeprefix('python ')} {'max_tokens=1' if 'generate' in command else ''}"
        done = subprocess.run(["bash", "-c", line], cwd=REPO, env=ENVIRONMENT, capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout, done.stderr


def test_a_run_without_a_valid_split_is_not_sent_to_it(capsys, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "tokens": 5, "train/loss": 2.0}\n')
    job = SimpleNamespace(run=SimpleNamespace(dir=str(tmp_path)), train=SimpleNamespace(max_steps=1))
    for splits, split in ((["train", "valid", "test"], "valid"), (["train", "test"], "test"), (["train"], "train")):
        show_result(job, splits)
        assert f"split={split}\n" in capsys.readouterr().out


def test_the_command_that_makes_data_can_be_pasted():
    assert how_to_prepare("my data/ptb-word") == "python -m txl_dist.prepare corpus=ptb 'data.dir=my data/ptb-word'"


@pytest.mark.parametrize(
    "module, arguments",
    [
        ("prepare", ["--help"]),
        ("generate", ["prompt=a", "max_tokens=9"]),
        ("evaluate", ["format=json", "max_tokens=5"]),
    ],
)
def test_a_reader_that_leaves_is_no_trace(trained, module, arguments):
    reader, writer = os.pipe()
    os.close(reader)
    given = arguments if module == "prepare" else [f"run={trained[0]}", *arguments]
    done = start(module, *given, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


def test_output_that_cannot_be_written_is_told(trained):
    with open("/dev/full", "w") as full:
        done = start("inspect", f"run={trained[0]}", stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (1, "Stopped:\n  standard output: No space left on device\n")


def test_any_encoding_of_the_output_will_do(run, trained):
    options = [f"run={trained[0]}", "prompt=é", "max_tokens=0"]
    assert run("txl_dist.generate", *options, PYTHONIOENCODING="ascii").stdout == "\\xe9\n"
    refused = run("txl_dist.inspect", "run=caf\udce9", expect=2, PYTHONIOENCODING="ascii")
    assert "run=caf\\udce9: is not UTF-8" in refused.stderr


def test_standard_input_is_bytes(trained, run):
    done = start("generate", f"run={trained[0]}", "max_tokens=0", input=b"caf\xe9\r\n", capture_output=True)
    assert done.stdout.decode() == "caf\ufffd\r\n\n"
    closed = start("generate", f"run={trained[0]}", capture_output=True, text=True, preexec_fn=lambda: os.close(0))
    assert closed.returncode == 2 and "prompt: is missing, and standard input is closed" in closed.stderr


def test_flags_may_come_after_the_overrides(run):
    assert "sample_tokens: 64" in run("txl_dist.prepare", "data.sample_tokens=64", "--cfg", "job", "workers=1").stdout
    assert "_completion()" in run("txl_dist.prepare", "--shell-completion", "install=bash").stdout


def test_what_the_operating_system_refuses_is_no_trace(capsys):
    """Whichever file it was, also where nothing else has answered for it."""
    with pytest.raises(SystemExit) as end, errors_reported():
        Path("/proc/none/such").write_text("")
    assert end.value.code == 1 and "/proc/none/such: No such file or directory" in capsys.readouterr().err
