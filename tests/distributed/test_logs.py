"""Messages of all ranks: on the screen, in the job's log and in the ranks' own files."""

import logging
import re
from pathlib import Path

import pytest

from tests.conftest import without_torchrun
from txl_dist.distributed.logs import RunLog

RANKS = Path(__file__).parent / "logging_ranks.py"
TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}"
LIBRARIES = ["DeepSpeed", "torch", "another library", "Python"]


@pytest.fixture(scope="module")
def start(run, tmp_path_factory):
    """Have two ranks log and end; return what they print, and their files."""

    def start(end, code, make=True):
        run_dir = tmp_path_factory.mktemp("logs") / "run"
        if make:
            run_dir.mkdir()
        done = run(RANKS, run_dir, end, processes=2, expect=code)
        return done, {path.name: path.read_text() for path in run_dir.glob("logs/*")}

    return start


@pytest.fixture(scope="module")
def logged(start):
    return start("well", 0)


def test_rank_zero_speaks_on_standard_output_as_it_is(logged):
    assert logged[0].stdout.splitlines()[-2:] == ["a message of rank 0", "a warning of rank 0"]
    assert "rank 1" not in logged[0].stdout
    assert logged[0].stderr.count("an error of rank 0\n") == 1


def test_the_warnings_of_other_ranks_have_time_and_rank(logged):
    stderr = logged[0].stderr
    for level, words in (("WARNING", "a warning of rank 1"), ("ERROR", "an error of rank 1")):
        (line,) = [line for line in stderr.splitlines() if words in line]
        assert re.fullmatch(rf"{TIME} rank 1 {level} txl_dist\.some\.module: {words}", line)
    assert "a message of rank 1" not in logged[0].stdout + stderr


def test_each_rank_has_a_file_of_warnings_and_errors(logged):
    _, files = logged
    assert sorted(files) == ["rank-0.log", "rank-1.log"]
    for rank, text in enumerate(files[name] for name in sorted(files)):
        assert len(re.findall(rf"^{TIME} rank {rank} (?:WARNING|ERROR) ", text, re.MULTILINE)) == 2 + len(LIBRARIES)
        assert f"a warning of rank {rank}" in text and f"an error of rank {rank}" in text
        assert f"of rank {1 - rank}" not in text and "a message" not in text
        for library in LIBRARIES:
            assert text.count(f"a warning of {library}\n") == 1, library


def test_deepspeed_and_torch_write_to_the_files_only(logged):
    """Warnings that Python prints if logging is not configured are still printed, once by each rank."""
    stderr = logged[0].stderr
    assert [stderr.count(f"a warning of {library}\n") for library in LIBRARIES] == [0, 0, 2, 2]


def test_logging_is_as_before_after_a_run(logged):
    assert logged[0].stderr.count("a warning after the run\n") == 2


def test_a_config_error_is_in_the_files_of_all_ranks(start):
    done, files = start("config", 1)
    assert without_torchrun(done.stderr).count("must be a multiple of 2") == 1
    for rank in range(2):
        words = f"rank {rank} ERROR txl_dist: The config has a problem:\n  data.num_lanes=7: must be a multiple of 2\n"
        assert words in files[f"rank-{rank}.log"]


def test_a_fault_is_in_the_file_of_its_rank_with_its_trace(start):
    _, files = start("fault", 1)
    text = files["rank-1.log"]
    assert "rank 1 ERROR txl_dist: Traceback (most recent call last):\n" in text
    assert "ZeroDivisionError: of rank 1\n" in text and "ZeroDivisionError" not in files["rank-0.log"]


def test_nothing_is_made_where_there_is_no_run_directory(start):
    done, files = start("config", 1, make=False)
    assert files == {} and without_torchrun(done.stderr).count("must be a multiple of 2") == 1


def test_a_file_that_cannot_be_written_is_said_once(tmp_path, capsys):
    (tmp_path / "logs").write_text("")
    with RunLog(str(tmp_path)):
        for number in range(3):
            logging.getLogger("txl_dist.module").warning(f"warning {number}")
    first, failure, *others = capsys.readouterr().out.splitlines()
    assert [first, *others] == ["warning 0", "warning 1", "warning 2"]
    assert failure.startswith(f"{tmp_path}/logs") and failure.endswith("; the run continues without this log")


def test_a_full_disk_for_logs_is_said_once(full_disk, capsys):
    with open(full_disk / "ballast", "wb", buffering=0) as ballast, pytest.raises(OSError):
        while True:
            ballast.write(bytes(4096))
    (full_disk / "logs").mkdir(exist_ok=True)
    with RunLog(str(full_disk)):
        for number in range(3):
            logging.getLogger("txl_dist.module").warning(f"warning {number}")
    captured = capsys.readouterr()
    assert captured.out.count("No space left on device; the run continues without this log") == 1
    assert all(f"warning {number}\n" in captured.out for number in range(3)) and "Traceback" not in captured.err
