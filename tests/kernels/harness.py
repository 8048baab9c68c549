"""How every kernel is tested: against its operator's reference in float64, on poisoned memory.

Without a GPU they run in Triton's interpreter (tests/conftest.py sees to it), with one on it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from accel import ops
from accel.compiler import SHIPPED
from accel.hardware import Hardware
from accel.kernels import Call, Config, Kernel, TensorSpec, kernels, load_triton
from accel.plan.schema import Plan
from accel.runtime.calls import calls_of as plan_calls

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# SMs, shared memory a block may ask for, L2.
CHIPS: dict[tuple[int, int], tuple[int, int, int]] = {
    (7, 5): (40, 64 << 10, 4 << 20),
    (8, 0): (108, 163 << 10, 40 << 20),
    (8, 6): (82, 99 << 10, 6 << 20),
    (8, 9): (128, 99 << 10, 72 << 20),
    (9, 0): (132, 227 << 10, 50 << 20),
    (10, 0): (148, 227 << 10, 126 << 20),
    (12, 0): (170, 99 << 10, 96 << 20),
}


def chip(capability: tuple[int, int] = (9, 0)) -> Hardware:
    """A GPU of that compute capability, as kernels' constraints and configurations see it."""
    multiprocessors, shared, l2 = CHIPS[capability]
    return Hardware(
        name=f"sm_{capability[0]}{capability[1]}",
        kind="cuda",
        capability=capability,
        multiprocessors=multiprocessors,
        memory_bytes=24 << 30,
        l2_bytes=l2,
        driver=None,
        torch=torch.__version__,
        cuda="13.0",
        cudnn="9.19.0",
        triton="3.6.0",
        shared_bytes=shared,
    )


def find(name: str) -> Kernel:
    """The registered kernel of that name."""
    load_triton()
    (found,) = [kernel for kernel in kernels() if kernel.name == name]
    return found


def call_of(
    op: str, tensors: Sequence[torch.Tensor | None], attrs: Mapping[str, Any]
) -> tuple[Call, torch.Tensor]:
    """The call, and its output buffer full of NaN."""
    entry = ops.get(op)
    shape = entry.shape([None if t is None else tuple(t.shape) for t in tensors], dict(attrs))
    first = next(t for t in tensors if t is not None)
    dtype = attrs.get(entry.output_dtype) if entry.output_dtype else first.dtype
    out = torch.full(shape, float("nan"), dtype=dtype, device=first.device)
    specs = tuple(None if t is None else TensorSpec.of(t) for t in tensors)
    return Call(op, TensorSpec.of(out), specs, dict(attrs)), out


def run(
    name: str,
    tensors: Sequence[torch.Tensor | None],
    attrs: Mapping[str, Any],
    config: Config | None = None,
    hardware: Hardware | None = None,
) -> torch.Tensor:
    """The kernel's result; `config` is by default its first for the call on `hardware`."""
    kernel, hardware = find(name), hardware or chip()
    call, out = call_of(kernel.op, tensors, attrs)
    assert kernel.supports(call, hardware), f"{name} does not support {call.key}"
    extra: dict[str, Any] = {}
    if kernel.configs is not None:
        config = config if config is not None else kernel.configs(call, hardware)[0]
        size = kernel.workspace(call, config)
        scratch = torch.full((size,), 255, dtype=torch.uint8, device=out.device) if size else None
        extra = {"config": config, "workspace": scratch}
    result = kernel.run(out, *tensors, **extra, **attrs)
    assert result is out
    return out


def exact(
    op: str, tensors: Sequence[torch.Tensor | None], attrs: Mapping[str, Any]
) -> torch.Tensor:
    """The reference in float64, of the very values given."""
    wide = [t.double() if t is not None and t.is_floating_point() else t for t in tensors]
    return ops.get(op).reference(*wide, **attrs)


def error(result: torch.Tensor, truth: torch.Tensor) -> float:
    """Relative L2 distance."""
    return float((result.double() - truth).norm() / truth.norm())


def check(
    name: str,
    tensors: Sequence[torch.Tensor | None],
    attrs: Mapping[str, Any],
    config: Config | None = None,
    hardware: Hardware | None = None,
    factor: float = 1.1,
) -> torch.Tensor:
    """The kernel errs no more than `factor` times what the reference in the same dtype does."""
    kernel = find(name)
    result = run(name, tensors, attrs, config, hardware)
    truth = exact(kernel.op, tensors, attrs)
    plain = ops.get(kernel.op).reference(*tensors, **attrs)
    assert torch.isfinite(result).all()
    assert error(result, truth) <= factor * error(plain, truth) + 1e-7
    return result


def calls_of(
    family: str, height: int, width: int, packs: int = 1, batch: int = 2, optional: bool = False
) -> list[Call]:
    """Every call of a shipped plan, in fp16, at one size of the latent.

    packs: of 77 tokens, in the prompt. optional: with all residuals, or with none.
    """
    path = SHIPPED / f"{family}.json"
    plan = Plan.from_json(json.loads(path.read_text(encoding="utf-8")))
    if not optional:
        plan = plan.without(entry.name for entry in plan.inputs if entry.optional)
    sizes = {"batch": batch, "height": height, "width": width, "tokens": 77 * packs}
    dims = {name: sizes[name] for name in plan.dims}
    return plan_calls(plan, dims, torch.float16)
