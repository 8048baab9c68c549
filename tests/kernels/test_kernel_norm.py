"""GroupNorm and LayerNorm: results, digits, layouts, configurations, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from harness import DEVICE, call_of, check, chip, error, exact, find, run

from accel import ops
from accel.kernels import TensorSpec, load_triton

assert load_triton()

GROUP, LAYER = "triton.group_norm", "triton.layer_norm"
ADD_LAYER, JOINED = "triton.add_layer_norm", "triton.concat_group_norm"
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
DTYPES = [F16, BF16, F32]
SPLIT = {"scheme": "split", "channels": 64, "rows": 16, "warps": 4, "grid": 20, "pdl": False}
"""Several blocks of statistics even for a few pixels."""


def random(*shape: int, dtype: torch.dtype = F16, seed: int = 0, mean: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) + mean).to(DEVICE, dtype)


def operands(
    *shape: int,
    dtype: torch.dtype = F16,
    shift: bool = False,
    offset: bool = False,
    mean: float = 0.0,
) -> list[torch.Tensor | None]:
    batch, width = shape[0], shape[-1]
    return [
        random(*shape, dtype=dtype, mean=mean),
        random(width, dtype=dtype, seed=1, mean=1.0),
        random(width, dtype=dtype, seed=2),
        random(batch, width, dtype=dtype, seed=3) if shift else None,
        random(width, dtype=dtype, seed=4) if offset else None,
    ]


def attributes(groups: int, activation: str = "silu", eps: float = 1e-5) -> dict[str, Any]:
    return {"groups": groups, "eps": eps, "activation": activation}


def variants(
    name: str, tensors: Sequence[torch.Tensor | None], attrs: Mapping[str, Any], **hardware: Any
) -> list[Any]:
    kernel = find(name)
    call, _ = call_of(kernel.op, tensors, attrs)
    assert kernel.configs is not None
    return list(kernel.configs(call, chip(**hardware)))


def supported(
    name: str,
    tensors: Sequence[torch.Tensor | None],
    attrs: Mapping[str, Any],
    capability: tuple[int, int] = (9, 0),
    **changes: Any,
) -> bool:
    """changes: other specs in the place of the first tensors', `x`, `weight`, …, or of `out`."""
    kernel = find(name)
    call, _ = call_of(kernel.op, tensors, attrs)
    specs = list(call.tensors)
    for index, which in enumerate(("x", "weight", "bias", "shift", "offset")):
        if which in changes:
            specs[index] = changes[which]
    call = replace(call, tensors=tuple(specs), out=changes.get("out", call.out))
    return kernel.supports(call, chip(capability))


# GroupNorm.

SCHEMES = [SPLIT, {"scheme": "whole", "groups": 4, "warps": 4, "pdl": False}]


