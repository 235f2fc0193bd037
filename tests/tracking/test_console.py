"""Foreign texts on the screen: paths, tokens, names."""

import subprocess
import sys

import pytest

from txl_dist import evaluate, inspect, recl, score
from txl_dist.distributed.logs import RunLog
from txl_dist.evaluation.scoring import TokenScore
from txl_dist.tracking.console import ConsoleReporter, PlainConsole

NAMES = ["[red]x", "[/bold]", "a [b] c", ":bug:", "x\\"]


@pytest.mark.parametrize("name", NAMES)
def test_no_command_reads_a_name_as_markup(monkeypatch, capsys, name):
    monkeypatch.setenv("COLUMNS", "200")
    scores = {"step": 1, "tgt_len": 8, "mem_len": 8, "loss": 1.0, "word_perplexity": 2.0, "bits_per_character": 1.0}
    evaluate.show({"run": name, **scores})
    evaluate.compare([{"run": name, **scores}, {"run": "other", **scores}])
    recl.show({name: {0.1: 8, 0.5: 8, 1.0: 8}})
    held = {"tensors": 1, "numbers": 1, "files": 1, "bytes": 1}
    imported = {"from": name, "title": "a model"}
    data = {"dir": name, "vocab_size": 9}
    contents = {"path": name, "other_steps": [], "imported": imported, "written_by": {}, "data": data}
    contents |= {"holds": {"weights": held}}
    inspect.show(contents, verified=False)
    PlainConsole().print(score.table("token", [TokenScore(1, name, -1.0)]))
    out = capsys.readouterr().out
    assert out.count(name) == 7, out


@pytest.mark.parametrize("name", NAMES)
def test_the_console_of_a_run_says_what_it_is_given(capsys, tmp_path, name):
    with RunLog(str(tmp_path)):
        reporter = ConsoleReporter(0, 10, shown=True)
        reporter.say(f"{name}: starting")
        reporter.close()
    assert capsys.readouterr().out == f"{name}: starting\n"


def test_a_run_continues_if_its_standard_output_fails():
    """Including Python's own shutdown, which writes what is still in buffers."""
    code = (
        "from txl_dist.distributed.logs import RunLog\n"
        "from txl_dist.tracking.console import ConsoleReporter\n"
        "with RunLog('nowhere'):\n"
        "    reporter = ConsoleReporter(0, 10, shown=True)\n"
        "    reporter.say('one'); reporter.say('two'); reporter.show('three'); reporter.close()\n"
        "    print('four', flush=True)"
    )
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True)
        assert done.returncode == 0
        assert done.stderr == "standard output: No space left on device; the run continues without it\n"
        assert subprocess.run([sys.executable, "-c", code], stdout=full, stderr=full).returncode == 0
