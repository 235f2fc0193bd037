"""Runs on two hosts, whose network is slow, loses packets, or is cut at any moment, silently or not."""

import signal
import time

import pytest

from tests.distributed.halt import SCRIPT, Halt
from tests.distributed.two_hosts import Hosts
from txl_dist.checkpoint.format import directory, open_checkpoint, steps
from txl_dist.distributed.preemption import REQUEUE

JOB = ["train.max_steps=24", "train.eval_every=12", "checkpoint.every=8", "guard.stall_timeout=10"]
NO_WORDS = ["Traceback", "stands here", "frame #", "terminate called"]
MOMENTS = {
    "step": ("txl_dist.engine.zero:ZeroEngine.forward_backward_step", 14),
    "save": ("txl_dist.checkpoint.format:CheckpointWriter.add", 4),  # kinds of tensors, three in each checkpoint
    "evaluation": ("txl_dist.distributed.watchdog:Watchdog.beat", 16),  # 12 steps, a checkpoint, the third segment
    "before they meet": ("txl_dist.distributed.process_group:wait_for_rank_zero", 1),
    "while they exchange addresses": ("txl_dist.distributed.process_group:exchange_peers", 1),
    "while they connect": ("txl_dist.distributed.process_group:set_gloo_interface", 1),
    "while they end": ("txl_dist.cli:end_together", 1),
}


@pytest.fixture
def make_hosts(tmp_path):
    made = []

    def make_hosts(**options):
        try:
            made.append(Hosts(tmp_path, **options).__enter__())
        except OSError as error:
            pytest.skip(f"no network namespaces can be made here: {error}")
        return made[-1]

    yield make_hosts
    for hosts in made:
        hosts.__exit__()


@pytest.fixture
def hosts(make_hosts):
    return make_hosts()


@pytest.fixture(scope="module")
def undisturbed(run, small, tmp_path_factory):
    """A run of so many processes on one host, left alone: where it is."""
    made = {}

    def undisturbed(processes=2):
        if processes not in made:
            made[processes] = tmp_path_factory.mktemp("undisturbed") / "run"
            run("txl_dist.train", *small, *JOB[:-1], f"run.dir={made[processes]}", processes=processes)
        return made[processes]

    return undisturbed


@pytest.fixture
def job(small, tmp_path):
    return [SCRIPT, *small, *JOB, f"run.dir={tmp_path / 'run'}"]


@pytest.fixture
def halt_at(tmp_path):
    return lambda moment, rank=1: Halt(tmp_path, *MOMENTS[moment], rank)


def wait_for(halt, starts):
    while not halt.is_reached():
        assert all(start.process.poll() is None for start in starts), [start.output() for start in starts]
        time.sleep(0.02)


def cut_at(halt, hosts, how, starts):
    """Cut the link when the rank has halted, and let it continue."""
    wait_for(halt, starts)
    hosts.cut(how)
    halt.release()


def ended_in_words(starts, code):
    """Check that all ended by an exit code, and without a trace; return their outputs."""
    codes = [start.end() for start in starts]
    outputs = [start.output() for start in starts]
    assert codes == [code] * len(starts), "\n".join(outputs)
    assert not [word for word in NO_WORDS if word in "".join(outputs)], "\n".join(outputs)
    return outputs


def all_whole(run_dir):
    return not any(open_checkpoint(directory(run_dir, step)).validate() for step in steps(run_dir))


def finished(starts):
    codes = [start.end() for start in starts]
    assert codes == [0] * len(starts), "\n".join(start.output() for start in starts)


def test_training_between_hosts_is_that_of_one_host(hosts, job, tmp_path, undisturbed, check_identical):
    """In two starts; gloo alone would listen where a host's own name leads: at its loopback."""
    finished(hosts.start(tmp_path, *job, "train.stop_at=13"))
    finished(hosts.start(tmp_path, *job))
    check_identical(tmp_path / "run", undisturbed())


def test_a_slow_network_that_loses_packets_changes_nothing(make_hosts, job, tmp_path, undisturbed, check_identical):
    finished(make_hosts(slow=True).start(tmp_path, *job))
    check_identical(tmp_path / "run", undisturbed())


@pytest.mark.parametrize("how, moment", [("down", "step"), ("silent", "save"), ("silent", "evaluation")])
def test_a_cut_network_ends_both_hosts_in_words(
    how, moment, hosts, halt_at, job, tmp_path, undisturbed, check_identical
):
    """Each names the other; the same command resumes when the network is back."""
    halt = halt_at(moment)
    starts = hosts.start(tmp_path, *job, **halt.environment)
    cut_at(halt, hosts, how, starts)
    first, second = ended_in_words(starts, 1)
    assert "rank 1 on hostb (10.77.0.2): does not answer" in first
    assert "rank 0 on hosta (10.77.0.1): does not answer" in second
    for output in (first, second):
        assert output.count("guard.stall_timeout") == 1 and "The same command continues" in output
    assert all_whole(tmp_path / "run")
    hosts.mend()
    finished(hosts.start(tmp_path, *job))
    check_identical(tmp_path / "run", undisturbed())
    assert not list((tmp_path / "run/checkpoints").glob(".*"))


