"""An executable that stands in for python and has imported everything already: a command starts in 0.1 s, not in 3.

One process, the server, imports what the commands of txl_dist import, runs none of it, and waits. The executable hands
it its arguments, environment, folder and standard streams; the server forks, and the child does what `python -m MODULE`
or `python SCRIPT` does: the module is executed as `__main__`, and the interpreter ends as it always does. Signals are
passed on to the child, its exit code (or the signal that ended it) back. Under torchrun, PYTHON_EXEC makes it the
interpreter of the ranks, too.

What is not the same: all children have one hash seed, bear the server's command line in /proc, and hold modules that a
command alone may never import. Tests of those use sys.executable. Where an environment variable is given that a library
may read when it is imported, the executable replaces itself by the real interpreter.
"""

import builtins
import contextlib
import gc
import importlib
import json
import os
import pkgutil
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

REPO = Path(__file__).resolve().parents[1]
PACKAGE = "txl_dist"
# Beside the package's own: what is only imported when it is used.
IMPORTED_LATE = ["torch._dynamo", "torch.distributed.elastic.multiprocessing.errors", "torch.distributed.launcher.api"]
IMPORTED_LATE += ["deepspeed", "deepspeed.runtime.zero.stage3", "deepspeed.runtime.pipe.engine", "hydra.main"]
IMPORTED_LATE += ["deepspeed.runtime.zero.muon.muon_optimizer", "matplotlib.pyplot", "matplotlib.backends.backend_agg"]
# Environment variables that are read when a command runs, not when a library is imported.
READ_LATE = "RANK WORLD_SIZE LOCAL_ GROUP_ ROLE_ MASTER_ TORCHELASTIC_ TORCH_NCCL_ASYNC TORCHINDUCTOR_CACHE_DIR"
READ_LATE += " TXL_DIST_ SLURM_ WANDB_ HALT PYTEST_ PYTHON_EXEC PWD OLDPWD SHLVL _"
PASSED_ON = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT]

EXECUTABLE = """#!/bin/sh
exec "{python}" -IS "{client}" "$@"
"""
CLIENT = """
import json, os, signal, socket, sys

numbers = {passed_on}
mask = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
try:
    streams = [fd for fd in (0, 1, 2) if os.fstat(fd)]
    server.connect("{socket}")
    call = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(server, [len(call).to_bytes(4, "big")], streams)
    server.sendall(call)
    child = int.from_bytes(server.recv(4), "big")
except OSError:
    child = 0
if not child:
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    os.execv("{python}", ["{python}", *sys.argv[1:]])
def pass_on(number, frame):
    try:
        os.kill(child, number)
    except ProcessLookupError:
        pass
for number in numbers:
    signal.signal(number, pass_on)
signal.pthread_sigmask(signal.SIG_SETMASK, mask)
for fd in streams:
    os.close(fd)
status = server.recv(4)
if len(status) < 4:
    os._exit(70)  # the server has ended
status = int.from_bytes(status, "big")
if os.WIFSIGNALED(status):
    if os.WTERMSIG(status) != signal.SIGKILL:
        signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
    os.kill(os.getpid(), os.WTERMSIG(status))
os._exit(os.waitstatus_to_exitcode(status))
"""


class Call(NamedTuple):
    arguments: list[str]
    folder: str
    environment: dict[str, str]


