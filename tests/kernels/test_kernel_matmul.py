"""Linear layers: every form of the loop, every epilogue, every way to split; what is refused.

Shapes are tiny and odd, and most dimensions end within a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import CHIPS, DEVICE, Call, Config, TensorSpec, call_of, check, chip, find, run

pytest.importorskip("triton")
from accel.kernels import matmul

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
DTYPES = pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
FORMS = ("triton.matmul_tma", "triton.matmul")


def operands(
    rows: int | tuple[int, ...],
    columns: int,
    depth: int,
    riders: str = "bias residual",
    activation: str = "none",
    dtype: torch.dtype = F16,
) -> tuple[list[torch.Tensor | None], dict[str, Any]]:
    """Random tensors of a linear layer, and its attributes. riders: which optional ones."""
    generator = torch.Generator().manual_seed(rows if isinstance(rows, int) else sum(rows))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    leading = (rows,) if isinstance(rows, int) else rows
    wide = columns * (2 if activation == "geglu" else 1)
    weight = (torch.randn(wide, depth, generator=generator) * depth**-0.5).to(DEVICE, dtype)
    bias = normal(wide) if "bias" in riders else None
    residual = normal(*leading, columns) if "residual" in riders else None
    return [normal(*leading, depth), weight, bias, residual], {"activation": activation}


def config_of(tile: tuple[int, int, int, int], **rest: Any) -> Config:
    """tile: rows, columns, tail, step."""
    names = ("block_m", "block_n", "tail_n", "block_k")
    plain = {"warps": 4, "stages": 3, "split": 1, "programs": 0, "pdl": False}
    return {**dict(zip(names, tile, strict=True)), **plain, **rest}


def on_gpu(config: Config) -> Config:
    """Large tiles want more warps than small ones."""
    large = int(config["block_m"]) * int(config["block_n"]) >= 128 * 128
    return {**config, "warps": 8 if large else 4}


RIDERS = ["", "bias", "residual", "bias residual"]


@DTYPES
@pytest.mark.parametrize("riders", RIDERS)
@pytest.mark.parametrize("activation", ["none", "geglu"])
@pytest.mark.parametrize("name", FORMS)
def test_every_epilogue(name: str, activation: str, riders: str, dtype: torch.dtype) -> None:
    tensors, attrs = operands(70, 40, 72, riders, activation, dtype)
    check(name, tensors, attrs)
    # Many accumulators, whose epilogue goes by quarters.
    tile = (128, 64, 0, 64) if activation == "geglu" else (128, 128, 0, 64)
    check(name, tensors, attrs, config_of(tile))


@pytest.mark.parametrize("split", [2, 3])
@pytest.mark.parametrize("activation", ["none", "geglu"])
@pytest.mark.parametrize("name", FORMS)
def test_sums_are_split(name: str, activation: str, split: int) -> None:
    """Into equal parts, and into parts the last of which is short."""
    for riders in ("", "bias residual"):
        tensors, attrs = operands(33, 40, 328, riders, activation)
        tile = (64, 32, 0, 64) if activation == "geglu" else (64, 32, 16, 64)
        check(name, tensors, attrs, config_of(tile, split=split))


@pytest.mark.parametrize("riders", RIDERS)
@pytest.mark.parametrize("tile", [(64, 64, 16, 64), (128, 128, 64, 64), (64, 32, 32, 32)])
@pytest.mark.parametrize("name", FORMS)
def test_tiles_with_a_tail(name: str, tile: Any, riders: str) -> None:
    """Ends of the matrix before the tail, in it, and behind it."""
    width = tile[1] + tile[2]
    for columns in (width - 8, tile[1] - 8, width + 8, 2 * width):
        tensors, attrs = operands(67, columns, 40, riders)
        check(name, tensors, attrs, on_gpu(config_of(tile)))


@DTYPES
@pytest.mark.parametrize("programs", [1, 3, 64])
@pytest.mark.parametrize("activation", ["none", "geglu"])
def test_a_block_makes_one_tile_after_another(
    activation: str, programs: int, dtype: torch.dtype
) -> None:
    tensors, attrs = operands(200, 72, 136, activation=activation, dtype=dtype)
    for tile in ((64, 32, 0, 64), (128, 64, 0, 64)):
        check("triton.matmul_tma", tensors, attrs, config_of(tile, programs=programs))
    if activation == "none":
        tile = (64, 32, 16, 64)
        check("triton.matmul_tma", tensors, attrs, config_of(tile, programs=programs))


def test_tiles_in_groups_come_each_once() -> None:
    """More rows of tiles than a group has, and a last group of fewer."""
    tensors, attrs = operands(64 * 10 - 5, 40, 16)
    for name in FORMS:
        check(name, tensors, attrs, config_of((64, 32, 0, 16 if name == FORMS[1] else 64)))


@pytest.mark.parametrize("depth", [16, 24, 64, 72, 128])
@pytest.mark.parametrize("name", FORMS)
def test_depths_end_anywhere(name: str, depth: int) -> None:
    for activation in ("none", "geglu"):
        tensors, attrs = operands(33, 16, depth, activation=activation)
        check(name, tensors, attrs, config_of((64, 16, 0, 64)))


@pytest.mark.parametrize("name", [*FORMS, "triton.gemv", "cublas.linear", "cublas.linear_onto"])
def test_rows_may_lie_apart(name: str) -> None:
    """As a merged projection's parts do, or a concatenation's."""
    rows, columns = ((2, 3), 8) if name == "triton.gemv" else ((2, 17), 24)
    tensors, attrs = operands(rows, columns, 48)
    x, weight, bias, residual = tensors
    assert x is not None and residual is not None
    apart = F.pad(x, (8, 16))[..., 8:-16]
    beside = F.pad(residual, (16, 8))[..., 16:-8]
    assert not apart.is_contiguous() and not beside.is_contiguous()
    result = check(name, [apart, weight, bias, beside], attrs)
    assert torch.equal(result, run(name, tensors, attrs))


def configs(name: str, call: Call, chip_: tuple[int, int] = (9, 0)) -> list[Config]:
    found = find(name).configs
    assert found is not None
    return list(found(call, chip(chip_)))


@DTYPES
@pytest.mark.parametrize("riders", RIDERS)
@pytest.mark.parametrize("activation", ["none", "geglu"])
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_few_rows(rows: int, activation: str, riders: str, dtype: torch.dtype) -> None:
    """Depths of one piece begun, of one, and of one and another begun."""
    for columns, depth, block_n in ((2, 24, 1), (5, 256, 4), (3, 328, 2)):
        tensors, attrs = operands(rows, columns, depth, riders, activation, dtype)
        check("triton.gemv", tensors, attrs, {"block_n": block_n, "pdl": False})


def test_few_rows_of_fp32() -> None:
    for rows, columns in ((2, 5), (16, 2)):
        tensors, attrs = operands(rows, columns, 44, dtype=F32)
        check("triton.gemv", tensors, attrs)


@DTYPES
@pytest.mark.parametrize("riders", RIDERS)
@pytest.mark.parametrize("activation", ["none", "geglu"])
def test_the_library(activation: str, riders: str, dtype: torch.dtype) -> None:
    tensors, attrs = operands((2, 9), 24, 40, riders, activation, dtype)
    check("cublas.linear", tensors, attrs)
    call, _ = call_of("linear", tensors, attrs)
    onto, combined = find("cublas.linear_onto"), find("cublas.geglu")
    assert onto.supports(call, chip()) == ("residual" in riders and activation == "none")
    assert combined.supports(call, chip()) == (activation == "geglu")
    if onto.supports(call, chip()):
        check("cublas.linear_onto", tensors, attrs)
    if combined.supports(call, chip()):
        check("cublas.geglu", tensors, attrs)


def test_gelu_is_the_exact_one() -> None:
    """Of every fp16 number a gate may be: the error is that of fp32."""
    gate = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(F16)
    gate = gate[gate.abs() < 1e4].to(DEVICE)
    gate = gate[: gate.numel() // 128 * 128].view(-1, 128)
    both = torch.cat([torch.ones_like(gate), gate], dim=-1).float()
    out = torch.full(gate.shape, float("nan"), device=DEVICE)
    matmul.combination(out, both, None, None, 1, True, False).run()
    truth = F.gelu(gate.double())
    away = (out - truth).abs()
    assert (away <= 6e-7 + 2e-7 * truth.abs()).all()
    # Where GELU has all but gone, too, as far as fp16 has digits.
    assert away[gate == 0].max() < 2e-8
    tail = (gate < -0.5) & (truth < -6e-5)
    assert tail.sum() > 1000 and (away <= 3e-4 * truth.abs())[tail].all()


@pytest.mark.parametrize("name", [*FORMS, "triton.gemv"])
def test_a_gate_out_of_range(name: str) -> None:
    """Infinities leave GELU as they came, or not at all; what is no number stays none."""
    tensors, attrs = operands(2 if name == "triton.gemv" else 16, 32, 64, "bias", "geglu")
    x, weight, bias, _ = tensors
    assert x is not None and weight is not None and bias is not None
    weight.zero_()
    bias[:32] = 1
    bias[32:35] = torch.tensor([float("inf"), float("-inf"), float("nan")])
    config = {"block_n": 1, "pdl": False} if name == "triton.gemv" else None
    for programs in (0, 1) if name == "triton.matmul_tma" else (0,):
        tile = config_of((64, 16, 0, 64), programs=programs)
        result = run(name, tensors, attrs, config or tile)
        assert (result[:, 0] == float("inf")).all() and (result[:, 1] == 0).all()
        assert result[:, 2].isnan().all() and torch.isfinite(result[:, 3:]).all()


def test_results_do_not_depend_on_what_ran_before() -> None:
    """Split sums add up in a fixed order: equal bits, whatever the scratch memory held."""
    tensors, attrs = operands(20, 40, 264)
    config = config_of((64, 32, 0, 64), split=4)
    for name in FORMS:
        results = [run(name, tensors, attrs, config) for _ in range(2)]
        assert torch.equal(*results)


def spec(*shape: int, dtype: torch.dtype = F16, **rest: Any) -> TensorSpec:
    return TensorSpec.of(torch.empty(shape, dtype=dtype, device="meta"), **rest)


def call(x: Any, weight: Any, bias: Any = None, residual: Any = None, **attrs: Any) -> Call:
    columns = weight.shape[0] // (2 if attrs.get("activation") == "geglu" else 1)
    out = spec(*x.shape[:-1], columns, dtype=x.dtype)
    return Call("linear", out, (x, weight, bias, residual), {"activation": "none"} | attrs)


def strided(shape: tuple[int, ...], stride: tuple[int, ...], aligned: bool = True) -> TensorSpec:
    return TensorSpec(shape, stride, F16, aligned)


REFUSED = {
    "fp32": call(spec(64, 64, dtype=F32), spec(64, 64, dtype=F32)),
    "mixed dtypes": call(spec(64, 64), spec(64, 64, dtype=BF16)),
    "a bias of fp32": call(spec(64, 64), spec(64, 64), spec(64, dtype=F32)),
    "depth of no whole 16 bytes": call(spec(64, 60), spec(64, 60)),
    "columns of no whole 16 bytes": call(spec(64, 64), spec(20, 64)),
    "half of the columns of no whole 16 bytes": call(
        spec(64, 64), spec(40, 64), activation="geglu"
    ),
    "an unaligned start": call(strided((64, 64), (64, 1), aligned=False), spec(64, 64)),
    "rows at odd distances": call(strided((64, 64), (68, 1)), spec(64, 64)),
    "rows at two distances": call(strided((2, 32, 64), (4096, 64, 1)), spec(64, 64)),
    "columns apart": call(strided((64, 64), (128, 2)), spec(64, 64)),
    "a transposed weight": call(spec(64, 64), strided((64, 64), (1, 64))),
    "a residual at two distances": call(
        spec(2, 32, 64), spec(64, 64), None, strided((2, 32, 64), (4096, 64, 1))
    ),
    "a bias with gaps": call(spec(64, 64), spec(64, 64), strided((64,), (2,))),
    "another activation": call(spec(64, 64), spec(64, 64), activation="silu"),
    "too few rows": call(spec(8, 64), spec(64, 64)),
    "too little depth": call(spec(64, 8), spec(64, 8)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_kernels_refuse(name: str) -> None:
    for form in FORMS:
        assert find(form).supports(call(spec(64, 64), spec(64, 64)), chip())
        assert not find(form).supports(REFUSED[name], chip())


def test_generations() -> None:
    """Tensor cores that accumulate in fp32 from Ampere on; the copy engine from Hopper on."""
    plain = call(spec(64, 64), spec(64, 64))
    able = {form: [c for c in CHIPS if find(form).supports(plain, chip(c))] for form in FORMS}
    assert able["triton.matmul"] == [c for c in CHIPS if c >= (8, 0)]
    assert able["triton.matmul_tma"] == [(9, 0), (10, 0)]
    few = call(spec(2, 64), spec(64, 64))
    assert all(find("triton.gemv").supports(few, chip(c)) for c in CHIPS)
    few = call(spec(2, 64, dtype=BF16), spec(64, 64, dtype=BF16))
    assert not find("triton.gemv").supports(few, chip((7, 5)))


def test_what_gemv_refuses() -> None:
    supports = find("triton.gemv").supports
    assert supports(call(spec(16, 64), spec(64, 64)), chip())
    assert not supports(call(spec(17, 64), spec(64, 64)), chip())
    assert not supports(call(spec(2, 20), spec(64, 20)), chip())  # 40 bytes
    assert not supports(call(spec(2, 16384), spec(64, 16384)), chip())  # more than registers hold
    assert not supports(call(strided((2, 2, 64), (256, 64, 1)), spec(64, 64)), chip())
    assert not supports(call(spec(2, 64), spec(64, 64), activation="silu"), chip())
    assert not supports(call(spec(2, 64), spec(64, 64, dtype=BF16)), chip())


def layers() -> Iterator[tuple[int, int, int, str]]:
    """Rows, columns, depth and activation of what SD1.5 and SDXL consist of."""
    for (rows, width), (columns, depth, activation) in product(
        ((8192, 320), (2048, 640), (512, 1280), (128, 1280), (8192, 640), (2048, 1280)),
        ((1, 1, "none"), (3, 1, "none"), (4, 1, "geglu"), (1, 4, "none")),
    ):
        yield rows, columns * width, depth * width, activation


def layer(rows: int, columns: int, depth: int, activation: str = "none") -> Call:
    wide = columns * (2 if activation == "geglu" else 1)
    residual = None if activation == "geglu" else spec(rows, columns)
    return call(spec(rows, depth), spec(wide, depth), spec(wide), residual, activation=activation)


@pytest.mark.parametrize("activation", ["none", "geglu"])
@pytest.mark.parametrize("name", FORMS)
def test_every_configuration_is_right(name: str, activation: str) -> None:
    """Whatever any chip would choose for any layer, each tile once."""
    distinct = {}
    for chip_, shape in product([c for c in CHIPS if c >= (8, 0)], layers()):
        if shape[3] == activation and find(name).supports(layer(*shape), chip(chip_)):
            for config in configs(name, layer(*shape), chip_):
                code = [config[key] for key in ("block_m", "block_n", "tail_n", "block_k")]
                distinct[(*code, int(config["split"]) > 1, int(config["programs"]) > 0)] = config
    assert len(distinct) >= 5
    tensors, attrs = operands(65, 40, 136, activation=activation)
    for config in distinct.values():
        check(name, tensors, attrs, config)


@pytest.mark.parametrize("chip_", [c for c in CHIPS if c >= (8, 0)], ids=str)
def test_configurations_fit_and_differ(chip_: tuple[int, int]) -> None:
    for rows, columns, depth, activation in layers():
        wanted = layer(rows, columns, depth, activation)
        for name in FORMS:
            if not find(name).supports(wanted, chip(chip_)):
                continue
            found = configs(name, wanted, chip_)
            beside_tma = name == "triton.matmul" and (9, 0) <= chip_ < (12, 0)
            assert len(found) == 1 if beside_tma else 2 <= len(found) <= 8
            assert len({str(sorted(config.items())) for config in found}) == len(found)
            for config in found:
                halves = 2 if activation == "geglu" else 1
                width = int(config["block_n"]) * halves + int(config["tail_n"])
                stage = 2 * (int(config["block_m"]) + width) * int(config["block_k"])
                buffers = int(config["stages"]) - (name == "triton.matmul")
                assert buffers * stage <= (chip(chip_).shared_bytes or 0)


def test_one_wave_comes_first() -> None:
    """The layers of SDXL's 1280 channels: 128 tiles of 128 x 160 for 132 SMs."""
    for depth in (1280, 5120):
        best = configs("triton.matmul_tma", layer(2048, 1280, depth))[0]
        assert [best[name] for name in ("block_m", "block_n", "tail_n")] == [128, 128, 32]