def test_the_ranks_of_a_host_end_together(hosts, halt_at, job, tmp_path):
    """Two on each; one speaks for both."""
    halt = halt_at("step", rank=3)
    starts = hosts.start(tmp_path, *job, per_host=2, **halt.environment)
    cut_at(halt, hosts, "silent", starts)
    outputs = ended_in_words(starts, 1)
    assert "ranks 2 and 3 on hostb (10.77.0.2): does not answer" in outputs[0] + outputs[1]
    assert "ranks 0 and 1 on hosta (10.77.0.1): does not answer" in outputs[2] + outputs[3]
    assert "".join(outputs).count("guard.stall_timeout") == 2
    assert all_whole(tmp_path / "run")


def test_torchruns_on_two_hosts_go_on(hosts, halt_at, job, tmp_path, undisturbed, check_identical):
    """The second one waits for the first one's answer for minutes after its ranks have ended."""
    halt = halt_at("step", rank=3)
    starts = hosts.torchrun(tmp_path, *job, per_host=2, **halt.environment)
    cut_at(halt, hosts, "silent", starts)
    assert starts[0].end() == 1
    assert "ranks 2 and 3 on hostb (10.77.0.2): does not answer" in starts[0].output()
    while "ranks 0 and 1 on hosta (10.77.0.1): does not answer" not in starts[1].output():
        assert starts[1].process.poll() is None, starts[1].output()
        time.sleep(0.1)
    assert all_whole(tmp_path / "run")
    starts[1].send(signal.SIGKILL, "rdzv_id=test")
    starts[1].end()
    hosts.mend()
    finished(hosts.torchrun(tmp_path, *job, per_host=2))
    check_identical(tmp_path / "run", undisturbed(4))


@pytest.mark.parametrize("how", ["down", "silent"])
def test_a_network_that_comes_back_in_time_changes_nothing(
    how, hosts, halt_at, job, tmp_path, undisturbed, check_identical
):
    """A signal that one host gets meanwhile stops both, when they can agree."""
    halt = halt_at("step")
    starts = hosts.start(tmp_path, *job, **halt.environment)
    cut_at(halt, hosts, how, starts)
    if how == "silent":
        starts[1].send(signal.SIGTERM, str(tmp_path / "run"))
    time.sleep(3)
    hosts.mend()
    if how == "silent":
        ended_in_words(starts, REQUEUE)
        assert "Stopped by SIGTERM after step" in starts[0].output()
        finished(hosts.start(tmp_path, *job))
    else:
        finished(starts)
    check_identical(tmp_path / "run", undisturbed())


def test_a_signal_in_a_cut_network_that_does_not_come_back_is_named(hosts, halt_at, job, tmp_path):
    halt = halt_at("step")
    starts = hosts.start(tmp_path, *job, **halt.environment)
    cut_at(halt, hosts, "silent", starts)
    starts[1].send(signal.SIGTERM, str(tmp_path / "run"))
    first, second = ended_in_words(starts, 1)
    assert "SIGTERM came, but the ranks could not agree to stop" in second and "SIGTERM" not in first


@pytest.mark.parametrize("moment", ["before they meet", "while they exchange addresses", "while they connect"])
def test_a_network_that_is_cut_while_the_ranks_meet_ends_both(moment, hosts, halt_at, job, tmp_path):
    halt = halt_at(moment)
    starts = hosts.start(tmp_path, *job, TXL_DIST_PATIENCE=10, **halt.environment)
    cut_at(halt, hosts, "silent", starts)
    first, second = ended_in_words(starts, 2)
    for output, other in (first, "rank 1"), (second, "10.77.0.1"):
        assert other in output and output.count("Stopped:") == 1 and "TXL_DIST_PATIENCE" in output
    assert not (tmp_path / "run").exists()


def test_a_network_that_is_cut_while_the_ranks_end_does_not_hold_them(hosts, halt_at, job, tmp_path):
    """All have the same message; the one that cannot know whether it was printed prints it, too."""
    (tmp_path / "run/config.yaml").mkdir(parents=True)  # where a file is to be written
    halt = halt_at("while they end")
    starts = hosts.start(tmp_path, *job, **halt.environment)
    cut_at(halt, hosts, "silent", starts)
    for output in ended_in_words(starts, 1):
        assert output.count("Stopped:") == 1 and "Is a directory" in output, output


def test_a_process_that_dies_is_named_by_the_other_host(hosts, halt_at, job, tmp_path):
    halt = halt_at("step")
    starts = hosts.start(tmp_path, *job, **halt.environment)
    wait_for(halt, starts)
    starts[1].send(signal.SIGKILL, str(tmp_path / "run"))
    (output,) = ended_in_words(starts[:1], 1)
    assert "rank 1 on hostb (10.77.0.2): the process has ended" in output and "Connection" in output
    assert "The same command continues" in output