@contextlib.contextmanager
def warm_python() -> Iterator[str]:
    """Start a server; yields the path of its executable. Both live until the end of the context, or of this process."""
    with tempfile.TemporaryDirectory(prefix="warm-") as name:  # short: it holds a socket
        folder = Path(name)
        names = {"python": sys.executable, "client": folder / "client.py", "socket": folder / "socket"}
        (folder / "python").write_text(EXECUTABLE.format(**names))
        (folder / "python").chmod(0o755)
        (folder / "client.py").write_text(CLIENT.format(**names, passed_on=[int(number) for number in PASSED_ON]))
        with (folder / "log").open("w") as log:
            server = subprocess.Popen(
                [sys.executable, "-m", "tests.warm_python", str(folder / "socket")],
                cwd=REPO,
                env=os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        assert server.stdout is not None and server.stdin is not None
        if server.stdout.readline() != b"ready\n":
            raise RuntimeError((folder / "log").read_text())
        try:
            yield str(folder / "python")
        finally:
            server.stdin.close()
            server.wait()


# ---------------------------------------------------------------------------------------------------- the server


def warm_up() -> None:
    """Import all of the package but its entry points (which are executed, not imported), and what they use.

    The garbage collector leaves that alone from now on: it would look through all of it each time, and write to it, so
    that a forked process copies its pages.
    """
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # as training sets it before it imports torch
    package = importlib.import_module(PACKAGE)
    for module in pkgutil.walk_packages(package.__path__, f"{PACKAGE}."):
        source = Path(module.module_finder.path, module.name.rpartition(".")[2]).with_suffix(".py")  # type: ignore
        if not module.ispkg and ".hub." not in module.name and '__name__ == "__main__"' not in source.read_text():
            importlib.import_module(module.name)
    for name in IMPORTED_LATE:
        importlib.import_module(name)
    del os.environ["TORCH_CPP_LOG_LEVEL"]
    gc.collect()
    gc.freeze()


class Server:
    """Forks for each call in whose environment imports go as in its own. It ends when its standard input does."""

    def __init__(self, address: str, environment: dict[str, str]):
        self.environment = environment
        self.callers: dict[int, socket.socket] = {}  # by the process that runs for them
        self.ends: dict[int, int] = {}  # a process's pidfd: its id
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.bind(address)
        self.listener.listen()
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.listener, selectors.EVENT_READ, self.accept)
        self.selector.register(0, selectors.EVENT_READ, self.end)
        print("ready", flush=True)

    def serve(self) -> Call:
        """Return in the children only."""
        while True:
            key, _ = self.selector.select()[0]  # one at a time, for it may make another one void
            call = key.data(key.fileobj)
            if call:
                return call

    def accept(self, listener: socket.socket) -> Call | None:
        caller, _ = listener.accept()
        call, streams = receive(caller)
        child = os.fork() if call and can_run(call, self.environment) else None
        if child == 0:
            self.become(caller, streams)
            return call
        for fd in streams:
            os.close(fd)
        if child is None:
            caller.close()
            return None
        caller.sendall(child.to_bytes(4, "big"))
        self.callers[child] = caller
        self.ends[os.pidfd_open(child)] = child
        self.selector.register(caller, selectors.EVENT_READ, lambda _: self.kill(child))
        self.selector.register(list(self.ends)[-1], selectors.EVENT_READ, self.reap)
        return None

    def become(self, caller: socket.socket, streams: list[int]) -> None:
        """In a child: keep none of the server's files, and take the caller's standard streams."""
        for resource in (self.selector, self.listener, caller, *self.callers.values()):
            resource.close()
        for fd in self.ends:
            os.close(fd)
        for target, source in enumerate(streams):
            os.dup2(source, target)
            os.close(source)

    def kill(self, child: int) -> None:
        """The caller was killed."""
        self.selector.unregister(self.callers[child])
        os.kill(child, signal.SIGKILL)

    def reap(self, pidfd: int) -> None:
        child = self.ends.pop(pidfd)
        caller = self.callers.pop(child)
        self.selector.unregister(pidfd)
        os.close(pidfd)
        _, status = os.waitpid(child, 0)
        with contextlib.suppress(KeyError, OSError):  # it was killed
            self.selector.unregister(caller)
            caller.sendall(status.to_bytes(4, "big"))
        caller.close()

    def end(self, stdin: int) -> None:
        for child in self.callers:
            os.kill(child, signal.SIGKILL)
        os._exit(0)


def receive(caller: socket.socket) -> tuple[Call | None, list[int]]:
    """Receive a call and its standard streams; None where the caller was killed meanwhile."""
    size, streams, _, _ = socket.recv_fds(caller, 4, 3)
    data = b""
    while len(data) < int.from_bytes(size, "big"):
        more = caller.recv(1 << 20)
        if not more:
            return None, streams
        data += more
    return Call(*json.loads(data)) if data else None, streams


def can_run(call: Call, own: dict[str, str]) -> bool:
    words = [word for word in call.arguments if word != "-u"]
    changed = [name for name in sorted({*own, *call.environment}) if own.get(name) != call.environment.get(name)]
    early = [name for name in changed if not name.startswith(tuple(READ_LATE.split()))]
    if early:
        print(f"not warm, as {', '.join(early)} may be read by imports: {words}", file=sys.stderr, flush=True)
    return not early and bool(words) and (words[0] == "-m" or words[0].endswith(".py"))


def execute(call: Call) -> None:
    """Do what the interpreter does with its command line."""
    os.chdir(call.folder)
    os.environ.clear()  # of what libraries have set, too: a process that has imported fewer hands none of it on
    os.environ.update(call.environment)
    words = call.arguments
    if words[0] == "-u":
        sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
        words = words[1:]
    main = types.ModuleType("__main__")
    main.__dict__["__builtins__"] = builtins
    sys.modules["__main__"] = main
    sys.modules["__mp_main__"] = main  # as multiprocessing has it
    if words[0] == "-m":
        sys.path[0] = call.folder
        sys.argv = ["-m", *words[2:]]
        runpy._run_module_as_main(words[1])  # type: ignore[attr-defined]
    else:
        sys.path[0] = str(Path(words[0]).resolve().parent)
        sys.argv = words
        main.__file__ = words[0]
        exec(compile(Path(words[0]).read_bytes(), words[0], "exec"), main.__dict__)


if __name__ == "__main__":
    own = dict(os.environ)
    warm_up()
    assert len(os.listdir("/proc/self/task")) == 1, "a process with threads cannot be forked"
    execute(Server(sys.argv[1], own).serve())