def test_layers_of_few_tiles_are_split() -> None:
    for name, chip_ in (("triton.matmul_tma", (9, 0)), ("triton.matmul", (8, 0))):
        best = configs(name, layer(128, 1280, 5120), chip_)[0]
        assert int(best["split"]) > 1
        workspace = find(name).workspace(layer(128, 1280, 5120), best)
        assert workspace == 4 * int(best["split"]) * 128 * 1280


def test_where_accumulators_lie_in_tensor_memory_none_begin_as_the_bias() -> None:
    x, weight = spec(8192, 640), spec(5120, 640, constant=True)
    for bias in (None, spec(5120, constant=True)):
        one = call(x, weight, bias)
        persistent = [bool(c["programs"]) for c in configs("triton.matmul_tma", one, (10, 0))]
        assert any(persistent) == (bias is None)
        assert any(c["programs"] for c in configs("triton.matmul_tma", one))


def test_a_bias_that_another_launch_made_is_not_read_ahead_of_it() -> None:
    """A persistent block reads its first bias before it waits for the launch ahead."""
    x, weight = spec(2048, 1280), spec(3840, 1280, constant=True)
    made, kept = spec(3840), spec(3840, constant=True)
    kernel = find("triton.matmul_tma")
    for bias, ahead in ((made, False), (kept, True), (None, True)):
        one = call(x, weight, bias)
        found = configs("triton.matmul_tma", one)
        assert any(config["programs"] for config in found)
        assert any(config["pdl"] for config in found) == ahead
        assert kernel.fits(one, {**found[0], "pdl": True}, chip()) == ahead
        assert kernel.fits(one, {**found[0], "pdl": False}, chip())
