"""A custom node pack for tests alone: tiny models, seeded inputs, records, fakes of other packs."""

import os

import torch

from . import models
from .nodes import NODE_CLASS_MAPPINGS

models.register()

if os.environ.get("NVIDIA_TF32_OVERRIDE") == "0":  # the libraries obey it anyway
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

__all__ = ["NODE_CLASS_MAPPINGS"]
