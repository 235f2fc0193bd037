"""Run several trainings with compiled layers, one after the other; write beside each how many graphs it had compiled
after each step, and at its end.

Graphs are counted as they come to the compiler. Attention is left out of them, as the kernels of a GPU are. A JSON file
holds the overrides of each run.
"""

import json
import sys
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import nn

from tests.warm_python import warm_up
from txl_dist.cli import CONF
from txl_dist.config.parse import parse_config
from txl_dist.config.schema import TrainJob
from txl_dist.distributed.process_group import exit_process
from txl_dist.engine.engine import Engine
from txl_dist.models.layers import backends
from txl_dist.train import train
from txl_dist.training import run

compile_module = nn.Module.compile
train_step = Engine.train_step
graphs: list[int] = []  # after each step


def counted_train_step(engine: Engine, segment):
    loss = train_step(engine, segment)
    graphs.append(compiler.frame_count)
    return loss


nn.Module.compile = lambda module: compile_module(module, backend=compiler)
Engine.train_step = counted_train_step
backends.BACKENDS["reference"] = torch.compiler.disable(backends.reference)
run.show_result = lambda *given: None
warm_up()
from torch._dynamo.testing import CompileCounterWithBackend  # noqa: E402 (seconds, which the warm Python saves)

with initialize_config_dir(str(CONF), version_base="1.3"):
    for overrides in json.loads(Path(sys.argv[1]).read_text()):
        config = compose("train", overrides)
        graphs.clear()
        torch._dynamo.reset()
        compiler = CompileCounterWithBackend("aot_eager")
        train(parse_config(TrainJob, OmegaConf.to_container(config, resolve=True)))
        Path(config.run.dir, "graphs.json").write_text(json.dumps([*graphs, compiler.frame_count]))
exit_process()
