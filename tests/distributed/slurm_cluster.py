"""A real Slurm of two nodes on this machine, in a folder and on ports of its own: munged, slurmctld, two slurmd."""

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

NEEDED = ["munged", "slurmctld", "slurmd", "sbatch", "srun"]
MISSING = [name for name in NEEDED if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")]

# The nodes bear addresses as names, so that each resolves the other without a hosts file. Each has two pretended GPUs.
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
KillWait=120
MinJobAge=3600
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,sched_min_interval=0
GresTypes=gpu
NodeName=127.0.0.1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=8 Gres=gpu:2
NodeName=127.0.0.2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=8 Gres=gpu:2
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Cluster:
    """As a context: runs until its end, whatever happens in between."""

    def __enter__(self):
        with contextlib.ExitStack() as undo:
            self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: it holds sockets
            undo.callback(shutil.rmtree, self.folder, ignore_errors=True)
            self.folder.chmod(0o711)  # munged asks for that
            self.daemons = []
            self.environment = os.environ | {"SLURM_CONF": str(self.folder / "slurm.conf")}
            self.environment["PATH"] += ":/usr/sbin:/sbin"
            host = socket.gethostname().partition(".")[0]
            user = subprocess.getoutput("id --user --name")
            (self.folder / "slurm.conf").write_text(
                CONFIG.format(host=host, user=user, folder=self.folder, ports=free_ports(3))
            )
            (self.folder / "gres.conf").write_text("Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n")
            key = self.folder / "munge.key"
            key.write_bytes(os.urandom(64))
            key.chmod(0o600)
            (self.folder / "state").mkdir()
            files = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munge.pid"}
            files |= {"log-file": "munge.log", "seed-file": "munge.seed"}
            self.daemon(
                undo, "munged", "--foreground", *(f"--{key}={self.folder / name}" for key, name in files.items())
            )
            self.wait_until((self.folder / "munge.socket").exists)
            self.daemon(undo, "slurmctld", "-D")
            for node in ("127.0.0.1", "127.0.0.2"):
                self.daemon(undo, "slurmd", "-D", "-N", node)
            self.wait_until(lambda: self.call("sinfo", "--noheader", "--format=%D %t", check=False) == "2 idle")
            undo.callback(self.end_jobs)
            self.undo = undo.pop_all()
        return self

    def __exit__(self, *error):
        self.undo.close()

    def daemon(self, undo, name, *options):
        with (self.folder / f"{name}{options[-1]}.log".replace("/", "_")).open("w") as log:
            process = subprocess.Popen([name, *options], env=self.environment, stdout=log, stderr=log)
        self.daemons.append(process)
        undo.callback(process.wait)
        undo.callback(process.terminate)

    def end_jobs(self):
        self.call("scancel", "--user", self.call("id", "--user", "--name"), check=False)
        self.wait_until(lambda: not self.call("squeue", "--noheader"))

    def output(self):
        """What the daemons have said last."""
        return "\n".join(path.read_text()[-2000:] for path in self.folder.glob("*.log"))

    def call(self, *command, check=True, cwd=None, environment=None):
        """Run a command of Slurm's, and return what it prints."""
        environment = {name: str(value) for name, value in (environment or {}).items()}
        done = subprocess.run(command, env=self.environment | environment, cwd=cwd, capture_output=True, text=True)
        assert not check or done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}\n{self.output()}"
        return done.stdout.strip()

    def wait_until(self, condition, describe=lambda: "", every=0.05):
        """Until `condition` holds, for at most five minutes, and only while all daemons live."""
        end = time.monotonic() + 300
        while not condition():
            alive = all(daemon.poll() is None for daemon in self.daemons)
            assert alive and time.monotonic() < end, f"{describe()}\n{self.output()}"
            time.sleep(every)


def free_ports(number):
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(number)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
