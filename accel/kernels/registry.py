"""Implementations of operators, and what the choice among them needs to know of each.

A kernel computes into the buffer that memory planning gave it and returns it. One that cannot (its
library makes its own result) says so with `allocates`: its result is then used where it is, and no
buffer is planned for it. Which kernel and configuration a call gets is chosen in `tuning`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any, TypeVar

import torch

from .. import ops
from ..hardware import Hardware
from .launch import Launch
from .nvrtc import CudaLaunch

Config = Mapping[str, int | str | bool]
"""Named parameters of one variant of a kernel (tile sizes, warps, …), as JSON data."""

Run = Callable[..., torch.Tensor]
"""`run(out, *tensors, **attrs) -> result`; `out` is None for a kernel that allocates, and may be a
tuple where the operator has several results (`ops.Op.results`). A kernel with configurations also
takes `config=`, and `workspace=` (uint8, or None for 0 bytes)."""

AnyLaunch = Launch | CudaLaunch
L = TypeVar("L", Launch, CudaLaunch)

NO_CONFIG: Config = {}

_SHORT = {
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.float32: "f32",
    torch.float64: "f64",
    torch.int64: "i64",
    torch.int32: "i32",
}


@dataclass(frozen=True)
class TensorSpec:
    """What a kernel may ask of a tensor before there is one.

    shape and stride in elements; `aligned`: it starts at a multiple of 16 bytes; `constant`: it is
    a weight, so that no earlier kernel has just left it in the cache.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    aligned: bool = True
    constant: bool = False

    @staticmethod
    def of(tensor: torch.Tensor, constant: bool = False) -> TensorSpec:
        """The spec of a tensor, which may be on `meta`; its storage is taken to be aligned."""
        start = tensor.storage_offset() * tensor.element_size()
        return TensorSpec(
            tuple(tensor.shape), tensor.stride(), tensor.dtype, start % 16 == 0, constant
        )

    @cached_property
    def contiguous(self) -> bool:
        """Whether the elements lie side by side in order."""
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return True

    @property
    def rows(self) -> int:
        """How many rows of the last dimension there are."""
        return prod(self.shape[:-1])

    def row_stride(self) -> int | None:
        """Elements from one row to the next, if one number says it for all leading dimensions."""
        return self._row_stride

    @cached_property
    def _row_stride(self) -> int | None:
        leading = [(n, s) for n, s in zip(self.shape[:-1], self.stride[:-1], strict=True) if n != 1]
        if not leading:
            return self.shape[-1]
        step, expected = leading[-1][1], leading[-1][1]
        for size, stride in reversed(leading):
            if stride != expected:
                return None
            expected *= size
        return step

    def describe(self, rowwise: bool) -> str:
        """`2x64x64x320:f16`; rowwise: leading dimensions as one; strides where they matter."""
        shape, text = self.shape, ""
        if not self.contiguous:
            step = self.row_stride()
            text = f"@{step}" if rowwise and step else "@" + ",".join(map(str, self.stride))
            rowwise = rowwise and step is not None
        if rowwise and len(shape) > 1:
            shape = (self.rows, shape[-1])
        name = _SHORT.get(self.dtype, str(self.dtype).removeprefix("torch."))
        mark = ("" if self.aligned else "!") + ("c" if self.constant else "")
        return "x".join(map(str, shape)) + f":{name}{text}{mark}"


@dataclass(frozen=True)
class Call:
    """One operator call at concrete shapes: all that a choice of its kernel may depend on."""

    op: str
    out: TensorSpec
    tensors: tuple[TensorSpec | None, ...]
    attrs: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def key(self) -> str:
        """The call as a line of text: equal calls have equal keys, in every process."""
        rowwise = ops.get(self.op).rowwise
        tensors = " ".join("-" if t is None else t.describe(rowwise) for t in self.tensors)
        attrs = " ".join(f"{name}={_plain(value)}" for name, value in sorted(self.attrs.items()))
        return f"{self.op}({tensors}) -> {self.out.describe(rowwise)}" + (attrs and f" {attrs}")

    @property
    def flops(self) -> int:
        """Multiply-adds count as two; pointwise work is not counted."""
        shapes = [None if t is None else t.shape for t in self.tensors]
        return ops.get(self.op).flops(shapes, self.out.shape, dict(self.attrs))

    @property
    def bytes(self) -> int:
        """Bytes of every operand once: the least that must move."""
        present = [self.out, *(t for t in self.tensors if t is not None)]
        return sum(prod(spec.shape) * spec.dtype.itemsize for spec in present)


