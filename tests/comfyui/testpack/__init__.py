"""A custom node pack for tests alone: tiny models, seeded inputs, records, fakes of other packs."""

from . import models
from .nodes import NODE_CLASS_MAPPINGS

models.register()

__all__ = ["NODE_CLASS_MAPPINGS"]
