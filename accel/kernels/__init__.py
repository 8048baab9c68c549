"""Kernels: implementations of the operators, and the choice among them."""

from . import library
from .registry import Choice, Kernel, kernel, select

__all__ = ["Choice", "Kernel", "kernel", "library", "select"]