def _plain(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return "(" + ",".join(map(_plain, value)) + ")"
    return f"{value:g}" if isinstance(value, float) else str(value).removeprefix("torch.")


@dataclass(frozen=True)
class Kernel:
    """One implementation of one operator.

    devices: device types it runs on. `priority`: where nothing is measured, the lowest wins, of
    those that may: a library's, and those of `unmeasured`, which win by far wherever they run.
    `supports(call, hardware)`: whether it gives the right result for this call there.
    `configs(call, hardware)`: its variants for the call, the likeliest first; a handful.
    `workspace(call, config)`: bytes of scratch memory that a run needs.
    `fits(call, config, hardware)`: whether a configuration of a size near by can serve this call.
    `launches`: of a kernel that is compiled here, the launches that a run consists of.
    `adds_apart`: a residual costs it a further pass over memory. `planned`: its library makes a
    plan for every size, when first asked for the scratch memory, which takes tens of milliseconds.
    """

    name: str
    op: str
    run: Run
    devices: tuple[str, ...]
    allocates: bool = False
    priority: int = 1
    unmeasured: bool = False
    supports: Callable[[Call, Hardware], bool] = lambda call, hardware: True
    configs: Callable[[Call, Hardware], Sequence[Config]] | None = None
    workspace: Callable[[Call, Config], int] = lambda call, config: 0
    fits: Callable[[Call, Config, Hardware], bool] = lambda call, config, hardware: True
    launches: Callable[..., Sequence[AnyLaunch]] | None = None
    adds_apart: bool = False
    planned: bool = False


_KERNELS: list[Kernel] = []


def kernel(
    op: str, *, name: str, devices: tuple[str, ...] = ("cuda",), **traits: Any
) -> Callable[[Run], Run]:
    """Register the decorated function as an implementation of operator `op`.

    traits: further fields of `Kernel`.
    """

    def register(run: Run) -> Run:
        _KERNELS.append(Kernel(name, op, run, devices, **traits))
        return run

    return register


def compiled_kernel(
    op: str, *, name: str, **traits: Any
) -> Callable[[Callable[..., Sequence[L]]], Callable[..., Sequence[L]]]:
    """Register a function that returns the launches which compute `out`, in order.

    It is called as `function(out, *tensors, config=…, workspace=…, **attrs)` and launches nothing
    itself, so that the same launches can be run, captured, or compiled where there is no GPU.
    """

    def register(function: Callable[..., Sequence[L]]) -> Callable[..., Sequence[L]]:
        def run(out: torch.Tensor, *tensors: torch.Tensor | None, **rest: Any) -> torch.Tensor:
            for launch in function(out, *tensors, **rest):
                launch.run()
            return out

        _KERNELS.append(Kernel(name, op, run, ("cuda",), launches=function, **traits))
        return function

    return register


def kernels() -> Iterable[Kernel]:
    """Every registered implementation."""
    return tuple(_KERNELS)


def candidates(
    call: Call, hardware: Hardware, without_ours: bool = False, only: str | None = None
) -> list[tuple[Kernel, Config]]:
    """Every implementation of a call with every configuration of it, the default choice first.

    Last comes the operator's reference, which runs everywhere. without_ours: none that is compiled
    here, but for those that are not measured. only: the name of the one that is asked for.
    """
    fitting = [
        entry
        for entry in _KERNELS
        if entry.op == call.op
        and only in (None, entry.name)
        and hardware.kind in entry.devices
        and (entry.launches is None or entry.unmeasured or not without_ours)
        and entry.supports(call, hardware)
    ]
    found: list[tuple[Kernel, Config]] = []
    for entry in sorted(fitting, key=lambda entry: entry.priority):
        variants = (NO_CONFIG,) if entry.configs is None else entry.configs(call, hardware)
        found += [(entry, config) for config in variants]
    return [*found, (reference(call.op), NO_CONFIG)]


def reference(op: str) -> Kernel:
    """The operator's eager reference as a kernel."""
    function = ops.get(op).reference

    def run(out: Any, *tensors: torch.Tensor | None, **attrs: Any) -> Any:
        made = function(*tensors, **attrs)
        if not isinstance(out, tuple):
            return out.copy_(made)
        for place, one in zip(out, made, strict=True):
            place.copy_(one)
        return out

    return Kernel(f"reference.{op}", op, run, ("cpu", "cuda"), priority=99)
