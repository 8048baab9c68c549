"""On a GPU: every candidate of every call that the shipped plans make is as right as PyTorch."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from harness import calls_of, error

from accel import kernels, ops
from accel.hardware import Hardware, describe
from accel.kernels import Call, TensorSpec, norm
from accel.kernels.launch import interpreted
from accel.tuning.compiling import Compiler
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
    Compiler(hardware, torch.device("cuda", 0)).compile(
        (kernel, config, call)
        for call in calls.values()
        for kernel, config in kernels.candidates(call, hardware)
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


PDL = ("pdl", "early")
REPLAYS = 200


def test_launches_that_overlap_give_the_same_bits() -> None:
    """A chain in which each launch reads what the one before wrote, in the same few buffers."""
    hardware = describe("cuda")
    torch.manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda").half()

    image, middle, result = normal(2, 32, 32, 640), normal(2, 32, 32, 640), normal(2, 32, 32, 640)
    both = normal(2, 2, 32, 32, 640)
    scale, shift, layer = normal(640), normal(640), normal(640, 640) / 25
    window = normal(640, 3, 3, 640) / 76
    norm_of = {"groups": 32, "eps": 1e-5, "activation": "silu"}
    plain = {"activation": "none"}
    conv_of = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1}
    tokens = (image.view(2, 1024, 640), middle.view(2, 1024, 640), result.view(2, 1024, 640))
    steps: list[tuple[str, torch.Tensor, list[torch.Tensor | None], dict[str, Any]]] = [
        ("group_norm", middle, [image, scale, shift, None, None], norm_of),
        ("linear", tokens[2], [tokens[1], layer, shift, None], plain),
        ("layer_norm", tokens[1], [tokens[2], scale, shift], {"eps": 1e-5}),
        ("linear", tokens[2], [tokens[1], layer, shift, tokens[0]], plain),
        ("conv2d", middle, [result, window, scale, None, image], conv_of),
        (
            "concat_group_norm",
            both,
            [middle[..., :320], image[..., 320:], result[..., 320:], None, scale, shift],
            norm_of,
        ),
        ("linear", tokens[2], [both[0].view(2, 1024, 640), layer, shift, None], plain),
        ("group_norm", image, [both[1], scale, shift, None, None], norm_of),
    ]

    def graph(overlapping: bool) -> torch.cuda.CUDAGraph:
        runs = []
        for op, out, tensors, attrs in steps:
            specs = tuple(None if t is None else TensorSpec.of(t) for t in tensors)
            call = Call(op, TensorSpec.of(out), specs, attrs)
            kernel, config = chosen(call)
            config = {
                name: value and overlapping if name in PDL else value for name, value in config
            }
            size = kernel.workspace(call, config)
            scratch = torch.empty(size, dtype=torch.uint8, device="cuda") if size else None
            runs.append(
                partial(kernel.run, out, *tensors, config=config, workspace=scratch, **attrs)
            )
        for run in runs:  # what is compiled at the first launch cannot be captured
            run()
        torch.cuda.synchronize()
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            for _ in range(4):
                for run in runs:
                    run()
        return captured

    def chosen(call: Call) -> tuple[Any, list[tuple[str, Any]]]:
        """The first of ours that may overlap, in parts where it can be."""
        found = [
            (kernel, list(config.items()))
            for kernel, config in kernels.candidates(call, hardware)
            if kernel.launches is not None and any(config.get(name) for name in PDL)
        ]
        assert found, call.key
        return next((f for f in found if dict(f[1]).get("split", 1) != 1), found[0])

    if hardware.capability is None or hardware.capability < (9, 0):
        pytest.skip("launches overlap on sm_90 and later alone")
    start = image.clone()
    results = []
    for overlapping in (False, True):
        captured = graph(overlapping)
        image.copy_(start)
        for _ in range(REPLAYS):
            captured.replay()
        results.append(torch.cat([x.flatten() for x in (image, middle, result, both)]))
    assert results[0].isfinite().all()
    assert torch.equal(*results)
