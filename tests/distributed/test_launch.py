"""Real processes: that do not find each other, that are killed, and that are stopped by signals."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from txl_dist.checkpoint.format import directory, latest, open_checkpoint, steps
from txl_dist.distributed.launcher import SRUN, TORCHRUN
from txl_dist.distributed.preemption import REQUEUE, SIGNALS
from txl_dist.distributed.process_group import free_port

REPO = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.distributed

# Evaluated two tokens at a time: that takes long enough to be met.
LONG = [
    "train.max_steps=60",
    "train.eval_every=30",
    "checkpoint.every=15",
    "checkpoint.keep_last=4",
    "evaluation.tgt_len=2",
]
ENGINES = {
    "zero3": ["engine.zero_stage=3", "engine.gradient_accumulation=2"],
    "pipeline": ["engine.pipeline_stages=2", "engine.gradient_accumulation=2"],
}


class Start:
    """One start of a training, under torchrun where it is for several processes.

    `fresh`: by an interpreter that has nothing imported yet, whose process id is that of the training, too.
    """

    warm = None

    def __init__(self, run_dir, overrides, processes=1, options=("--standalone",), fresh=False, **environment):
        python = sys.executable if fresh else self.warm
        self.run_dir = Path(run_dir)
        self.log = self.run_dir.with_suffix(".log")
        torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", *options]
        command = [
            *(torchrun if processes > 1 or "--nnodes=2" in options else []),
            "-m",
            "txl_dist.train",
            *overrides,
            f"run.dir={run_dir}",
        ]
        clean = {key: value for key, value in os.environ.items() if key not in (*TORCHRUN, *SRUN)}
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [python, *command],
                cwd=REPO,
                stdout=log,
                stderr=log,
                env=clean | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "PYTHON_EXEC": python} | environment,
                start_new_session=True,
            )

    def worker(self, rank):
        """The process of one rank under torchrun, 0 where there is none yet."""
        for path in Path("/proc").glob("[0-9]*"):
            try:
                words = (path / "cmdline").read_bytes().split(b"\0")
                if f"run.dir={self.run_dir}".encode() not in words:
                    continue
                if f"RANK={rank}".encode() in (path / "environ").read_bytes().split(b"\0"):
                    return int(path.name)
            except OSError:  # it has ended
                continue
        return 0

    def lines(self):
        path = self.run_dir / "metrics.jsonl"
        return path.read_text().count("\n") if path.exists() else 0

    def until(self, condition):
        while not condition():
            assert self.process.poll() is None, self.output()
            time.sleep(0.01)

    def output(self):
        return self.log.read_text()

    def end(self):
        """Its exit code."""
        return self.process.wait(600)


@pytest.fixture(autouse=True, scope="module")
def warm(python):
    Start.warm = python


def holds_signals(pid):
    mask = int(re.search(r"SigBlk:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())[1], 16)
    return all(mask >> (number - 1) & 1 for number in SIGNALS)


@pytest.fixture(scope="module", params=ENGINES)
def undisturbed(request, small, tmp_path_factory):
    """A run in one go: where it is, and its overrides."""
    overrides = [*small, *LONG, *ENGINES[request.param]]
    start = Start(tmp_path_factory.mktemp(request.param) / "run", overrides, processes=2)
    assert start.end() == 0, start.output()
    return start.run_dir, overrides


def test_a_signal_to_one_rank_stops_all_in_the_evaluation(undisturbed, check_identical, tmp_path):
    """Twice in the same one: what is left in it is done in the third start."""
    reference, overrides = undisturbed
    start = Start(tmp_path / "run", overrides, processes=2)
    start.until(lambda: start.lines() == 29)
    os.kill(start.worker(1), signal.SIGUSR2)
    assert start.end() == 1 and re.search(rf"exitcode *: {REQUEUE}", start.output())
    assert "Stopped by SIGUSR2 in the evaluation of valid after step 30" in start.output()
    assert start.lines() == 29 and latest(start.run_dir).step == 30

    again = Start(tmp_path / "run", overrides, processes=2)
    again.until(lambda: again.output().count("resuming from step 30") == 1)
    os.kill(again.worker(0), signal.SIGTERM)
    again.end()
    assert "Stopped by SIGTERM in the evaluation of valid after step 30" in again.output()
    assert again.lines() == 29

    assert Start(tmp_path / "run", overrides, processes=2).end() == 0
    check_identical(reference, start.run_dir)
    one, two = (open_checkpoint(directory(run_dir, 30)) for run_dir in (reference, start.run_dir))
    assert one.valid_loss == two.valid_loss is not None  # it was not known when the checkpoint was first written


@pytest.mark.parametrize("undisturbed", ["zero3"], indirect=True)
def test_torchrun_that_is_stopped_goes_on(undisturbed, check_identical, tmp_path):
    reference, overrides = undisturbed
    start = Start(tmp_path / "run", overrides, processes=2)
    start.until(lambda: start.lines() >= 10)
    start.process.terminate()
    start.end()
    (step,) = re.findall(r"Stopped by SIGTERM after step (\d+)", start.output())
    assert latest(start.run_dir).step == int(step) < 60
    assert Start(tmp_path / "run", overrides, processes=2).end() == 0
    check_identical(reference, start.run_dir)


@pytest.mark.parametrize("undisturbed", ["zero3"], indirect=True)
def test_torchrun_replaces_a_killed_worker(undisturbed, check_identical, tmp_path):
    reference, overrides = undisturbed
    start = Start(tmp_path / "run", overrides, processes=2, options=["--standalone", "--max-restarts=1"])
    start.until(lambda: steps(start.run_dir))
    os.kill(start.worker(1), signal.SIGKILL)
    assert start.end() == 0, start.output()
    assert re.search(r"resuming from step \d", start.output())
    check_identical(reference, start.run_dir)


@pytest.mark.parametrize("undisturbed", ["zero3"], indirect=True)
def test_torchruns_on_two_machines_replace_killed_workers(undisturbed, check_identical, tmp_path):
    """One on each: they count their restarts apart."""
    reference, overrides = undisturbed
    meeting = ["--nnodes=2", "--rdzv_backend=c10d", f"--rdzv_endpoint=localhost:{free_port()}", "--max-restarts=2"]
    machines = [Start(tmp_path / "run", overrides, options=meeting) for _ in range(2)]
    for rank, step in ((1, 15), (0, 45)):
        machines[0].until(lambda step=step: step in steps(tmp_path / "run"))
        os.kill(machines[0].worker(rank), signal.SIGKILL)
    assert [machine.end() for machine in machines] == [0, 0], machines[0].output()
    assert [int(step) for step in re.findall(r"resuming from step (\d+)", machines[0].output())] == [15, 45]
    check_identical(reference, tmp_path / "run")


def test_signals_from_the_first_moment_on_stop_a_start(small, tmp_path):
    """However many; nothing is written before the ranks have agreed."""
    start = Start(tmp_path / "run", small, fresh=True)
    start.until(lambda: holds_signals(start.process.pid))
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):
        start.process.send_signal(number)
    assert start.end() == REQUEUE
    assert "Stopped by SIGTERM and SIGUSR1 before the model was built" in start.output()
    assert not start.run_dir.exists()


@pytest.mark.parametrize("early, late", [(0, 1), (1, 0)])
def test_a_rank_that_is_stopped_before_the_others_come_waits_for_them(small, tmp_path, early, late):
    """Else they would wait for it in vain, and no exit code would say that the run is to be started again."""
    together = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}

    def start(rank):
        environment = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        return Start(tmp_path / f"run{rank}", small, fresh=rank == early, **environment, **together)

    starts = {early: start(early)}
    starts[early].until(lambda: holds_signals(starts[early].process.pid))
    starts[early].process.terminate()
    time.sleep(6)  # until it waits
    starts[late] = start(late)
    assert (starts[0].end(), starts[1].end()) == (REQUEUE, REQUEUE)
    assert "Stopped by SIGTERM before the model was built" in starts[0].output() and not starts[1].output()


LONGER = ["train.max_steps=600", "train.eval_every=1000", "checkpoint.every=5"]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_second_start_is_refused_and_changes_nothing(small, metrics, tmp_path, processes):
    """It names the process that trains the run; killed, that one leaves nothing that stands in the way."""
    first = Start(tmp_path / "run", [*small, *LONGER], processes=processes, fresh=True)
    first.until(lambda: first.lines() >= 20)
    owner = first.worker(0) if processes == 2 else first.process.pid
    second = Start(tmp_path / "run", [*small, *LONGER, "optimizer.lr=1e-3"], processes=processes)
    second.log = first.log
    second.end()
    output = first.output()
    assert f"run.dir={first.run_dir}: in use by process {owner} on" in output and "give another run.dir" in output
    if processes == 1:  # torchrun's own exit code is 1, with a trace
        assert second.process.returncode == 2 and "Traceback" not in output
    assert "lr: 0.003" in (first.run_dir / "config.yaml").read_text()

    os.kill(owner, signal.SIGKILL)
    first.end()
    last = latest(first.run_dir, contents=True).step
    third = Start(tmp_path / "run", [*small, *LONGER, f"train.stop_at={last + 10}"], processes=processes)
    assert third.end() == 0, third.output()
    assert [line["step"] for line in metrics(first.run_dir)] == list(range(1, last + 11))
    assert not list(first.run_dir.glob(".lock*"))


def test_a_requeued_start_waits_for_the_one_before_it(small, check_identical, tmp_path):
    """As Slurm starts it while the old job still trains; the signal comes later."""
    uninterrupted = Start(tmp_path / "whole", [*small, *LONGER, "train.max_steps=200"])
    assert uninterrupted.end() == 0
    first = Start(tmp_path / "run", [*small, *LONGER, "train.max_steps=200"], fresh=True)
    first.until(lambda: first.lines() >= 5)
    os.kill(first.process.pid, signal.SIGSTOP)
    first.process.terminate()
    second = Start(tmp_path / "run", [*small, *LONGER, "train.max_steps=200"], SLURM_RESTART_COUNT="1")
    second.until(lambda: f"waiting for process {first.process.pid} on" in second.output())
    os.kill(first.process.pid, signal.SIGCONT)
    assert (first.end(), second.end()) == (REQUEUE, 0), first.output()
    check_identical(uninterrupted.run_dir, second.run_dir)


def test_a_start_that_waits_is_stopped_by_a_signal(small, tmp_path):
    first = Start(tmp_path / "run", [*small, *LONGER])
    first.until(lambda: first.lines() >= 5)
    second = Start(tmp_path / "run", [*small, *LONGER], SLURM_RESTART_COUNT="1")
    second.until(lambda: "waiting for process" in second.output())
    second.process.terminate()
    assert second.end() == REQUEUE
    first.process.kill()


def test_a_start_that_has_nothing_left_to_do_is_not_to_be_requeued(small, tmp_path):
    """The signal arrives while the last step of train.stop_at is saved."""
    start = Start(tmp_path / "run", [*small, "train.stop_at=9"])
    start.until(lambda: start.lines() == 9)
    start.process.terminate()
    assert start.end() == 0 and "9 of 20" in start.output()


@pytest.mark.parametrize(
    "environment, message",
    [
        ({"RANK": "0"}, "WORLD_SIZE and LOCAL_RANK: not set, but RANK=0"),
        ({"RANK": "1", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, "RANK=1: must be less than WORLD_SIZE=1"),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "MASTER_ADDR and MASTER_PORT: not set"),
        # These begin to wait for the others. The config has a mistake as well: so the ranks would meet to report it.
        *(
            ({"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": address}, message)
            for rank, address, message in [
                ("0", "127.0.0.1", "RANK=0: the WORLD_SIZE=2 processes did not all come to MASTER_ADDR=127.0.0.1"),
                ("1", "127.0.0.1", "Connection refused"),
                ("1", "no.such.host.invalid", "MASTER_ADDR=no.such.host.invalid"),
            ]
        ),
    ],
)
def test_processes_that_do_not_find_each_other_say_so(small, tmp_path, environment, message):
    """Without a trace, by exit code 2 and soon."""
    if "MASTER_ADDR" in environment:
        environment |= {"MASTER_PORT": "1" if environment["RANK"] == "1" else "29417", "TXL_DIST_PATIENCE": "1"}
    # Its own imports: that torch prints no C++ trace is settled before it is imported.
    start = Start(tmp_path / "run", [*small, "model.d_modell=1"], fresh="MASTER_ADDR" in environment, **environment)
    assert start.end() == 2
    assert message in start.output() and start.output().count("Stopped:") == 1
    assert "Traceback" not in start.output() and "frame #" not in start.output() and not start.run_dir.exists()


def test_a_config_problem_of_one_rank_ends_all_of_them(small, tmp_path):
    """As data that are not on its host. The others are past their checks, and wait for it."""
    together = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    places = [[], ["data.dir=nowhere"]]
    starts = [
        Start(tmp_path / f"run{rank}", [*small, *more], RANK=str(rank), LOCAL_RANK=str(rank), **together)
        for rank, more in enumerate(places)
    ]
    assert [start.end() for start in starts] == [2, 2], starts[0].output() + starts[1].output()
    assert "data.dir=nowhere: no dataset can be read here" in starts[0].output() and not starts[1].output()
    assert "Traceback" not in starts[0].output() and not (tmp_path / "run0").exists()


def test_a_run_goes_on_where_its_log_takes_no_more(small, metrics, tmp_path):
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "txl_dist.train", *small, f"run.dir={tmp_path}", "train.max_steps=3"]
        done = subprocess.run(command, cwd=REPO, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("No space left on device; the run continues without it") == 1
    assert len(metrics(tmp_path)) == 4


def test_deepspeed_launches(small, tmp_path):
    """It adds --local_rank=N to each process's command line."""
    launcher = ["-m", "deepspeed.launcher.launch", "--module", f"--world_info={WORLD_INFO}", "--master_port=29418"]
    done = subprocess.run(
        [sys.executable, *launcher, "txl_dist.train", *small, "train.stop_at=1", f"run.dir={tmp_path}"],
        cwd=REPO,
        env=os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0 and "2 x cpu" in done.stdout, done.stdout + done.stderr


WORLD_INFO = "eyJsb2NhbGhvc3QiOiBbMCwgMV19"  # {"localhost": [0, 1]}, as deepspeed gives it to its second half
