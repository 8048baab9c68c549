"""Errors of the product. Every message is one line: what is wrong and what to do."""

from __future__ import annotations


class SwitchyardError(Exception):
    """Base of every error raised on purpose. `str(error)` is one line fit to show to a user."""


class UnsupportedModel(SwitchyardError):
    """The module, or its present state, cannot be captured or run: use the host's own path."""


class StructureUnknown(SwitchyardError):
    """A file fixes names and shapes only, and its family is unknown: the module is needed."""


class StructureMismatch(SwitchyardError):
    """Weights of one structure were offered to an engine of another."""


class InvalidFile(SwitchyardError):
    """A file is missing, truncated, damaged or of a kind that is not opened."""


class InvalidLora(SwitchyardError):
    """A LoRA is damaged or made for another family. Nothing of it was applied."""


class InvalidInput(SwitchyardError):
    """An argument of a call does not fit the engine: rank, width, batch or dtype."""


class InvalidPlan(SwitchyardError):
    """A stored plan is damaged or was written by another version."""


class DeviceUnavailable(SwitchyardError):
    """The requested device does not exist here or cannot run the engine."""


class OutOfMemory(SwitchyardError):
    """The engine's memory does not fit on the device: use the host's own path."""


class CacheUnavailable(SwitchyardError):
    """The cache folder cannot be written. Engines still work, but are built again next time."""
