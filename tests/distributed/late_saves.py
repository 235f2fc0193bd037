"""Run several trainings in one process group, as many_runs does, with a slow disk: a checkpoint is written only when
training has done five steps more."""

import json
import sys
import time
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from txl_dist.cli import CONF
from txl_dist.config.parse import parse_config
from txl_dist.config.schema import TrainJob
from txl_dist.data.index import Index
from txl_dist.distributed.preemption import Preemption
from txl_dist.distributed.process_group import exit_process, process_group
from txl_dist.distributed.watchdog import Watchdog
from txl_dist.training.loop import Training

with initialize_config_dir(str(CONF), version_base="1.3"):
    for overrides in json.loads(Path(sys.argv[1]).read_text()):
        job = parse_config(TrainJob, OmegaConf.to_container(compose("train", overrides), resolve=True))
        training = Training(
            job, Index.open(job.data.dir), None, process_group(), Watchdog(None), Preemption(process_group()), None
        )
        engine = training.engine
        write = engine.checkpointer._write

        def late(writer, step, *more, engine=engine, write=write, stop=training.stop):
            while engine.step < min(step + 5, stop):
                time.sleep(0.001)
            return write(writer, step, *more)

        engine.checkpointer._write = late
        training.run()
exit_process()
