"""Run several trainings, one after the other, in one process group: a JSON file holds the overrides of each.

A start of Python and DeepSpeed for each would take most of the time of the tests. One process alone writes beside each
run's checkpoints how close to 0 an input of a ReLU came in training: where the sign is a matter of rounding. (One that
is 0 has no sign: a dropped word at the beginning of a stream, while biases are 0.) With `--no-curves` no curves are
drawn.
"""

import json
import math
import sys
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import Tensor

from tests.warm_python import warm_up
from txl_dist.cli import CONF
from txl_dist.config.parse import parse_config
from txl_dist.config.schema import TrainJob
from txl_dist.distributed.launcher import launcher_env
from txl_dist.distributed.process_group import exit_process
from txl_dist.tracking import result
from txl_dist.train import train

relu = Tensor.relu
closest = math.inf


def noted_relu(tensor: Tensor) -> Tensor:
    global closest
    if tensor.requires_grad:
        distances = tensor.detach().abs()
        closest = min(closest, float(distances[distances > 0].min()))
    return relu(tensor)


if launcher_env().size == 1:
    Tensor.relu = noted_relu
if "--no-curves" in sys.argv:
    result.curve = lambda run_dir, lines: "not drawn"
warm_up()
with initialize_config_dir(str(CONF), version_base="1.3"):
    for overrides in json.loads(Path(sys.argv[1]).read_text()):
        config = compose("train", overrides)
        closest = math.inf
        train(parse_config(TrainJob, OmegaConf.to_container(config, resolve=True)))
        if launcher_env().size == 1:
            Path(config.run.dir, "closest_to_the_edge").write_text(f"{closest}\n")
exit_process()
