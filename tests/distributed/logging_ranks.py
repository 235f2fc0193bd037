"""Log on every rank as a run does, messages and warnings, also of libraries, and end as a test asks for.

Arguments: the run directory, and how to end: `well`, by a `config` error of all ranks, or by a `fault` of rank 1.
"""

import logging
import sys
import warnings

from deepspeed.utils import logger as deepspeed_logger
from torch import distributed

from txl_dist.cli import errors_reported
from txl_dist.distributed.logs import RunLog
from txl_dist.distributed.process_group import exit_process, process_group
from txl_dist.errors import ConfigError

run_dir, end = sys.argv[1:]
log = logging.getLogger("txl_dist.some.module")
with errors_reported(), RunLog(run_dir):
    group = process_group()
    log.info(f"a message of rank {group.rank}")
    log.warning(f"a warning of rank {group.rank}")
    log.error(f"an error of rank {group.rank}")
    deepspeed_logger.warning("a warning of DeepSpeed")
    logging.getLogger(distributed.distributed_c10d.__name__).warning("a warning of torch")
    logging.getLogger("elsewhere").warning("a warning of another library")
    warnings.warn("a warning of Python", stacklevel=1)
    group.gather([])
    if end == "config":
        raise ConfigError(["data.num_lanes=7: must be a multiple of 2"])
    if end == "fault" and group.rank == 1:
        raise ZeroDivisionError("of rank 1")
    group.gather([])
log.warning("a warning after the run")
exit_process()
