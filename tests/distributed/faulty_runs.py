"""Run several trainings in one process group, as many_runs.py does, in a model that goes wrong at some steps.

A JSON file holds [overrides, {step: fault}] of each. Faults are of lane 0, which is rank 0's in every split:

    loss            its hidden states are nan from the embedding on: so are its loss, its memories and the gradient
    gradient        the gradient is nan, and nothing else
    out of memory   as torch reports it of a GPU
    hang            rank 1 waits for ever
"""

import json
import sys
import threading
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from txl_dist.cli import CONF, errors_reported
from txl_dist.config.parse import parse_config
from txl_dist.config.schema import TrainJob
from txl_dist.distributed.process_group import exit_process
from txl_dist.engine.engine import Engine
from txl_dist.models.transformer_xl import TransformerXL
from txl_dist.train import train

embed = TransformerXL.embed
train_step = Engine.train_step
faults = {}  # of the run, by step
fault = None  # of the next micro-batch


def faulty_step(engine, segment):
    global fault
    fault = faults.get(str(engine.step + 1))
    if fault == "hang" and engine.group.rank == 1:
        threading.Event().wait()
    if not engine.group.is_rank_zero:
        fault = None
    return train_step(engine, segment)


def faulty_embed(model, inputs, noise):
    global fault
    now = fault
    fault = None
    hidden, lookback = embed(model, inputs, noise)
    if now == "out of memory":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore words")
    if now == "gradient":
        hidden.register_hook(lambda gradient: gradient * float("nan"))
    if now == "loss":
        hidden = torch.cat([hidden[:1] * float("nan"), hidden[1:]])
    return hidden, lookback


TransformerXL.embed = faulty_embed
Engine.train_step = faulty_step
with initialize_config_dir(str(CONF), version_base="1.3"), errors_reported():
    for job in json.loads(Path(sys.argv[1]).read_text()):
        overrides, faults = job
        config = compose("train", overrides)
        train(parse_config(TrainJob, OmegaConf.to_container(config, resolve=True)))
exit_process()
