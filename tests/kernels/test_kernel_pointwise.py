"""Pointwise programs, concatenation and up-sampling: results, layouts, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import DEVICE, call_of, check, chip, error, find, run

from accel import ops
from accel.kernels import Call, TensorSpec, load_triton
from accel.ops.pointwise import (
    ADD,
    COS,
    EXP,
    GELU,
    GELU_TANH,
    MUL,
    OFFSET,
    OPERANDS,
    SCALE,
    SILU,
    SIN,
    SPLIT,
)

assert load_triton()

HALVES = [torch.float16, torch.bfloat16]
DTYPES = [*HALVES, torch.float32]
F16, F32 = torch.float16, torch.float32


def random(*shape: int, dtype: torch.dtype = F16, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def program(*instructions: tuple[float, ...], dtype: torch.dtype) -> dict[str, Any]:
    return {"program": tuple(n for step in instructions for n in step), "dtype": dtype}


def check_program(tensors: list[torch.Tensor], attrs: dict[str, Any], config: Any = None) -> None:
    """The kernel errs as the reference does: float32 inside, rounded once."""
    result = run("triton.pointwise", tensors, attrs, config)
    truth = ops.pointwise(*(t.double() for t in tensors), **{**attrs, "dtype": torch.float64})
    plain = ops.pointwise(*tensors, **attrs)
    assert result.shape == truth.shape and torch.isfinite(result).all()
    assert error(result, truth) <= 1.02 * error(plain, truth) + 2e-7


# Programs.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "steps",
    [
        [(ADD, 0, 1, 0)],
        [(MUL, 0, 1, 0)],
        [(SCALE, 0, 0, 0.3), (OFFSET, 2, 2, -1.5)],
        [(SILU, 0, 0, 0), (MUL, 2, 1, 0)],
        [(GELU, 0, 0, 0)],
        [(GELU_TANH, 0, 0, 0)],
        [(SCALE, 0, 0, 300.0), (SIN, 2, 2, 0), (COS, 2, 2, 0), (ADD, 3, 4, 0)],
        [(EXP, 0, 0, 0), (ADD, 2, 1, 0), (SILU, 3, 3, 0), (ADD, 4, 2, 0)],
        [(SPLIT, 0, 1, 7)],
        [(SPLIT, 0, 1, 3), (SPLIT, 1, 2, 12)],
    ],
    ids=str,
)
def test_instructions(steps: Any, dtype: torch.dtype) -> None:
    x, y = random(2, 3, 5, 20, dtype=dtype), random(2, 3, 5, 20, dtype=dtype, seed=1)
    check_program([x, y], program(*steps, dtype=dtype))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_far_from_zero() -> None:
    """Where an exponential leaves the range of floats, and a half would be infinite on the way."""
    x = torch.tensor([[-300.0, -90, -20, 20, 90, 300, 3, 6e4]], device=DEVICE, dtype=F16)
    for code in (SILU, GELU, GELU_TANH):
        check_program([x], program((code, 0, 0, 0), dtype=F16))
    check_program([x], program((MUL, 0, 0, 0), (SCALE, 1, 1, 1e-6), dtype=F16))


def test_the_embedding_of_the_timestep() -> None:
    """float32 to the end, for angles up to a thousand."""
    time = torch.tensor([[999.0], [500.5], [0.0]], device=DEVICE)
    table = torch.exp(torch.arange(20.0, device=DEVICE) / -3).repeat(2)
    steps = [(MUL, 0, 1, 0), (COS, 2, 2, 0), (SIN, 2, 2, 0), (SPLIT, 3, 4, 20)]
    attrs = program(*steps, dtype=F16)
    result = run("triton.pointwise", [time, table], attrs)
    angles = time * table[:20]  # in float32, as every implementation has them
    expected = torch.cat([angles.double().cos(), angles.double().sin()], -1)
    assert float((result.double() - expected).abs().max()) <= 2**-11
    assert result.shape == (3, 40)


OPERAND_SHAPES = [(2, 3, 5, 24), (24,), (1, 1, 1, 24), (2, 1, 1, 24), (2, 3, 5, 1), (2, 1, 1, 1)]


@pytest.mark.parametrize("shape", [*OPERAND_SHAPES, (1,), ()], ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_broadcast_operands(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, y = random(2, 3, 5, 24, dtype=dtype), random(*shape, dtype=dtype, seed=1)
    check_program([x, y], program((MUL, 1, 0, 0), (ADD, 2, 0, 0), dtype=dtype))
    check("triton.add", [y, x] if y.dim() == 4 else [x, y], {})


@pytest.mark.parametrize(
    "shape", [(40,), (3, 40), (3, 1), (1, 24), (2, 5, 1), (1, 1, 7, 3)], ids=str
)
def test_results_of_any_rank_and_width(shape: tuple[int, ...]) -> None:
    x = random(*shape)
    for other in (shape, shape[-1:], (*shape[:-1], 1), (shape[0], *[1] * (len(shape) - 1))):
        y = random(*other, seed=1)
        if torch.broadcast_shapes(shape, other) == shape:
            check_program([x, y], program((ADD, 0, 1, 0), dtype=F16))


def test_every_place_for_an_operand_is_used() -> None:
    tensors = [random(*shape, seed=i) for i, shape in enumerate(OPERAND_SHAPES)]
    assert len(tensors) == OPERANDS
    steps = [(ADD, 0, 1, 0), (MUL, 6, 2, 0), (ADD, 7, 3, 0), (MUL, 8, 4, 0), (ADD, 9, 5, 0)]
    check_program(tensors, program(*steps, dtype=F16))


def test_slices_are_read_in_place() -> None:
    """A row of the merged projection of all time embeddings; columns of a merged product."""
    x, merged = random(2, 3, 5, 24), random(2, 3, 5, 56)
    check_program([x, merged[..., 8:32]], program((MUL, 0, 1, 0), dtype=F16))
    check_program([x, merged[..., 3:27]], program((MUL, 0, 1, 0), dtype=F16))
    vector = random(2, 1, 1, 99)[..., 40:64]
    check_program([x, vector], program((MUL, 0, 1, 0), dtype=F16))
    check_program([x, merged[..., 5:6]], program((MUL, 0, 1, 0), dtype=F16))
    check("triton.silu", [random(4, 99)[:, 40:64]], {})


@pytest.mark.parametrize("block", [128, 256, 1024, 2048, 4096])
def test_blocks_of_any_size(block: int) -> None:
    attrs = program((ADD, 0, 1, 0), dtype=F16)
    for size in ((7, 9, 3), (2, 35, 48), (1, 5, 1)):
        tensors = [random(*size), random(*size, seed=1)]
        check_program(tensors, attrs, {"block": block, "warps": 4})


def test_blocks_suit_the_work() -> None:
    """Blocks for every multiprocessor, as long as there is work for them."""
    configs = find("triton.pointwise").configs
    assert configs is not None

    def first(elements: int, *steps: tuple[float, ...]) -> int:
        x = TensorSpec((elements // 8, 8), (8, 1), F16)
        call = Call("pointwise", x, (x,), program(*steps, dtype=F16))
        found = configs(call, chip())
        assert len({str(config) for config in found}) == len(found) <= 4
        return int(found[0]["block"])

    assert first(2560, (SILU, 0, 0, 0)) == 256
    assert first(1 << 22, (SILU, 0, 0, 0)) == 2048
    assert first(640, (SIN, 0, 0, 0)) == 128


def test_mixed_dtypes_are_rounded_to_the_one_asked_for() -> None:
    x, y = random(3, 40), random(40, dtype=F32, seed=1)
    for dtype in DTYPES:
        check_program([x, y], program((MUL, 0, 1, 0), (EXP, 2, 2, 0), dtype=dtype))


# Single operators.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_single_operators(dtype: torch.dtype) -> None:
    x, y = random(2, 5, 24, dtype=dtype), random(2, 5, 24, dtype=dtype, seed=1)
    check("triton.silu", [x], {}, factor=1.2)
    check("triton.gelu", [x], {"approximate": "none"}, factor=1.2)
    check("triton.gelu", [x], {"approximate": "tanh"}, factor=1.2)
    for name in ("add", "mul", "residual_add"):
        assert torch.equal(run(f"triton.{name}", [x, y], {}), getattr(ops, name)(x, y))
    for other in DTYPES:
        assert torch.equal(run("triton.cast", [x], {"dtype": other}), x.to(other))


def test_what_programs_do_not_run_is_refused() -> None:
    x, y = random(2, 3, 5, 24), random(2, 3, 5, 24)
    attrs = program((ADD, 0, 1, 0), dtype=F16)

    def supported(op: str, tensors: Any, attrs: Any, chip_: Any = (9, 0)) -> bool:
        call, _ = call_of(op, tensors, attrs)
        return find(f"triton.{op}").supports(call, chip(chip_))

    assert supported("pointwise", [x, y], attrs) and supported("pointwise", [x, y], attrs, (7, 5))
    for other in (
        random(3, 5, 24),  # the same for every image
        random(2, 1, 5, 24),
        random(1, 3, 5, 1),
        random(2, 24, 3, 5).permute(0, 2, 3, 1),
        random(2, 5, 3, 24).transpose(1, 2),  # no one stride from row to row
        random(2, 3, 5, 48)[..., ::2],
        y.double(),
        y.int(),
    ):
        assert not supported("pointwise", [x, other], attrs), other.shape
    assert not supported("pointwise", [x] * (OPERANDS + 1), attrs)
    assert not supported("residual_add", [x, None], {})
    assert not supported("cast", [x], {"dtype": torch.float64})
    assert not supported("cast", [x.long()], {"dtype": F16})
    bf16 = program((ADD, 0, 1, 0), dtype=torch.bfloat16)
    assert supported("pointwise", [x, y], bf16, (8, 0))
    assert not supported("pointwise", [x, y], bf16, (7, 5))  # cannot round to it


def test_sizes_do_not_compile_anew() -> None:
    """Only numbers that are not compiled in differ between two sizes of an image."""
    attrs = program((MUL, 0, 1, 0), (ADD, 2, 2, 0), dtype=F16)

    def compiled_in(height: int, width: int) -> dict[str, Any]:
        tensors = [random(2, height, width, 40), random(2, 1, 1, 40)]
        _, out = call_of("pointwise", tensors, attrs)
        kernel = find("triton.pointwise")
        assert kernel.launches is not None
        config = {"block": 256, "warps": 4}
        (launch,) = kernel.launches(out, *tensors, config=config, workspace=None, **attrs)
        return {name: value for name, value in launch.args.items() if name.isupper()}

    assert compiled_in(3, 5) == compiled_in(7, 8)


# Concatenation.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("widths", [(16, 24), (8, 40), (5, 3), (24, 8, 16), (4, 20, 8, 1)], ids=str)
@pytest.mark.parametrize("added", ["none", "first", "last", "all"])
def test_concatenation(dtype: torch.dtype, widths: tuple[int, ...], added: str) -> None:
    if len(widths) > 2 and (dtype != F16 or added in ("first", "last")):
        return
    pairs: list[torch.Tensor | None] = []
    for k, width in enumerate(widths):
        with_residual = added == "all" or (added, k) in (("first", 0), ("last", len(widths) - 1))
        pairs.append(random(2, 3, 5, width, dtype=dtype, seed=k))
        pairs.append(random(2, 3, 5, width, dtype=dtype, seed=9 + k) if with_residual else None)
    assert torch.equal(run("triton.concat", pairs, {}), ops.concat(*pairs))


@pytest.mark.parametrize("config", [(128, 4), (1024, 4), (2048, 4), (4096, 8)], ids=str)
def test_concatenation_by_other_blocks(config: tuple[int, int]) -> None:
    pairs = [random(2, 7, 9, 24), random(2, 7, 9, 24, seed=1), random(2, 7, 9, 8, seed=2), None]
    options = {"block": config[0], "warps": config[1]}
    assert torch.equal(run("triton.concat", pairs, {}, options), ops.concat(*pairs))


def test_parts_and_residuals_may_be_slices() -> None:
    merged = random(2, 3, 5, 64)
    pairs = [merged[..., 8:24], merged[..., 1:17], merged[..., 40:48], None]
    assert torch.equal(run("triton.concat", pairs, {}), ops.concat(*pairs))
    rows = random(3, 40)
    assert torch.equal(
        run("triton.concat", [rows[:, :8], None, rows, None], {}),
        ops.concat(rows[:, :8], None, rows, None),
    )


def test_a_concatenation_is_one_launch() -> None:
    """With residuals and without."""
    x, y = random(2, 3, 5, 16), random(2, 3, 5, 8)
    launches = find("triton.concat").launches
    assert launches is not None
    for pairs in ([x, None, y, None], [x, x, y, y]):
        _, out = call_of("concat", pairs, {})
        config = {"block": 256, "warps": 4}
        assert len(launches(out, *pairs, config=config, workspace=None)) == 1


def test_other_concatenations_are_refused() -> None:
    x, y = random(2, 3, 5, 16), random(2, 3, 5, 8)
    kernel = find("triton.concat")

    def supported(*pairs: torch.Tensor | None, capability: tuple[int, int] = (9, 0)) -> bool:
        call, _ = call_of("concat", pairs, {})
        return kernel.supports(call, chip(capability))

    assert supported(x, None, y, y) and supported(x, None, y, y, capability=(7, 5))
    assert not supported(x, None, y, y.float())
    assert not supported(x, None, y.double(), None)
    assert not supported(x, None, random(2, 8, 3, 5).permute(0, 2, 3, 1), None)
    assert not supported(x, None, random(2, 4, 5, 8)[:, :3], None)  # no one stride from row to row
    assert not supported(*[x, None] * 5)
    bf16 = x.bfloat16()
    assert supported(bf16, bf16, capability=(8, 0)) and not supported(bf16, bf16, capability=(7, 5))


# Up-sampling.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((2, 3, 5, 24), (6, 10)),
        ((1, 5, 7, 16), (9, 13)),  # to a skip of odd size
        ((2, 4, 3, 5), (7, 6)),
        ((1, 9, 8, 8), (4, 8)),
        ((1, 1, 1, 40), (3, 2)),
    ],
    ids=str,
)
def test_up_sampling(dtype: torch.dtype, shape: tuple[int, ...], size: tuple[int, int]) -> None:
    x = random(*shape, dtype=dtype)
    result = run("triton.upsample_nearest", [x], {"size": size})
    assert torch.equal(result, ops.upsample_nearest(x, size=size))


@pytest.mark.parametrize("size", [3, 7, 41, 49, 61, 107, 249])
def test_the_very_pixels_that_pytorch_picks(size: int) -> None:
    """Ratios that float32 rounds; a pixel is its own number here."""
    for source in (size // 2 or 1, size - 1, 2 * size // 3 or 1):
        x = torch.arange(source, device=DEVICE, dtype=F32).view(1, 1, source, 1)
        result = run("triton.upsample_nearest", [x], {"size": (1, size)})
        expected = F.interpolate(x.permute(0, 3, 1, 2), size=(1, size), mode="nearest")
        assert torch.equal(result.flatten(), expected.flatten())


def test_up_sampling_of_a_slice_and_in_other_blocks() -> None:
    x = random(2, 3, 5, 64)[..., 8:40]
    for block, warps in ((128, 4), (1024, 4), (4096, 8)):
        config = {"block": block, "warps": warps}
        result = run("triton.upsample_nearest", [x], {"size": (6, 11)}, config)
        assert torch.equal(result, ops.upsample_nearest(x, size=(6, 11)))


def test_other_up_samplings_are_refused() -> None:
    kernel = find("triton.upsample_nearest")
    for x, expected in (
        (random(2, 3, 5, 24), True),
        (random(2, 24, 3, 5).permute(0, 2, 3, 1), False),
        (random(2, 4, 5, 24)[:, :3], False),
        (random(2, 3, 5, 24).double(), False),
    ):
        call, _ = call_of("upsample_nearest", [x], {"size": (6, 10)})
        assert kernel.supports(call, chip()) is expected
    call, _ = call_of("upsample_nearest", [random(1, 3, 5, 8).bfloat16()], {"size": (6, 10)})
    assert kernel.supports(call, chip((8, 0))) and not kernel.supports(call, chip((7, 5)))
