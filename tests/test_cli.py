"""Commands as a shell starts them: flags, completion, output, input, errors, and the commands that they print."""

import os
import re
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
def trained_run(run, small, tmp_path_factory):
    """Train a run in a directory whose name is hard for shells and grammars; return it and what training printed."""
    run_dir = tmp_path_factory.mktemp("cli") / "it's my $x$ книга =1, [2] (3)"
    return run_dir, run("txl_dist.train", *small, f"run.dir={run_dir}", "train.max_steps=1").stdout


def start(module, *arguments, **options):
    command = [sys.executable, "-m", f"txl_dist.{module}", *map(str, arguments)]
    return subprocess.run(command, cwd=REPO, env=ENVIRONMENT, timeout=300, **options)


@pytest.mark.slow
def test_the_commands_that_training_prints_can_be_pasted(trained_run, tmp_path):
    more = {"evaluate": "", "look": f"to={tmp_path}/look.html", "generate": "max_tokens=1"}
    commands = [line[line.index("python -m") :] for line in trained_run[1].splitlines() if "python -m" in line]
    assert len(commands) == len(more)
    for command, options in zip(commands, more.values(), strict=True):
        line = f"{sys.executable} {command.removeprefix('python ')} {options}"
        done = subprocess.run(["bash", "-c", line], cwd=REPO, env=ENVIRONMENT, capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout, done.stderr


def test_a_run_without_a_valid_split_is_shown_another(capsys, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "tokens": 5, "train/loss": 2.0}\n')
    job = SimpleNamespace(run=SimpleNamespace(dir=str(tmp_path)), train=SimpleNamespace(max_steps=1), objective=None)
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
def test_a_reader_that_leaves_causes_no_trace(trained_run, module, arguments):
    reader, writer = os.pipe()
    os.close(reader)
    given = arguments if module == "prepare" else [f"run={trained_run[0]}", *arguments]
    done = start(module, *given, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


def test_output_that_cannot_be_written_is_reported(trained_run):
    with open("/dev/full", "w") as full:
        done = start("inspect", f"run={trained_run[0]}", stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (1, "Stopped:\n  standard output: No space left on device\n")


def test_the_output_may_have_any_encoding(run, trained_run):
    options = [f"run={trained_run[0]}", "prompt=é", "max_tokens=0"]
    assert run("txl_dist.generate", *options, PYTHONIOENCODING="ascii").stdout == "\\xe9\n"
    refused = run("txl_dist.inspect", "run=caf\udce9", expect=2, PYTHONIOENCODING="ascii")
    assert "run=caf\\udce9: is not UTF-8" in refused.stderr


def test_standard_input_is_bytes(trained_run, run):
    done = start("generate", f"run={trained_run[0]}", "max_tokens=0", input=b"caf\xe9\r\n", capture_output=True)
    assert done.stdout.decode() == "caf\ufffd\r\n\n"
    closed = start("generate", f"run={trained_run[0]}", capture_output=True, text=True, preexec_fn=lambda: os.close(0))
    assert closed.returncode == 2 and "prompt: is missing, and standard input is closed" in closed.stderr


ENTRY_POINTS = [
    "train",
    "prepare",
    "evaluate",
    "predict",
    "generate",
    "score",
    "look",
    "recl",
    "inspect",
    "dashboard",
    "convert",
    "plan",
]

# Prints which of the heavy packages an entry point has imported, as the last line of standard error.
LIST_HEAVY_MODULES = """
import importlib, sys
module, *sys.argv[1:] = sys.argv[1:]
main = importlib.import_module(f"txl_dist.{module}").main
try:
    main()
finally:
    heavy = {"torch", "deepspeed", "numpy", "pandas", "matplotlib", "wandb", "webdataset", "safetensors"}
    print(*sorted(heavy & set(sys.modules)), file=sys.stderr)
"""


def heavy_modules(module, *arguments, **environment):
    done = subprocess.run(
        [sys.executable, "-c", LIST_HEAVY_MODULES, module, *arguments],
        cwd=REPO,
        env=ENVIRONMENT | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and done.stdout.strip(), done.stderr
    return done.stderr.splitlines()[-1].split()


@pytest.mark.parametrize("module", ENTRY_POINTS)
def test_help_imports_nothing_heavy(module):
    assert heavy_modules(module, "--help") == []


def test_showing_the_config_and_completion_import_nothing_heavy():
    assert heavy_modules("train", "+experiment=quickstart", "--cfg", "job") == []
    line = "txl-train optimizer="
    assert heavy_modules("train", "-sc", "query=bash", COMP_LINE=line, COMP_POINT=str(len(line))) == []


def test_training_holds_signals_back_before_its_imports():
    """Also as a console script, which imports the module and calls `main`."""
    code = (
        "import signal, sys\n"
        "from txl_dist.train import main\n"
        "assert not {'hydra', 'pydantic', 'torch'} & set(sys.modules)\n"
        "assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])\n"
        "class Watch:\n"
        "    def find_spec(self, name, *rest):\n"
        "        assert signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, []), name\n"
        "sys.meta_path.insert(0, Watch())\n"
        "sys.argv[1:] = ['--help']\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0 and "torchrun" in done.stdout, done.stderr


def test_hydras_flags_work_wherever_they_stand(run):
    assert "sample_tokens: 64" in run("txl_dist.prepare", "data.sample_tokens=64", "--cfg", "job", "workers=1").stdout
    for order in (["+experiment=ptb", "--cfg", "job"], ["--cfg", "job", "+experiment=ptb"]):
        assert "runs/ptb" in run("txl_dist.train", *order).stdout
    refused = run("txl_dist.prepare", "workers=1", "--cfg", "everything", expect=2)
    assert "argument --cfg/-c: invalid choice: 'everything'" in refused.stderr and "usage" not in refused.stderr


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """A folder with the console scripts, as an installation makes them from pyproject.toml."""
    folder = tmp_path_factory.mktemp("scripts")
    declared = re.findall(r'^(txl-\w+) = "(txl_dist\.\w+):main"$', (REPO / "pyproject.toml").read_text(), re.MULTILINE)
    for name, module in declared:
        script = folder / name
        script.write_text(f"#!{sys.executable}\nimport sys\nfrom {module} import main\nsys.exit(main())\n")
        script.chmod(0o755)
    return folder


def test_every_entry_point_has_a_console_script(scripts):
    assert sorted(script.name for script in scripts.iterdir()) == sorted(f"txl-{module}" for module in ENTRY_POINTS)


# Asks bash's own completion, as the Tab key does, and prints its answers.
COMPLETE = r"""
eval "$($1 --shell-completion install=bash)"
COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}; COMP_WORDS=($COMP_LINE); COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
function=$(complete -p $1 | sed 's/.*-F \([a-z_]*\).*/\1/')
$function
printf '%s\n' "${COMPREPLY[@]}"
"""


@pytest.mark.parametrize(
    "words, completions",
    [
        (["txl-train", "optimizer="], ["optimizer=adam", "optimizer=adamw", "optimizer=lamb"]),
        (["txl-train", "+experiment=wt103_l"], ["+experiment=wt103_large", "+experiment=wt103_large_nvidia"]),
        (["txl-train", "--cfg", "job", "data.num_l"], ["data.num_lanes="]),
        (["txl-prepare", "corpus=text"], ["corpus=text", "corpus=text8"]),
    ],
)
def test_bash_completes_groups_experiments_and_keys(scripts, words, completions):
    environment = ENVIRONMENT | {"PATH": f"{scripts}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "--norc", "-c", COMPLETE, "bash", *words], env=environment, capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(done.stdout.split()) == completions


def test_torchrun_repeats_a_refused_config_below_its_trace(run, tmp_path):
    refused = run("txl_dist.train", f"run.dir={tmp_path}/run", "model.zzz=1", processes=2, expect=1).stderr
    message = "model.zzz: there is no such key"
    assert refused.count("Traceback") == 1  # torchrun's own
    before, trace, after = refused.partition("Traceback")
    assert before.count(message) == 1
    assert after.count(message) == 1
    assert after.index("Root Cause") < after.index(message)


def test_what_the_operating_system_refuses_causes_no_trace(capsys):
    """Also where no code has expected it."""
    with pytest.raises(SystemExit) as end, errors_reported():
        Path("/proc/none/such").write_text("")
    assert end.value.code == 1 and "/proc/none/such: No such file or directory" in capsys.readouterr().err
