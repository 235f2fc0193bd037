"""Run several trainings, one after the other, in one process group: a JSON file holds the overrides of each.

A start of Python and DeepSpeed for each would take most of the time of the tests.
"""

import json
import sys
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from txl_dist.check import read
from txl_dist.cli import CONF
from txl_dist.config import TrainJob
from txl_dist.engine.launch import leave
from txl_dist.train import train

with initialize_config_dir(str(CONF), version_base="1.3"):
    for overrides in json.loads(Path(sys.argv[1]).read_text()):
        config = compose("train", overrides)
        train(read(TrainJob, OmegaConf.to_container(config, resolve=True)))
leave()
