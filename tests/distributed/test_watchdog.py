"""What a process says that its watchdog ends: in whole runs in test_guard.py and test_network.py."""

import subprocess
import sys

# Its main thread leaves the run while the watchdog speaks, as it does when connections to ended processes break.
LEFT_MEANWHILE = """
import sys, threading
from txl_dist.distributed import watchdog
from txl_dist.distributed.logs import RunLog
from txl_dist.distributed.process_group import process_group

speaking = threading.Event()
print_stacks = watchdog.Watchdog._print_stacks
watchdog.Watchdog._print_stacks = lambda self: (speaking.set(), print_stacks(self))
with RunLog(sys.argv[1]), watchdog.Watchdog(0.2) as dog:
    dog.start(process_group())
    speaking.wait()
print("left")
"""
# What is to tell others of it never returns.
NEVER_TOLD = """
import sys, threading
from txl_dist.distributed import watchdog
from txl_dist.distributed.logs import RunLog
from txl_dist.distributed.process_group import process_group

def tell(line):
    print("told", line, flush=True)
    threading.Event().wait()

watchdog.REPORTING = 0.2
with RunLog(sys.argv[1]), watchdog.Watchdog(0.2) as dog:
    dog.on_stall = tell
    dog.start(process_group())
    threading.Event().wait()
"""
# A thread, as the one that tells others, runs Python while stacks are printed; many times, because it may go well once.
RUNNING_MEANWHILE = """
import json, threading
from txl_dist.distributed import watchdog
from txl_dist.distributed.process_group import process_group

def work():
    while True:
        json.loads(json.dumps([list(range(10))] * 10, indent=1))

def print_all():
    for _ in range(10000):
        dog._print_stacks()

watchdog.PRINTING = 0
with watchdog.Watchdog(None) as dog:
    dog.start(process_group())
    threading.Thread(target=work, daemon=True).start()
    printing = threading.Thread(target=print_all)
    printing.start()
    printing.join()
print("done")
"""
# Outside of a run nothing is written to a file.
OUTSIDE = "from txl_dist.distributed.logs import log_exit; log_exit('the reason')"


def test_a_run_that_the_watchdog_ends_is_not_left_before(tmp_path):
    done = subprocess.run([sys.executable, "-c", LEFT_MEANWHILE, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 1 and "left" not in done.stdout
    message = "Nothing was done for 0 seconds after the start (guard.stall_timeout): the run ends."
    assert done.stderr.count(message) == 1
    assert message in (tmp_path / "logs/rank-0.log").read_text()


def test_telling_others_does_not_hold_up_the_end(tmp_path):
    done = subprocess.run([sys.executable, "-c", NEVER_TOLD, str(tmp_path)], capture_output=True, text=True)
    message = "Nothing was done for 0 seconds after the start (guard.stall_timeout): the run ends."
    assert done.returncode == 1 and done.stdout == f"told {message}\n"
    assert done.stderr.count(message) == 1 and "stands here" in done.stderr


def test_stacks_are_printed_while_a_thread_runs():
    command = [sys.executable, "-c", RUNNING_MEANWHILE]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert done.returncode == 0 and done.stdout == "done\n"


def test_a_reason_to_end_is_shown_by_the_caller_alone():
    done = subprocess.run([sys.executable, "-c", OUTSIDE], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout + done.stderr == ""
