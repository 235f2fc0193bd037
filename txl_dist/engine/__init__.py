"""Distribution by DeepSpeed behind one small interface, `engine.Engine`: `train_step`, `evaluate`, `save`."""

import logging
import os
import warnings

import torch

# DeepSpeed reads all of this when it is imported. On a CPU it would otherwise look for a compiler.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
warnings.filterwarnings("ignore", "`torch.distributed.*` is deprecated", FutureWarning)  # raised by DeepSpeed itself
