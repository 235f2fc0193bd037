"""Distribution by DeepSpeed behind one small interface, `engine.Engine`: `train_step`, `evaluate`, `save`."""

import logging
import os
import warnings

import torch

# DeepSpeed decides all of this when it is imported: on CPU it shall look for no compiler, and say only what matters.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
warnings.filterwarnings("ignore", "`torch.distributed.*` is deprecated", FutureWarning)  # DeepSpeed's to mend
