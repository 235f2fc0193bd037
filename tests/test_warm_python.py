"""The interpreter that has imported everything already does what the real one does."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.warm_python import REPO

SCRIPT = """
import os, signal, sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

class Number:
    pass

if __name__ == "__main__":
    print(sys.argv, sys.path[0], os.getcwd(), os.environ.get("WANDB_NOTES"), sys.stdin.read(), flush=True)
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        print(pool.submit(Number).result().__module__, flush=True)
    if sys.argv[1] == "exit":
        sys.exit(3)
    if sys.argv[1] == "words":
        sys.exit("in words")
    if sys.argv[1] == "error":
        raise ValueError("wrong")
    if sys.argv[1] == "signal":
        os.kill(os.getpid(), signal.SIGKILL)
"""


def ended(python, folder, *words, **environment):
    done = subprocess.run(
        [python, *words],
        cwd=folder,
        input="some\ntext",
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"} | environment,
        timeout=300,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("end, code", [("", 0), ("exit", 3), ("words", 1), ("error", 1), ("signal", -9)])
def test_a_script_and_a_module_run_as_they_do_in_the_real_one(python, tmp_path, end, code):
    (tmp_path / "script.py").write_text(SCRIPT)
    for words in (["-m", "script", end], [str(tmp_path / "script.py"), end]):
        warm, real = (
            ended(interpreter, tmp_path, *words, WANDB_NOTES="note") for interpreter in (python, sys.executable)
        )
        assert warm[:2] == real[:2] and warm[0] == code and "Number" not in warm[1]
        assert warm[2].splitlines()[-1:] == real[2].splitlines()[-1:]


def test_what_is_imported_is_there_unless_an_import_may_depend_on_the_environment(python, tmp_path):
    (tmp_path / "script.py").write_text("import sys\nprint('torch' in sys.modules)")
    for environment, output in (
        ({}, "True\n"),
        ({"MPLBACKEND": "svg"}, "False\n"),
        ({"PYTHONHASHSEED": "1"}, "False\n"),
    ):
        assert ended(python, tmp_path, "script.py", **environment) == (0, output, "")
    assert ended(python, tmp_path, "-c", "import sys; print('torch' in sys.modules)") == (0, "False\n", "")


def test_signals_are_passed_on(python, tmp_path):
    """And a process that is killed leaves nothing behind."""
    lines = ["import os, signal, sys", "signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))"]
    lines += ["print(os.getpid(), flush=True)", "signal.pause()"]
    (tmp_path / "script.py").write_text("\n".join(lines))
    for number, code in ((signal.SIGUSR1, -signal.SIGUSR1), (signal.SIGTERM, 7), (signal.SIGKILL, -signal.SIGKILL)):
        start = subprocess.Popen([python, tmp_path / "script.py"], stdout=subprocess.PIPE, text=True)
        child = int(start.stdout.readline())
        start.send_signal(number)
        assert start.wait(60) == code
        start.stdout.read()  # until the child has ended, too
        with pytest.raises(ProcessLookupError):
            for _ in range(1000):
                os.kill(child, 0)
                time.sleep(0.01)
