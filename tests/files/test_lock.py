"""One process at a time: real processes hold a lock, wait for it, are killed, and seem to run on other hosts."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from select import select

import pytest

from txl_dist.files import lock
from txl_dist.files.lock import InUse, locked

REPO = Path(__file__).resolve().parents[2]
HOLD = """
import sys, time
from txl_dist.files.lock import locked
with locked({path}, "testing"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def hold(tmp_path):
    """Start a process that holds the lock `tmp_path/a.lock` until its standard input ends."""
    started = []

    def hold(prelude="", before=(), wait=True, stderr=None):
        code = prelude + HOLD.format(path=f"__import__('pathlib').Path({str(tmp_path / 'a.lock')!r})")
        process = subprocess.Popen(
            [*before, sys.executable, "-c", code],
            cwd=REPO,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
        started.append(process)
        assert not wait or process.stdout.readline() == "held\n"
        return process

    yield hold
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def refuse(owner):
    return False


def test_the_second_process_learns_who_the_first_is(hold, tmp_path):
    first = hold()
    with pytest.raises(InUse, match=rf"process {first.pid} on .*, testing since 20"), refuse_to_wait(tmp_path):
        pass
    first.communicate("")
    with refuse_to_wait(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == ["a.lock"]
    assert not list(tmp_path.iterdir())


def refuse_to_wait(folder):
    return locked(folder / "a.lock", "testing", refuse)


def test_waiting_processes_take_the_lock_one_after_the_other(hold, tmp_path):
    first = hold()
    others = [hold(wait=False, stderr=subprocess.PIPE) for _ in range(3)]
    for other in others:
        assert f"waiting for process {first.pid} on" in other.stderr.readline()
    assert all(other.poll() is None for other in others)
    first.communicate("")
    for other in others:
        other.stdin.close()
    assert [other.wait(60) for other in others] == [0, 0, 0]
    for other in others:
        assert other.stdout.read() == "held\n"
        other.stderr.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("reaped", [True, False])
def test_the_lock_of_a_killed_process_is_free_at_once(hold, tmp_path, reaped):
    first = hold()
    first.kill()
    if reaped:
        first.wait()
    else:
        os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)  # it is a zombie, and has its number
    with refuse_to_wait(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_of_many_that_find_a_dead_owner_one_takes_the_lock(hold, tmp_path):
    first = hold()
    first.kill()
    first.wait()
    assert len(holders([hold(wait=False) for _ in range(6)])) == 1


def holders(processes):
    """Return which of some processes hold the lock a second after one of them has taken it."""
    outputs = {process.stdout: process for process in processes}
    select(outputs, [], [], 60)
    time.sleep(1)
    return [outputs[stream] for stream in select(outputs, [], [], 0)[0]]


def test_a_process_with_the_number_of_a_dead_owner_is_another(hold, tmp_path):
    first = hold()
    owner = json.loads((tmp_path / "a.lock").read_text())
    first.kill()
    first.wait()
    (tmp_path / "a.lock").write_text(json.dumps(owner | {"pid": os.getpid()}))
    with refuse_to_wait(tmp_path):
        pass


def test_a_copy_of_a_locked_folder_is_not_locked(hold, tmp_path):
    hold()
    shutil.copytree(tmp_path, tmp_path / "copy")
    with refuse_to_wait(tmp_path / "copy"):
        pass


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff", b'{"pid": 5}', b"[" * 9999])
def test_a_file_without_an_owner_is_taken_over_when_nobody_touches_it(tmp_path, monkeypatch, content):
    monkeypatch.setattr(lock, "SILENCE", 0.3)
    (tmp_path / "a.lock").write_bytes(content)
    with locked(tmp_path / "a.lock", "testing"):
        assert json.loads((tmp_path / "a.lock").read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.symlink_to("nowhere")], ids=["folder", "link"])
def test_a_folder_or_link_in_its_place_is_an_error(tmp_path, make):
    make(tmp_path / "a.lock")
    with pytest.raises(OSError, match="a.lock"), refuse_to_wait(tmp_path):
        pass


def test_an_empty_file_of_earlier_versions_is_free_unless_flock_is_held(hold, tmp_path):
    code = "import fcntl, sys\nfile = open('a.lock', 'w')\nfcntl.flock(file, fcntl.LOCK_EX)\nprint(1, flush=True)\n"
    other = subprocess.Popen(
        [sys.executable, "-c", code + "sys.stdin.read()"], cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    other.stdout.readline()
    with pytest.raises(InUse, match="left no name"), refuse_to_wait(tmp_path):
        pass
    other.communicate()
    with refuse_to_wait(tmp_path):
        pass


# ------------------------------------------------------------------------------------------------- other machines

# A process that seems to be on another host, on a file system whose flock ends at the host, with quick heartbeats.
ELSEWHERE = """
from txl_dist.files import lock, owner
owner.kernel = lambda: "another kernel"
lock.flock = lambda handle: None
lock.BEAT = 0.1
"""


@pytest.fixture
def no_flock(monkeypatch):
    monkeypatch.setattr(lock, "flock", lambda handle: None)
    monkeypatch.setattr(lock, "SILENCE", 2.0)


def test_an_owner_on_another_host_is_known_by_its_signs_of_life(hold, tmp_path, no_flock):
    first = hold(ELSEWHERE)
    with pytest.raises(InUse, match=f"process {first.pid}"), refuse_to_wait(tmp_path):
        pass
    first.kill()
    with refuse_to_wait(tmp_path):
        pass


def test_an_owner_that_was_silent_for_too_long_learns_that_it_has_lost(hold, tmp_path, no_flock):
    first = hold(ELSEWHERE)
    first.send_signal(signal.SIGSTOP)
    with refuse_to_wait(tmp_path):
        content = (tmp_path / "a.lock").read_text()
        first.send_signal(signal.SIGCONT)
        first.communicate("")  # it gives nothing up that is not its own
        assert (tmp_path / "a.lock").read_text() == content


def test_lost_is_set_when_another_has_taken_over(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.05)
    with locked(tmp_path / "a.lock", "testing") as held:
        assert not held.lost.wait(0.3)
        (tmp_path / "other").write_text("of another")
        os.replace(tmp_path / "other", tmp_path / "a.lock")
        assert held.lost.wait(10)
    assert (tmp_path / "a.lock").read_text() == "of another"


def test_a_lock_works_without_hard_links(hold, tmp_path):
    no_links = "import os\ndef refuse(*names): raise OSError(95, 'no links here')\nos.link = refuse\n"
    first = hold(no_links)
    with pytest.raises(InUse, match=f"process {first.pid}"), refuse_to_wait(tmp_path):
        pass
    others = [hold(no_links + ELSEWHERE, wait=False) for _ in range(4)]
    first.communicate("")
    assert len(holders(others)) == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a process namespace")
def test_an_owner_in_another_container_is_known_by_flock(hold, tmp_path):
    first = hold(before=["unshare", "--pid", "--fork", "--uts", "--kill-child"])
    with pytest.raises(InUse), refuse_to_wait(tmp_path):
        pass
    first.kill()
    first.wait()
    time.sleep(0.5)  # until its child is gone, too
    with refuse_to_wait(tmp_path):
        pass