@pytest.mark.parametrize("config", SCHEMES, ids=lambda config: config["scheme"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["none", "silu"])
def test_group_norm(config: Any, dtype: torch.dtype, activation: str) -> None:
    check(GROUP, operands(2, 3, 11, 80, dtype=dtype), attributes(8, activation), config)


@pytest.mark.parametrize("config", SCHEMES, ids=lambda config: config["scheme"])
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("offset", [False, True])
def test_what_is_added_before_the_statistics(config: Any, shift: bool, offset: bool) -> None:
    tensors = operands(2, 33, 80, shift=shift, offset=offset)
    check(GROUP, tensors, attributes(8), config)


@pytest.mark.parametrize("config", SCHEMES, ids=lambda config: config["scheme"])
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_a_mean_far_from_zero_keeps_its_digits(config: Any, dtype: torch.dtype) -> None:
    """Of the input, and of what is added to it: float32 squares of 100 would have lost them."""
    tensors = operands(1, 50, 80, dtype=dtype, mean=100.0)
    result = check(GROUP, tensors, attributes(8, "none"), config)
    # float32 inside: what is left is the rounding of the result.
    truth = exact("group_norm", tensors, attributes(8, "none"))
    assert error(result, truth) <= 1.01 * error(truth.to(dtype), truth)

    tensors = operands(1, 50, 80, dtype=dtype, offset=True)
    assert tensors[4] is not None
    tensors[4] += 100
    truth = exact("group_norm", tensors, attributes(8, "none"))
    result = run(GROUP, tensors, attributes(8, "none"), config)
    assert error(result, truth) <= 1.01 * error(truth.to(dtype), truth)


@pytest.mark.parametrize("config", SCHEMES, ids=lambda config: config["scheme"])
def test_a_first_pixel_unlike_all_others(config: Any) -> None:
    """Distances are taken from one pixel of a block: also where that is an outlier."""
    tensors = operands(1, 50, 80, dtype=F32)
    assert tensors[0] is not None
    tensors[0][:, ::16] *= 1000
    truth = exact("group_norm", tensors, attributes(8, "none"))
    assert error(run(GROUP, tensors, attributes(8, "none"), config), truth) < 1e-5


@pytest.mark.parametrize("config", SCHEMES, ids=lambda config: config["scheme"])
def test_an_image_of_one_colour(config: Any) -> None:
    tensors = operands(2, 37, 80)
    assert tensors[0] is not None and tensors[2] is not None
    tensors[0].fill_(7.0)
    result = run(GROUP, tensors, attributes(8, "none"), config)
    assert torch.allclose(result, tensors[2].expand(result.shape), atol=4e-3)


@pytest.mark.parametrize(
    ("width", "groups"),
    [
        (32, 32),
        (64, 32),
        (320, 32),
        (640, 32),
        (320, 4),
        (240, 4),
        (96, 2),
        (40, 4),
        (24, 1),
        (9, 3),
    ],
    ids=str,
)
def test_widths_of_groups(width: int, groups: int) -> None:
    """Groups that fill blocks of channels, that lie across two or more, and odd ones."""
    tensors = operands(1, 3, 7, width, shift=True)
    check(GROUP, tensors, attributes(groups), SPLIT)
    whole = [c for c in variants(GROUP, tensors, attributes(groups)) if c["scheme"] == "whole"]
    check(GROUP, tensors, attributes(groups), whole[0])


def test_strips_of_several_tiles() -> None:
    """Each block of both launches loops, over a last tile that is cut and strips that are short."""
    for grid in (2, 4, 6):
        tensors = operands(1, 9, 17, 80, shift=True, offset=True)
        check(GROUP, tensors, attributes(8), {**SPLIT, "grid": grid})


@pytest.mark.parametrize("pixels", [153, 290])
def test_every_configuration_of_group_norm(pixels: int) -> None:
    tensors = operands(1, pixels, 40, shift=True)
    attrs = attributes(4)
    found = variants(GROUP, tensors, attrs)
    assert {config["scheme"] for config in found} == {"split", "whole"}
    assert 2 < len(found) <= 8
    for config in {str({**c, "pdl": False}): c for c in found}.values():
        check(GROUP, tensors, attrs, config)


@pytest.mark.parametrize("config", SCHEMES, ids=lambda config: config["scheme"])
def test_rows_apart(config: Any) -> None:
    """A slice of the channels of a wider image, and shifts that are rows of a wider result."""
    tensors = operands(2, 3, 11, 80, shift=True, offset=True)
    wide = random(2, 3, 11, 208, seed=5)
    tensors[0] = wide[..., 64:144]
    tensors[3] = random(2, 300, seed=6)[:, 100:180]
    check(GROUP, tensors, attributes(8), config)


@pytest.mark.parametrize("config", SCHEMES, ids=lambda config: config["scheme"])
def test_parameters_of_another_dtype(config: Any) -> None:
    tensors = operands(2, 20, 80, shift=True)
    plain = run(GROUP, tensors, attributes(8), config)
    wide = [t if t is None or i == 0 else t.float() for i, t in enumerate(tensors)]
    assert torch.equal(run(GROUP, wide, attributes(8), config), plain)


def test_what_group_norm_refuses() -> None:
    tensors, attrs = operands(2, 4, 4, 64, shift=True, offset=True), attributes(32)
    assert supported(GROUP, tensors, attrs)
    assert supported(GROUP, tensors[:3], attrs)
    assert not supported(GROUP, tensors, {**attrs, "activation": "gelu"})
    assert not supported(GROUP, tensors, attributes(24))
    specs = [TensorSpec.of(t) for t in tensors if t is not None]
    for index, which in enumerate(("x", "weight", "bias", "shift", "offset")):
        half = replace(specs[index], shape=(*specs[index].shape[:-1], 32))
        double = replace(specs[index], dtype=torch.float64)
        apart = replace(specs[index], stride=tuple(2 * s for s in specs[index].stride))
        for changed in (half, double, apart):
            assert not supported(GROUP, tensors, attrs, **{which: changed}), (which, changed)
    x = specs[0]
    for changed in (
        replace(x, aligned=False),
        replace(x, stride=(1024, 64, 256, 1)),  # columns before rows
        replace(x, shape=(2, 64), stride=(64, 1)),
        replace(x, shape=(2, 1 << 13, 1 << 12, 64), stride=(1 << 31, 1 << 18, 64, 1)),
    ):
        assert not supported(GROUP, tensors, attrs, x=changed, out=replace(changed, aligned=True))
    assert not supported(GROUP, tensors, attrs, out=replace(x, aligned=False))
    assert not supported(GROUP, tensors, attrs, out=replace(x, dtype=F32))
    assert not supported(GROUP, tensors, attrs, out=replace(x, stride=(1024, 64, 256, 1)))
    halves = operands(2, 4, 4, 64, dtype=BF16)
    assert supported(GROUP, halves, attrs, (8, 0)) and not supported(GROUP, halves, attrs, (7, 5))


def test_configurations_suit_the_image_and_the_chip() -> None:
    meta = torch.device("meta")

    def found(pixels: int, width: int, batch: int = 2, **hardware: Any) -> list[Any]:
        x, w = (torch.empty(s, dtype=F16, device=meta) for s in ((batch, pixels, width), (width,)))
        return variants(GROUP, [x, w, w, None, None], attributes(32), **hardware)

    for pixels in (64, 256, 1024, 4096, 16384, 65536):
        for width in (320, 640, 960, 1280, 1920, 2560):
            configs = found(pixels, width)
            assert 4 <= len(configs) <= 8
            assert len({str(config) for config in configs}) == len(configs)
            small = pixels <= 256 and pixels * width // 32 <= 16384
            assert configs[0]["scheme"] == ("whole" if small else "split")
            assert configs[0]["pdl"]
            assert not any(c["pdl"] for c in found(pixels, width, capability=(8, 9)))
    # An image of another size takes the same ones, as long as it is no small one.
    assert found(4096, 320)[:5] == found(3000, 320)[:5] == found(4096, 320, batch=1)[:5]


def test_the_launches_fill_the_chip_and_cover_the_image() -> None:
    """Blocks of channels x pixels x images: enough for the SMs, no more than can be merged."""
    kernel, meta = find(GROUP), torch.device("meta")
    assert kernel.launches is not None
    for pixels, width in ((256, 2560), (1024, 1280), (4096, 320), (16384, 320), (65536, 640)):
        x, w = (torch.empty(s, dtype=F16, device=meta) for s in ((2, pixels, width), (width,)))
        tensors: list[Any] = [x, w, w, None, None]
        call, out = call_of("group_norm", tensors, attributes(32))
        for config in variants(GROUP, tensors, attributes(32)):
            if config["scheme"] == "whole":
                continue
            scratch = torch.empty(kernel.workspace(call, config), dtype=torch.uint8, device=meta)
            first, second = kernel.launches(
                out, *tensors, config=config, workspace=scratch, **call.attrs
            )
            columns, blocks, images = first.grid
            assert images == 2 and blocks <= 64 and columns * config["channels"] == width
            assert blocks * first.args["span"] >= pixels > (blocks - 1) * first.args["span"]
            strip = second.args["tiles"] * config["rows"]
            assert second.grid[1] * strip >= pixels > (second.grid[1] - 1) * strip
            assert min(columns * blocks * images, columns * second.grid[1] * images) >= 132


def joined_of(
    *widths: int,
    residuals: Sequence[bool] = (),
    image: tuple[int, ...] = (2, 3, 11),
    dtype: torch.dtype = F16,
    mean: float = 0.0,
) -> list[torch.Tensor | None]:
    """Parts of those widths, of which some have residuals, and the parameters of their norm."""
    tensors: list[torch.Tensor | None] = []
    for index, width in enumerate(widths):
        added = (*residuals, *[False] * len(widths))[index]
        tensors.append(random(*image, width, dtype=dtype, seed=10 + index, mean=mean))
        made = random(*image, width, dtype=dtype, seed=20 + index)
        tensors.append(made if added else None)
    width = sum(widths)
    return [
        *tensors,
        random(width, dtype=dtype, seed=1, mean=1.0),
        random(width, dtype=dtype, seed=2),
    ]


WIDE = {**SPLIT, "channels": 16}
WAYS = [WIDE, SCHEMES[1]]


PARTS = [
    *((F16, r, w) for r in ((), (True,), (False, True), (True, True)) for w in ((80,), (80, 80))),
    *((dtype, r, (80, 80)) for dtype in (BF16, F32) for r in ((), (True, True))),
]


@pytest.mark.parametrize("config", WAYS, ids=lambda config: config["scheme"])
@pytest.mark.parametrize(("dtype", "residuals", "widths"), PARTS, ids=str)
def test_an_image_is_made_on_the_way(
    config: Any, dtype: torch.dtype, residuals: Any, widths: tuple[int, ...]
) -> None:
    """The image has the bits that its concatenation has."""
    tensors = joined_of(*widths, residuals=residuals, dtype=dtype)
    groups = 8 * len(widths)
    image, norm = check(JOINED, tensors, attributes(groups), config)
    expected = ops.concat(*tensors[:-2])
    assert torch.equal(image, expected)
    alone = run(GROUP, [expected, *tensors[-2:], None, None], attributes(groups), config)
    assert torch.equal(norm, alone)


@pytest.mark.parametrize("config", WAYS, ids=lambda config: config["scheme"])
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_sums_far_from_zero_keep_their_digits(config: Any, dtype: torch.dtype) -> None:
    """The statistics are of the sums as they are rounded, whose mean their first pixel takes."""
    tensors = joined_of(80, 80, residuals=(True, True), image=(1, 50), dtype=dtype, mean=100.0)
    image, norm = check(JOINED, tensors, attributes(16, "none"), config)
    truth = exact("group_norm", [image, *tensors[-2:]], attributes(16, "none"))
    assert error(norm, truth) <= 1.01 * error(truth.to(dtype), truth)


@pytest.mark.parametrize(
    ("widths", "groups"),
    [
        ((320,), 32),
        ((320, 320), 32),
        ((640, 320), 32),
        ((1280, 640), 32),
        ((1280, 1280), 32),
        ((16, 48), 1),
        ((16, 8), 3),
        ((40,), 4),
        ((9, 9), 2),
        ((24, 40), 8),
    ],
    ids=str,
)
def test_parts_of_many_widths(widths: tuple[int, ...], groups: int) -> None:
    """Groups that lie in both parts, which blocks of channels do not; odd widths, of one group."""
    small = sum(widths) * 15 % 4 == 0  # the second result starts at 16 bytes
    tensors = joined_of(*widths, residuals=(False, True), image=(1, 3, 5) if small else (1, 2, 4))
    found = variants(JOINED, tensors, attributes(groups))
    straddled = len(widths) > 1 and widths[0] % (sum(widths) // groups) != 0
    assert ("whole" in {config["scheme"] for config in found}) != straddled
    for config in [found[0], *(c for c in found if c["scheme"] == "split")][:2]:
        check(JOINED, tensors, attributes(groups), config)


def test_strips_of_several_tiles_of_parts() -> None:
    """Each block of both launches loops, over a last tile that is cut and strips that are short."""
    tensors = joined_of(32, 48, residuals=(True, False), image=(1, 9, 18))
    for grid in (2, 4, 6):
        check(JOINED, tensors, attributes(5), {**WIDE, "grid": grid})


@pytest.mark.parametrize("pixels", [154, 290])
def test_every_configuration_of_parts(pixels: int) -> None:
    tensors = joined_of(32, 32, residuals=(False, True), image=(1, pixels))
    found = variants(JOINED, tensors, attributes(4))
    assert {config["scheme"] for config in found} == {"split", "whole"}
    for config in {str({**c, "pdl": False}): c for c in found}.values():
        check(JOINED, tensors, attributes(4), config)


@pytest.mark.parametrize("config", WAYS, ids=lambda config: config["scheme"])
def test_parts_with_rows_apart(config: Any) -> None:
    """Each of them another slice of channels, and what lies between must not be read."""
    tensors = joined_of(80, 80, residuals=(True, True))
    for index, (wide, start) in enumerate([(208, 64), (96, 8), (176, 16), (256, 128)]):
        around = torch.full((2, 3, 11, wide), float("nan"), dtype=F16, device=DEVICE)
        part = tensors[index]
        assert part is not None
        tensors[index] = around[..., start : start + 80].copy_(part)
    check(JOINED, tensors, attributes(16), config)


def test_the_second_launch_waits_for_the_image() -> None:
    """Of which nothing may be loaded ahead, unlike that of a GroupNorm alone."""
    tensors = joined_of(32, 32, residuals=(True, False), image=(2, 9, 16))
    for name, operands_of in ((JOINED, tensors), (GROUP, operands(2, 9, 16, 64))):
        kernel = find(name)
        call, out = call_of(kernel.op, operands_of, attributes(4))
        config = {**WIDE, "pdl": True}
        scratch = torch.empty(kernel.workspace(call, config), dtype=torch.uint8, device=DEVICE)
        assert kernel.launches is not None
        rest = {"config": config, "workspace": scratch, **attributes(4)}
        first, second = kernel.launches(out, *operands_of, **rest)
        assert second.args["FRESH"] == (name == JOINED)
        assert first.args["total"] is None or second.args["x"] is first.args["total"]
        assert (first.args["total"] is None) == (name == GROUP)


def test_which_parts_are_refused() -> None:
    def refused(tensors: Sequence[torch.Tensor | None], groups: int = 8, **changes: Any) -> bool:
        kernel = find(JOINED)
        call, _ = call_of(kernel.op, tensors, attributes(groups))
        specs = {"out": call.out} | {str(i): spec for i, spec in enumerate(call.tensors)} | changes
        out = specs.pop("out")
        return not kernel.supports(replace(call, tensors=tuple(specs.values()), out=out), chip())

    tensors = joined_of(64, 64, residuals=(True, True))
    assert not refused(tensors) and not refused(joined_of(64, residuals=(True,)))
    assert refused(joined_of(64, 64, 64), 24), "three parts"
    assert refused(joined_of(72, 56)) and not refused(joined_of(72, 56), 16), "no block of channels"
    assert refused(tensors, 24)
    assert refused(joined_of(9, image=(1, 3, 3)), 3), "the second result starts at no 16 bytes"
    for index, spec in enumerate(call_of("concat_group_norm", tensors, attributes(8))[0].tensors):
        assert spec is not None
        half = replace(spec, shape=(*spec.shape[:-1], 32))
        double = replace(spec, dtype=torch.float64)
        apart = replace(spec, stride=tuple(2 * s for s in spec.stride))
        for changed in (half, double, apart):
            assert refused(tensors, **{str(index): changed}), (index, changed)
        if len(spec.shape) > 1:
            for changed in (
                replace(spec, aligned=False),
                replace(spec, dtype=F32),
                replace(spec, stride=(2112, 64, 192, 1)),
                replace(spec, stride=(3 << 31, 1 << 31, 1 << 28, 1)),
            ):
                assert refused(tensors, **{str(index): changed}), (index, changed)
    out = call_of("concat_group_norm", tensors, attributes(8))[0].out
    for changed in (
        replace(out, aligned=False),
        replace(out, dtype=F32),
        replace(out, shape=(3, *out.shape[1:])),
        replace(out, stride=(1, *out.stride[1:])),
    ):
        assert refused(tensors, out=changed), changed


def test_configurations_keep_to_the_parts() -> None:
    """Of the widths that UNets join, at all sizes; a ControlNet's residuals change none."""
    meta = torch.device("meta")
    for widths in ((1280, 1280), (1280, 640), (640, 640), (640, 320), (320, 320), (1280,)):
        for pixels in (64, 256, 1024, 4096, 16384):
            x, *rest = (torch.empty(2, pixels, width, dtype=F16, device=meta) for width in widths)
            w = torch.empty(sum(widths), dtype=F16, device=meta)
            y = rest[0] if rest else None
            plain = [x, None, y, None, w, w] if rest else [x, None, w, w]
            guided = [x, None, y, y, w, w] if rest else [x, x, w, w]
            found = variants(JOINED, plain, attributes(32))
            assert found == variants(JOINED, guided, attributes(32))
            assert 4 <= len(found) <= 8 and found[0]["pdl"]
            for config in found:
                whole = config["scheme"] == "whole"
                block = config["groups"] * sum(widths) // 32 if whole else config["channels"]
                assert len(widths) == 1 or widths[0] % block == 0


# LayerNorm.


def rows_of(
    *shape: int, dtype: torch.dtype = F16, weight: bool = True, bias: bool = True, mean: float = 0.0
) -> list[torch.Tensor | None]:
    return [
        random(*shape, dtype=dtype, mean=mean),
        random(shape[-1], dtype=dtype, seed=1, mean=1.0) if weight else None,
        random(shape[-1], dtype=dtype, seed=2) if bias else None,
    ]


EPS = {"eps": 1e-5}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_layer_norm(dtype: torch.dtype, weight: bool, bias: bool) -> None:
    check(LAYER, rows_of(3, 7, 80, dtype=dtype, weight=weight, bias=bias), EPS)


@pytest.mark.parametrize(
    "width", [1, 7, 32, 40, 64, 72, 320, 640, 768, 960, 1280, 1920, 2048, 3072, 8192]
)
def test_every_configuration_of_layer_norm(width: int) -> None:
    tensors = rows_of(5, width)
    found = variants(LAYER, tensors, EPS)
    assert 1 <= len(found) <= 8
    for config in {str({**c, "pdl": False}): c for c in found}.values():
        check(LAYER, tensors, EPS, config)


def test_one_row() -> None:
    check(LAYER, rows_of(320), EPS)
    check(LAYER, rows_of(1, 1, 320), EPS)


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize("halves", [False, True])
def test_rows_far_from_zero(dtype: torch.dtype, halves: bool) -> None:
    tensors = rows_of(6, 320, dtype=dtype, mean=100.0)
    result = check(LAYER, tensors, EPS, {"rows": 4, "warps": 1, "halves": halves, "pdl": False})
    truth = exact("layer_norm", tensors, EPS)
    assert error(result, truth) <= 1.01 * error(truth.to(dtype), truth)


def test_layer_norm_of_rows_apart() -> None:
    tensors = rows_of(3, 5, 80)
    tensors[0] = random(3, 5, 203, seed=5)[..., 8:88]
    for config in variants(LAYER, tensors, EPS):
        check(LAYER, tensors, EPS, config)


def test_what_layer_norm_refuses() -> None:
    tensors = rows_of(6, 4, 64)
    assert supported(LAYER, tensors, EPS)
    assert not supported(LAYER, rows_of(2, 8200), EPS)
    specs = [TensorSpec.of(t) for t in tensors if t is not None]
    for index, which in enumerate(("x", "weight", "bias")):
        half = replace(specs[index], shape=(*specs[index].shape[:-1], 32))
        double = replace(specs[index], dtype=torch.float64)
        apart = replace(specs[index], stride=tuple(2 * s for s in specs[index].stride))
        for changed in (half, double, apart):
            assert not supported(LAYER, tensors, EPS, **{which: changed}), (which, changed)
    x = specs[0]
    assert not supported(LAYER, tensors, EPS, x=replace(x, aligned=False))
    assert not supported(LAYER, tensors, EPS, x=replace(x, stride=(64, 384, 1)))
    assert not supported(LAYER, tensors, EPS, x=replace(x, stride=(0, 0, 1)))
    assert not supported(LAYER, tensors, EPS, out=replace(x, aligned=False))
    assert not supported(LAYER, tensors, EPS, out=replace(x, dtype=F32))
    halves = rows_of(6, 64, dtype=BF16)
    assert supported(LAYER, halves, EPS, (8, 0)) and not supported(LAYER, halves, EPS, (7, 5))


def sums_of(*shape: int, dtype: torch.dtype = F16, **rest: Any) -> list[torch.Tensor | None]:
    x, *parameters = rows_of(*shape, dtype=dtype, **rest)
    return [x, random(*shape, dtype=dtype, seed=3), *parameters]


@pytest.mark.parametrize("weight", [False, True])
@pytest.mark.parametrize(
    ("dtype", "width"),
    [
        *((F16, width) for width in (16, 80, 320, 1280)),
        (BF16, 16),
        (BF16, 80),
        (F32, 16),
        (F32, 320),
    ],
    ids=str,
)
def test_a_residual_is_added_first(dtype: torch.dtype, weight: bool, width: int) -> None:
    """Sum and norm have the bits that they have one after the other; of fp32 the norm all but."""
    tensors = sums_of(2, 7, width, dtype=dtype, weight=weight, bias=weight)
    for config in variants(ADD_LAYER, tensors, EPS):
        total, norm = check(ADD_LAYER, tensors, EPS, config)
        assert torch.equal(total, tensors[0] + tensors[1])
        alone = run(LAYER, [total, *tensors[2:]], EPS, config)
        assert torch.equal(norm, alone) or (dtype == F32 and error(norm, alone.double()) < 3e-7)


def test_residuals_with_rows_apart() -> None:
    tensors = sums_of(3, 5, 80)
    tensors[0] = random(3, 5, 208, seed=5)[..., 8:88]
    tensors[1] = random(3, 5, 164, seed=6)[..., 4:84]  # vectors of 4 elements at most
    assert not supported(ADD_LAYER, tensors, EPS), "the residual starts at no 16 bytes"
    tensors[1] = random(3, 5, 164, seed=6)[..., 8:88]
    for config in variants(ADD_LAYER, tensors, EPS):
        check(ADD_LAYER, tensors, EPS, config)


def test_what_the_sum_and_its_norm_refuse() -> None:
    tensors = sums_of(6, 4, 64)
    assert supported(ADD_LAYER, tensors, EPS)
    assert supported(ADD_LAYER, sums_of(1, 8, weight=False, bias=False), EPS)
    # The second half would start at no 16 bytes.
    assert not supported(ADD_LAYER, sums_of(1, 9, weight=False, bias=False), EPS)
    x, residual = (TensorSpec.of(t) for t in tensors[:2] if t is not None)
    for changed in (
        replace(residual, shape=(6, 4, 32)),
        replace(residual, shape=(6, 1, 64)),
        replace(residual, dtype=F32),
        replace(residual, aligned=False),
        replace(residual, stride=(64, 384, 1)),
    ):
        assert not supported(ADD_LAYER, tensors, EPS, weight=changed), changed
    assert not supported(ADD_LAYER, tensors, EPS, x=replace(x, aligned=False))
    call, _ = call_of("add_layer_norm", tensors, EPS)
    for out in (replace(call.out, aligned=False), replace(call.out, dtype=F32)):
        assert not supported(ADD_LAYER, tensors, EPS, out=out)


def test_rows_and_warps_suit_the_width() -> None:
    """No thread of any configuration holds more than fits its registers."""
    meta = torch.device("meta")
    for rows, width in ((8192, 320), (2048, 1280), (128, 1280), (4096, 3072), (65536, 640)):
        x = torch.empty(rows, width, dtype=F16, device=meta)
        w = torch.empty(width, dtype=F16, device=meta)
        configs = variants(LAYER, [x, w, w], EPS)
        assert 4 <= len(configs) <= 8 and configs[0]["pdl"]
        assert len({str(config) for config in configs}) == len(configs)
        for config in configs:
            assert config["rows"] * width / (32 * config["warps"]) <= 96
        assert not any(c["pdl"] for c in variants(LAYER, [x, w, w], EPS, capability=(8, 6)))
