"""Two hosts on this machine, joined by a link that can be cut.

Each is a set of namespaces (network, host name, processes, mounts) that lives as long as its first process, and that
one reads from a pipe of the tests: nothing stays when they end, whatever happens. As on Debian, a host's own name is
127.0.1.1 to itself; and no host knows the name of the other.
"""

import contextlib
import fcntl
import os
import random
import select
import struct
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

from txl_dist.distributed.launcher import SRUN, TORCHRUN

HERE = Path(__file__).parent
REPO = HERE.parents[1]
PORT = 29500  # of the first rank; each host has all ports for itself
NOWHERE = "02:00:00:00:00:99"
DELAY, LOSS = 0.02, 0.01  # of the slow link, each way
INIT = """
set -e
hostname "$1"
printf '127.0.0.1 localhost\n127.0.1.1 %s\n' "$1" > "$2"
mount --bind "$2" /etc/hosts
ip link set lo up
echo ready
exec cat
"""


class Host:
    def __init__(self, name, address, folder):
        self.name = name
        self.address = address
        command = ["unshare", "--net", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.init = subprocess.Popen([*command, "sh", "-c", INIT, "sh", name, folder / f"{name}.hosts"], **pipes)
        self.pid = self.init.pid
        if self.init.stdout.readline() != b"ready\n":
            raise OSError(self.init.communicate()[1].decode().strip())

    def command(self, *words):
        inside = [f"--target={self.pid}", "--net", "--uts", "--mount", f"--pid=/proc/{self.pid}/ns/pid_for_children"]
        return ["nsenter", *inside, *words]

    def call(self, *words):
        """Change its network, by a command that sees all processes of this machine."""
        done = subprocess.run(["nsenter", f"--target={self.pid}", "--net", *words], capture_output=True, text=True)
        if done.returncode:
            raise OSError(f"{' '.join(map(str, words))}: {done.stderr.strip()}")

    def end(self):
        self.init.communicate()


class Hosts:
    """As a context. slow: with a link that delays packets and loses some."""

    def __init__(self, folder, slow=False):
        self.folder = Path(folder)
        self.slow = slow

    def __enter__(self):
        with contextlib.ExitStack() as undo:
            self.both = []
            for name, address in (("hosta", "10.77.0.1"), ("hostb", "10.77.0.2")):
                self.both.append(Host(name, address, self.folder))
                undo.callback(self.both[-1].end)
            a, b = self.both
            if self.slow:
                command = [sys.executable, "-m", "tests.distributed.two_hosts", str(a.pid), str(b.pid)]
                pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
                wire = subprocess.Popen(command, cwd=REPO, **pipes)
                undo.callback(wire.wait)
                undo.callback(wire.kill)
                if wire.stdout.readline() != "ready\n":
                    raise OSError(wire.stderr.read().splitlines()[-1])
            else:
                a.call("ip", "link", "add", "link0", "type", "veth", "peer", "name", "link0", "netns", str(b.pid))
            for host in self.both:
                host.call("ip", "addr", "add", f"{host.address}/24", "dev", "link0")
                host.call("ip", "link", "set", "link0", "up")
            self.undo = undo.pop_all()
        return self

    def __exit__(self, *error):
        self.undo.close()

    def cut(self, how):
        """down: the first host's end is switched off; silent: packets leave and arrive nowhere."""
        a, b = self.both
        if how == "down":
            a.call("ip", "link", "set", "link0", "down")
        else:
            for host, other in ((a, b), (b, a)):
                host.call("ip", "neigh", "replace", other.address, "lladdr", NOWHERE, "dev", "link0")

    def mend(self):
        a, b = self.both
        a.call("ip", "link", "set", "link0", "up")
        for host, other in ((a, b), (b, a)):
            with contextlib.suppress(OSError):
                host.call("ip", "neigh", "del", other.address, "dev", "link0")

    def start(self, folder, *words, per_host=1, **environment):
        """Start a script on both hosts, as ranks that find each other by environment variables."""
        started = []
        for rank in range(2 * per_host):
            variables = {"RANK": rank, "WORLD_SIZE": 2 * per_host, "LOCAL_RANK": rank % per_host}
            variables |= {"MASTER_ADDR": self.both[0].address, "MASTER_PORT": PORT} | environment
            started.append(Start(self.both[rank // per_host], folder / f"rank{rank}.log", words, variables))
        return started

    def torchrun(self, folder, *words, per_host=1, **environment):
        """Start a script on both hosts, by a torchrun on each, which does not find out that it is the first one."""
        first = self.both[0]
        options = ["--nnodes=2", f"--nproc_per_node={per_host}", "--rdzv_backend=c10d", "--rdzv_id=test"]
        options += [f"--rdzv_endpoint={first.address}:{PORT}", "--monitor-interval=0.2"]
        return [
            Start(
                host,
                folder / f"{host.name}.log",
                ["-m", "torch.distributed.run", *options, f"--rdzv_conf=is_host={int(host is first)}"]
                + [f"--local_addr={host.address}", *words],
                environment,
            )
            for host in self.both
        ]


class Start:
    """A command of Python's on a host."""

    def __init__(self, host, log, words, environment):
        self.log = log
        clean = {key: value for key, value in os.environ.items() if key not in (*TORCHRUN, *SRUN)}
        more = {key: str(value) for key, value in environment.items()}
        with log.open("w") as file:
            self.process = subprocess.Popen(
                host.command(sys.executable, *map(str, words)),
                cwd=REPO,
                stdout=file,
                stderr=file,
                env=clean | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"} | more,
            )

    def output(self):
        return self.log.read_text()

    def end(self):
        """Its exit code."""
        return self.process.wait(300)

    def send(self, number, words):
        """Send a signal to the processes of Python's on this host whose command line has `words`."""
        inside = Path(f"/proc/{self.process.pid}/ns/pid_for_children")
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if (path / "ns/pid").readlink() == inside.readlink() and words.encode() in (
                    path / "cmdline"
                ).read_bytes():
                    os.kill(int(path.name), number)


def wire(*pids):
    """A link of two hosts: what one sends arrives at the other, later, or never."""
    ends = []
    rng = random.Random(1)
    queue = deque()  # of (when it arrives, at which end, packet)
    for pid in pids:
        end = os.open("/dev/net/tun", os.O_RDWR)
        TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 1, 0x1000
        made = fcntl.ioctl(end, TUNSETIFF, struct.pack("16sH22x", b"link%d", IFF_TUN | IFF_NO_PI))
        name = made[:16].rstrip(b"\0").decode()
        subprocess.run(["ip", "link", "set", "dev", name, "netns", pid, "name", "link0"], check=True)
        ends.append(end)
    print("ready", flush=True)
    while True:
        wait = max(0.0, queue[0][0] - time.monotonic()) if queue else None
        for end in select.select(ends, [], [], wait)[0]:
            packet = os.read(end, 65536)
            if rng.random() >= LOSS:
                queue.append((time.monotonic() + DELAY, ends[end == ends[0]], packet))
        while queue and queue[0][0] <= time.monotonic():
            _, end, packet = queue.popleft()
            with contextlib.suppress(OSError):  # that end is down
                os.write(end, packet)


if __name__ == "__main__":
    wire(*sys.argv[1:])
