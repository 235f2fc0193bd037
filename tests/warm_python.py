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
import types
from pathlib import Path
from typing import NamedTuple

REPO = Path(__file__).resolve().parents[1]
PACKAGE = "txl_dist"
# Beside the package's own: what is only imported when it is used.
IMPORTED_LATE = ["torch._dynamo", "torch.distributed.elastic.multiprocessing.errors", "torch.distributed.launcher.api"]
IMPORTED_LATE += ["deepspeed", "deepspeed.runtime.zero.stage3", "deepspeed.runtime.pipe.engine", "hydra.main"]
IMPORTED_LATE += ["deepspeed.runtime.zero.muon.muon_optimizer", "matplotlib.pyplot", "matplotlib.backends.backend_agg"]
# Environment variables that are read when a command runs, not when a library is imported.
READ_LATE = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_",
    "GROUP_",
    "ROLE_",
    "MASTER_",
    "TORCHELASTIC_",
    "TORCH_NCCL_ASYNC",
    "SLURM_",
)
READ_LATE += (
    "TXL_DIST_",
    "TORCHINDUCTOR_CACHE_DIR",
    "WANDB_",
    "PYTEST_",
    "PYTHON_EXEC",
    "PWD",
    "OLDPWD",
    "SHLVL",
    "_",
    "HALT",
)
PASSED_ON = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT]

EXECUTABLE = """#!{python} -IS
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
status = int.from_bytes(server.recv(4), "big")
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
def warm_python(folder: Path):
    """Start a server; yields the path of its executable. Both live until the end of the context, or of this process."""
    path = folder / "python"
    listener = folder / "socket"
    environment = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "tests.warm_python", str(listener)],
            cwd=REPO,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
        )
    assert server.stdout is not None and server.stdin is not None
    if server.stdout.readline() != b"ready\n":
        raise RuntimeError((folder / "log").read_text())
    names = [int(number) for number in PASSED_ON]
    path.write_text(EXECUTABLE.format(python=sys.executable, socket=listener, passed_on=names))
    path.chmod(0o755)
    try:
        yield path
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


def serve(address: str, own: dict[str, str]) -> Call:
    """Fork for each call in whose environment imports go as in one's own.

    Returns in the children only; the parent ends with the process that has started it.
    """
    selector = selectors.DefaultSelector()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(address)
    listener.listen()
    selector.register(listener, selectors.EVENT_READ)
    selector.register(sys.stdin.fileno(), selectors.EVENT_READ)
    callers: dict[int, tuple[socket.socket, int]] = {}  # pidfd -> its caller, its pid
    print("ready", flush=True)
    while True:
        for key, _ in selector.select():
            if key.fileobj is listener:
                caller, _ = listener.accept()
                call, streams = receive(caller)
                if not call or not can_run(call, own):
                    for end in (*streams, caller.detach()):
                        os.close(end)
                    continue
                child = os.fork()
                if child == 0:
                    for other, _ in callers.values():
                        other.close()
                    for fd in callers:
                        os.close(fd)
                    for each in (selector, listener, caller):
                        each.close()
                    for target, source in enumerate(streams):
                        os.dup2(source, target)
                        os.close(source)
                    return call
                for fd in streams:
                    os.close(fd)
                caller.sendall(child.to_bytes(4, "big"))
                ended = os.pidfd_open(child)
                callers[ended] = (caller, child)
                selector.register(ended, selectors.EVENT_READ)
                selector.register(caller, selectors.EVENT_READ, data=child)
            elif key.fileobj == sys.stdin.fileno():  # the tests have ended
                for _, child in callers.values():
                    os.kill(child, signal.SIGKILL)
                os._exit(0)
            elif key.data:  # the caller was killed
                os.kill(key.data, signal.SIGKILL)
                selector.unregister(key.fileobj)
            elif key.fd in callers:
                caller, child = callers.pop(key.fd)
                selector.unregister(key.fd)
                os.close(key.fd)
                with contextlib.suppress(KeyError):
                    selector.unregister(caller)
                status = os.waitpid(child, 0)[1]
                with contextlib.suppress(OSError):
                    caller.sendall(status.to_bytes(4, "big"))
                caller.close()


def receive(caller: socket.socket) -> tuple[Call | None, list[int]]:
    size, streams, _, _ = socket.recv_fds(caller, 4, 3)
    data = b""
    while len(data) < int.from_bytes(size, "big"):
        more = caller.recv(1 << 20)
        if not more:
            return None, streams
        data += more
    return Call(*json.loads(data)), streams


def can_run(call: Call, own: dict[str, str]) -> bool:
    words = [word for word in call.arguments if word != "-u"]
    changed = {name for name in {*own, *call.environment} if own.get(name) != call.environment.get(name)}
    early = sorted(name for name in changed if not name.startswith(READ_LATE))
    if early:
        print(f"not warm, as {', '.join(early)} may be read by imports: {words}", file=sys.stderr, flush=True)
    return not early and (words[0] == "-m" or words[0].endswith(".py"))


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
    execute(serve(sys.argv[1], own))
