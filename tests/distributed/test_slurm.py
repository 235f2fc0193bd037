"""slurm/ on a real Slurm of two nodes: runs that are stopped at any moment end as one that never was."""

import re
import sys
from pathlib import Path

import pytest

from tests.distributed.halt import SCRIPT, Halt
from tests.distributed.slurm_cluster import MISSING, Cluster
from txl_dist.checkpoint.format import steps
from txl_dist.distributed.preemption import is_stopping

REPO = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(bool(MISSING), reason=f"no Slurm here ({', '.join(MISSING)}: not found)"),
]

LONG = ["train.max_steps=60", "train.eval_every=30", "checkpoint.every=20"]


@pytest.fixture(scope="module")
def cluster():
    with Cluster() as cluster:
        cluster.environment |= {"TXL_DIST_PYTHON": sys.executable, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
        yield cluster


class Job:
    """A job of slurm/train.sh on two nodes with a task each."""

    def __init__(self, cluster, run_dir, *overrides, halt=None):
        self.cluster = cluster
        self.run_dir = run_dir
        self.log = run_dir.with_suffix(".log")
        options = ["--parsable", "--nodes=2", "--gpus-per-node=1", "--cpus-per-gpu=1", f"--output={self.log}"]
        environment = {}
        if halt:
            environment = halt.environment | {"TXL_DIST_PYTHON": f"{sys.executable} {SCRIPT}"}
        train = ["slurm/train.sh", *overrides, f"run.dir={run_dir}"]
        self.id = sbatch(cluster, *options, *train, environment=environment)

    def state(self):
        shown = self.cluster.call("scontrol", "--oneliner", "show", "job", self.id)
        return re.search(r"JobState=(\S+)", shown)[1]

    def until(self, condition, every=0.05):
        self.cluster.wait_until(condition, lambda: f"{self.state()}\n{self.output()}", every)

    def output(self):
        return self.log.read_text() if self.log.exists() else ""

    def lines(self):
        path = self.run_dir / "metrics.jsonl"
        return path.read_text().count("\n") if path.exists() else 0

    def tasks(self):
        """The processes that train."""
        pids = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                words = (path / "cmdline").read_bytes().split(b"\0")
            except OSError:  # it has ended
                continue
            if words[0] == sys.executable.encode() and f"run.dir={self.run_dir}".encode() in words:
                pids.append(int(path.name))
        return pids

    def finish(self):
        """Wait for its end, however often it is started again."""
        self.until(lambda: self.state() not in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED"), every=0.5)
        assert self.state() == "COMPLETED", self.output()


def sbatch(cluster, *words, **options):
    return cluster.call("sbatch", *words, cwd=REPO, **options)


def done(cluster, *words):
    """Submit, and wait for its end, which sbatch --wait notices up to 40 s later."""
    sbatch(cluster, *words)
    cluster.wait_until(lambda: not cluster.call("squeue", "--noheader"), every=0.5)


@pytest.fixture(scope="module")
def undisturbed(cluster, small, tmp_path_factory):
    job = Job(cluster, tmp_path_factory.mktemp("undisturbed") / "run", *small, *LONG)
    job.finish()
    assert "2 x cpu" in job.output()
    return job


# The function that a rank of a job calls then, for which time, and where the log says that the run was stopped.
MOMENTS = {
    "training": ("txl_dist.engine.zero:ZeroEngine.forward_backward_step", 14, "after step"),
    "evaluating": ("txl_dist.training.loop:Training.evaluate", 1, "in the evaluation of valid after step 30"),
    "saving": ("txl_dist.checkpoint.format:CheckpointWriter.add", 1, ""),  # training continues meanwhile
    "testing": ("txl_dist.training.loop:Training.evaluate", 3, "in the evaluation of test after step 60"),
}
STARTING = "before the model was built"
# As a user does it, or slurm/train.sh before the time is over; as an administrator, or a job of a higher priority.
STOPS = {"SIGUSR1": ["scancel", "--signal=USR1"], "SIGTERM": ["scontrol", "requeue"]}
STOPPED = [(moment, name) for name in STOPS for moment in ("starting", *MOMENTS)]


@pytest.fixture(scope="module")
def stopped(cluster, small, tmp_path_factory):
    """A job for each of these. While one waits for its second start, the next has its first."""
    jobs = {}
    for moment, name in STOPPED:
        folder = tmp_path_factory.mktemp(f"{moment}-{name}")
        halt = Halt(folder, *MOMENTS[moment][:2]) if moment in MOMENTS else None
        job = jobs[moment, name] = Job(cluster, folder / "run", *small, *LONG, halt=halt)
        job.until(lambda job=job: len(job.tasks()) == 2)
        if halt:
            job.until(halt.is_reached)
        cluster.call(*STOPS[name], job.id)
        job.until(lambda job=job: all(map(is_stopping, job.tasks())))
        if halt:
            halt.release()
        job.until(lambda job=job: "Stopped by" in job.output())
    return jobs


@pytest.mark.parametrize("moment, name", STOPPED)
def test_a_run_that_is_stopped_ends_as_one_that_is_not(undisturbed, stopped, check_identical, moment, name):
    job = stopped[moment, name]
    job.finish()
    [message] = re.findall("Stopped by .*", job.output())
    where = MOMENTS[moment][2] if moment in MOMENTS else STARTING
    assert message.startswith(f"Stopped by {name} {where}")
    check_identical(undisturbed.run_dir, job.run_dir)
    assert steps(undisturbed.run_dir) == steps(job.run_dir)


def test_a_cancelled_run_is_saved_and_not_requeued(cluster, small, tmp_path):
    job = Job(cluster, tmp_path / "run", *small, *LONG)
    job.until(lambda: job.lines() >= 10)
    cluster.call("scancel", job.id)
    job.until(lambda: job.state() == "CANCELLED" and not cluster.call("squeue", "--noheader"))
    step = int(re.search(r"after step (\d+)", job.output())[1])
    assert steps(job.run_dir)[-1] == step


def test_a_mistake_is_reported_once_and_not_requeued(cluster, small, tmp_path):
    job = Job(cluster, tmp_path / "run", *small, "model.n_layers=3", "data.num_lanes=7")
    job.until(lambda: job.state() == "FAILED")
    assert job.output().count("did you mean model.n_layer") == 1 and "over 2 processes" in job.output()
    assert "Traceback" not in job.output()


def test_srun_by_hand_and_a_process_alone_in_a_job(cluster, small, metrics, tmp_path):
    """In a shell of salloc SLURM_NTASKS says two tasks as well, but the process is none of them."""
    train = [sys.executable, "-m", "txl_dist.train", *small, "train.stop_at=1"]
    together = cluster.call("srun", "--nodes=2", *train, f"run.dir={tmp_path}/together", cwd=REPO)
    alone = cluster.call("salloc", "--nodes=2", *train, f"run.dir={tmp_path}/alone", cwd=REPO)
    assert "2 x cpu" in together and "1 x cpu" in alone
    one, two = (metrics(tmp_path / name)[0]["train/loss"] for name in ("together", "alone"))
    assert one == pytest.approx(two, rel=1e-5)


def test_prepare_sweep_and_evaluate(cluster, small, corpus, metrics, tmp_path):
    """From text to a table, with no other command than sbatch."""
    data = tmp_path / "data"
    cpus = "--gpus-per-node=0"
    log = f"--output={tmp_path}/%x-%A-%a.log"
    cut = ["corpus=text", "tokenizer=bytes", "data.sample_tokens=256", f"data.dir={data}", f"corpus.path={corpus}"]
    shares = ["corpus.valid_share=0.1", "corpus.test_share=0.1"]
    done(cluster, "--mem=0", "--cpus-per-task=2", log, "slurm/prepare.sh", *cut, *shares)
    grid = tmp_path / "grid"
    grid.write_text("".join(f"run.seed={seed} run.dir={tmp_path}/seed{seed}\n" for seed in (1, 2)))
    options = [cpus, "--ntasks-per-node=2", "--array=1-2%1", log]
    more = [*small, f"data.dir={data}", "train.stop_at=1", "engine.pipeline_stages=2"]
    done(cluster, *options, "slurm/sweep.sh", str(grid), *more)
    one, two = (metrics(tmp_path / f"seed{seed}") for seed in (1, 2))
    assert len(one) == len(two) == 1 and one[0]["train/loss"] != two[0]["train/loss"]
    command = ["--gpus=0", f"--output={tmp_path}/table", "slurm/evaluate.sh", f"run={tmp_path}/seed*", "split=test"]
    done(cluster, *command)
    assert "seed1" in (tmp_path / "table").read_text() and "seed2" in (tmp_path / "table").read_text()
