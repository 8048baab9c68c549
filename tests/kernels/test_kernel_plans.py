"""On a GPU: every candidate of every call that the shipped plans make is as right as PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import calls_of, error

from accel import kernels, ops
from accel.hardware import Hardware, describe
from accel.kernels import Call, norm
from accel.kernels.launch import interpreted
from accel.tuning.compiling import compile_ahead
from accel.tuning.measure import Operands

pytestmark = pytest.mark.gpu

CASES = [
    ("sd15", 64, 64, 1, 2),
    ("sd15", 61, 83, 3, 1),
    ("sd15-controlnet", 64, 64, 1, 2),
    ("sdxl", 128, 128, 1, 2),
    ("sdxl", 112, 144, 1, 2),
    ("sdxl", 99, 77, 2, 3),
]
"""Family, height and width of the latent, packs of 77 tokens, batch."""


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_candidate_of_every_call(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert not interpreted(norm._layer_norm), "the interpreter would be tested, not the GPU"
    family, height, width, packs, batch = case
    hardware = describe("cuda")
    calls = {
        call.key: call
        for optional in (False, True)
        for call in calls_of(family, height, width, packs, batch, optional)
    }
    compile_ahead(
        (
            (kernel, config, call)
            for call in calls.values()
            for kernel, config in kernels.candidates(call, hardware)
        ),
        hardware,
    )
    problems = []
    tried = 0
    for call in calls.values():
        found = check(call, hardware)
        tried += len(found)
        problems += [text for text in found if text is not None]
    assert tried > len(calls)
    assert not problems, "\n".join(["", *problems])


def check(call: Call, hardware: Hardware) -> list[str | None]:
    """What is wrong with each candidate of a call; None where nothing is."""
    operands = Operands(call, hardware, torch.device("cuda"))
    tensors = operands._sets[0]
    op = ops.get(call.op)
    wide = [t.float() if t is not None and t.is_floating_point() else t for t in tensors]
    attrs = dict(call.attrs)
    truth = op.reference(*wide, **attrs).double()
    allowed = 1.1 * error(op.reference(*tensors, **attrs), truth) + 1e-6
    found: list[str | None] = []
    for kernel, config in kernels.candidates(call, hardware)[:-1]:
        name = f"{kernel.name} {dict(config)} for {call.key}"
        try:
            result = operands.bind(kernel, config)(0)
            torch.cuda.synchronize()
        except Exception as problem:
            library = kernel.launches is None  # may refuse what only trying tells
            found.append(None if library else f"{name}: {str(problem)[:200]}")
            continue
        distance = error(result, truth)
        found.append(None if distance <= allowed else f"{name}: {distance:.2g} > {allowed:.2g}")
        result.fill_(float("nan"))
    return found
