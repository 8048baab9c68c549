"""The demo: the same pictures by plain PyTorch and by one engine, side by side."""

from __future__ import annotations

from .run import Options, Result, run_demo

__all__ = ["Options", "Result", "run_demo"]
