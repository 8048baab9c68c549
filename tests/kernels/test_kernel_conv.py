"""Convolutions: every way of reading pixels, every rider, every split of the sum; what is refused.

Shapes are tiny and odd; blocks are larger than they need be, since the interpreter runs one block
after another.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from math import prod
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import CHIPS, DEVICE, Call, Config, TensorSpec, call_of, check, chip, find, run

from accel import ops
from accel.kernels import conv, cudnn, library

POINTERS: Config = {
    **{"block_m": 64, "block_n": 32, "block_k": 32, "parts": 1},
    **{"warps": 4, "stages": 2, "early": False, "weight_tma": False},
}
BOXES: Config = {
    **{"box": "2x4x4", "block_n": 64, "block_k": 32, "parts": 1},
    **{"warps": 4, "stages": 2, "early": False, "tail_n": 0},
}
ALL = "bias embedding residual"


def attributes(
    stride: int = 1, padding: int = 1, upsample: tuple[int, int] | None = None, **rest: Any
) -> dict[str, Any]:
    attrs: dict[str, Any] = {"stride": (stride, stride), "padding": (padding, padding)}
    attrs |= {"dilation": (1, 1), "groups": 1}
    return attrs | ({} if upsample is None else {"upsample": upsample}) | rest


def operands(
    x: tuple[int, ...],
    channels: int,
    riders: str = "bias",
    kernel: int = 3,
    dtype: torch.dtype = torch.float16,
    **attrs: Any,
) -> tuple[list[torch.Tensor | None], dict[str, Any]]:
    """Random tensors of a convolution of x [B, H, W, C], and its attributes."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    found = attributes(**attrs)
    weight = normal(channels, kernel, kernel, x[3]) * (kernel * kernel * x[3]) ** -0.5
    shape = ops.get("conv2d").shape([x, tuple(weight.shape)], found)
    return [
        normal(*x),
        weight.contiguous(),
        normal(channels) if "bias" in riders else None,
        normal(x[0], channels) if "embedding" in riders else None,
        normal(*shape) if "residual" in riders else None,
    ], found


def sliced(tensor: torch.Tensor, margin: int = 8) -> torch.Tensor:
    """The same values as a slice of something wider in the last dimension."""
    wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + margin), 7.0).to(tensor)
    wide[..., margin:] = tensor
    return wide[..., margin:]


def described(x: tuple[int, ...], channels: int, riders: str = "bias", **attrs: Any) -> Call:
    """The call at sizes for which nobody shall make tensors."""

    def spec(*shape: int) -> TensorSpec:
        return TensorSpec.of(torch.empty(shape, dtype=torch.float16, device="meta"))

    found = attributes(**attrs)
    weight = (channels, 3, 3, x[3])
    out = ops.get("conv2d").shape([x, weight], found)
    optional = (
        spec(channels) if "bias" in riders else None,
        spec(x[0], channels) if "embedding" in riders else None,
        spec(*out) if "residual" in riders else None,
    )
    return Call("conv2d", spec(*out), (spec(*x), spec(*weight), *optional), found)


# Reading pixels through pointers.


@pytest.mark.parametrize("riders", ["", "bias", "embedding", "residual", ALL])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_pointers_with_riders(riders: str, dtype: torch.dtype) -> None:
    tensors, attrs = operands((3, 5, 7, 32), 40, riders, dtype=dtype)
    check("triton.conv2d", tensors, attrs, POINTERS)


@pytest.mark.parametrize(
    "case",
    [
        ((1, 17, 9, 16), 32, {"stride": 2}, {"block_k": 16}),
        ((2, 6, 4, 40), 24, {"stride": 2}, {}),  # a step does not end where a tap does
        ((2, 3, 4, 32), 32, {"upsample": (6, 8)}, {}),
        ((2, 3, 4, 32), 32, {"upsample": (5, 8)}, {}),
        ((1, 3, 4, 32), 32, {"upsample": (5, 7), "stride": 2}, {}),
        ((1, 1, 1, 32), 32, {"upsample": (1, 2)}, {}),
        ((2, 4, 5, 48), 16, {"kernel": 1, "padding": 0}, {"block_k": 16, "block_n": 16}),
        ((1, 6, 5, 16), 16, {"kernel": 5, "padding": 2}, {"block_k": 16}),
        ((1, 5, 6, 32), 72, {"padding": 0}, {"block_n": 64}),
    ],
    ids=str,
)
def test_pointers_read_any_window(case: Any) -> None:
    x, channels, attrs, config = case
    tensors, found = operands(x, channels, ALL, **attrs)
    check("triton.conv2d", tensors, found, {**POINTERS, **config})


@pytest.mark.parametrize("parts", [2, 5])
@pytest.mark.parametrize("tma", [False, True])
def test_pointers_in_parts(parts: int, tma: bool) -> None:
    tensors, attrs = operands((2, 4, 5, 32), 40, ALL)
    check("triton.conv2d", tensors, attrs, {**POINTERS, "parts": parts, "weight_tma": tma})


def test_pointers_and_strides() -> None:
    """Operands may be slices of wider ones: a skip's channels, a step's share of all embeddings."""
    tensors, attrs = operands((2, 5, 4, 32), 40, ALL)
    x, weight, bias, embedding, residual = tensors
    assert x is not None and embedding is not None and residual is not None
    strided = [sliced(x), weight, bias, sliced(embedding), sliced(residual)]
    results = [run("triton.conv2d", made, attrs, POINTERS) for made in (tensors, strided)]
    assert torch.equal(*results)


# Reading boxes of pixels.


@pytest.mark.parametrize("riders", ["", ALL])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_boxes_with_riders(riders: str, dtype: torch.dtype) -> None:
    tensors, attrs = operands((3, 5, 7, 32), 40, riders, dtype=dtype)
    check("triton.conv2d_tma", tensors, attrs, BOXES)


@pytest.mark.parametrize(
    "case",
    [
        ((1, 17, 9, 16), 72, {}, {"block_k": 16}),
        ((2, 6, 4, 32), 40, {"stride": 2}, {}),
        ((1, 8, 6, 32), 32, {"stride": 2, "kernel": 5, "padding": 2}, {}),
        ((3, 3, 4, 32), 32, {"upsample": (6, 8)}, {}),
        ((2, 4, 5, 48), 32, {"kernel": 1, "padding": 0}, {"block_k": 16}),
        ((1, 5, 6, 64), 32, {"padding": 0}, {"block_k": 64}),
    ],
    ids=str,
)
@pytest.mark.parametrize("parts", [1, 3])
def test_boxes_of_any_window(case: Any, parts: int) -> None:
    x, channels, attrs, config = case
    tensors, found = operands(x, channels, ALL, **attrs)
    check("triton.conv2d_tma", tensors, found, {**BOXES, **config, "parts": parts})


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("channels", [40, 96, 136])
def test_boxes_with_a_tail_of_channels(channels: int, parts: int) -> None:
    """Tiles of 32 + 16 channels: the last has no tail, a full one, or a part of one."""
    tensors, attrs = operands((2, 4, 6, 32), channels, ALL)
    config = {**BOXES, "block_n": 32, "tail_n": 16, "parts": parts}
    check("triton.conv2d_tma", tensors, attrs, config)


@pytest.mark.parametrize("box", ["1x1x16", "4x2x2", "1x8x2", "2x8x8"])
def test_boxes_of_another_size_of_image(box: str) -> None:
    """A configuration may come from another size, so that its box is anything but the best."""
    for attrs in ({}, {"stride": 2}, {"upsample": (8, 12)}):
        tensors, found = operands((3, 4, 6, 32), 40, ALL, **attrs)
        check("triton.conv2d_tma", tensors, found, {**BOXES, "box": box})


def test_boxes_and_strides() -> None:
    tensors, attrs = operands((2, 4, 4, 32), 32, ALL)
    x, weight, bias, embedding, residual = tensors
    assert x is not None and embedding is not None and residual is not None
    strided = [sliced(x), weight, bias, sliced(embedding), sliced(residual)]
    results = [run("triton.conv2d_tma", made, attrs, BOXES) for made in (tensors, strided)]
    assert torch.equal(*results)


def test_a_box_wastes_least() -> None:
    def boxes(*x: int, pixels: int, **attrs: Any) -> tuple[int, tuple[int, int, int]]:
        call = described((*x, 64), 64, **attrs)
        shape = conv._shape(call)
        assert shape is not None
        return conv._box(shape, pixels)

    assert boxes(2, 8, 8, pixels=128) == (1, (2, 8, 8))
    assert boxes(2, 64, 64, pixels=128) == (64, (1, 8, 16))
    assert boxes(2, 96, 128, pixels=256) == (96, (1, 16, 16))
    assert boxes(1, 4, 100, pixels=64)[0] == 7
    assert boxes(2, 8, 8, pixels=128, upsample=(16, 16)) == (4, (2, 8, 8))
    assert boxes(1, 3, 3, pixels=64) == (1, (1, 8, 8))


# Few channels.


@pytest.mark.parametrize(
    "case",
    [
        ((2, 5, 7, 4), 40, {}),
        ((1, 6, 7, 3), 20, {"stride": 2, "dtype": torch.bfloat16}),
        ((2, 4, 3, 9), 72, {}),
        ((1, 4, 5, 16), 16, {"padding": 0}),
    ],
    ids=str,
)
@pytest.mark.parametrize("riders", ["", ALL])
def test_few_channels_in(case: Any, riders: str) -> None:
    x, channels, attrs = case
    tensors, found = operands(x, channels, riders, **attrs)
    call, _ = call_of("conv2d", tensors, found)
    for config in find("triton.conv2d_few_in").configs(call, chip()):  # type: ignore[misc]
        check("triton.conv2d_few_in", tensors, found, config)


@pytest.mark.parametrize(
    "case",
    [
        ((2, 5, 7, 32), 4, {}),
        ((1, 6, 7, 40), 3, {"stride": 2, "dtype": torch.bfloat16}),
        ((2, 3, 4, 16), 8, {"padding": 0}),
        ((1, 3, 4, 64), 1, {"kernel": 1, "padding": 0}),
    ],
    ids=str,
)
@pytest.mark.parametrize("riders", ["", ALL])
def test_few_channels_out(case: Any, riders: str) -> None:
    x, channels, attrs = case
    tensors, found = operands(x, channels, riders, **attrs)
    call, _ = call_of("conv2d", tensors, found)
    for config in find("triton.conv2d_few_out").configs(call, chip()):  # type: ignore[misc]
        check("triton.conv2d_few_out", tensors, found, config)


# What is refused, and what is offered.


def served(
    tensors: list[torch.Tensor | None], attrs: dict[str, Any], chip_: Any = None
) -> set[str]:
    """The kernels that support a call."""
    call, _ = call_of("conv2d", tensors, attrs)
    names = ("conv2d", "conv2d_tma", "conv2d_few_in", "conv2d_few_out")
    hardware = chip_ or chip()
    return {name for name in names if find(f"triton.{name}").supports(call, hardware)}


def test_who_serves_what() -> None:
    both = {"conv2d", "conv2d_tma"}
    assert served(*operands((2, 4, 6, 64), 64, ALL)) == both
    assert served(*operands((2, 4, 6, 64), 64, stride=2)) == both
    assert served(*operands((2, 5, 6, 64), 64, stride=2)) == {"conv2d"}
    assert served(*operands((2, 4, 6, 64), 64, upsample=(8, 12))) == both
    assert served(*operands((2, 4, 6, 64), 64, upsample=(8, 11))) == {"conv2d"}
    for padding in (0, 2):  # the result is not twice as large, which boxes would write
        assert served(*operands((2, 4, 6, 64), 64, upsample=(8, 12), padding=padding)) == {"conv2d"}
    assert served(*operands((2, 4, 6, 40), 64)) == {"conv2d"}
    assert served(*operands((2, 4, 6, 4), 64)) == {"conv2d_few_in"}
    assert served(*operands((2, 4, 6, 64), 4)) == {"conv2d", "conv2d_few_out"}
    assert served(*operands((2, 4, 6, 16), 8)) == {"conv2d", "conv2d_few_in", "conv2d_few_out"}
    assert served(*operands((2, 4, 6, 64), 64), chip((8, 9))) == {"conv2d"}
    assert served(*operands((2, 4, 6, 64), 64), chip((7, 5))) == set()
    assert served(*operands((2, 4, 6, 4), 64), chip((7, 5))) == set()
    assert served(*operands((2, 4, 6, 64), 4), chip((7, 5))) == set()


def test_what_nobody_serves() -> None:
    tensors, attrs = operands((2, 4, 6, 64), 64, ALL)
    x, weight, bias, embedding, residual = tensors
    assert x is not None and weight is not None and bias is not None
    assert embedding is not None and residual is not None
    for other in (
        {"upsample": (12, 18)},
        {"upsample": (8, 6)},
        {"dilation": (2, 2)},
        {"stride": (1, 2)},
        {"stride": (3, 3)},
    ):
        bare = [x, weight, bias, None, None]
        assert served(bare, attrs | other) == set(), other
    for strange in (
        [x.float(), weight.float(), bias.float(), None, None],
        [x, weight, bias.float(), None, None],
        [x, weight.permute(0, 2, 1, 3), bias, None, None],
        [x.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3), weight, bias, None, None],
        [x, weight, torch.stack([bias, bias], 1)[:, 0], None, None],
        [x, weight, bias, embedding.t().contiguous().t(), None],
        [x, weight, bias, None, residual.movedim(-1, 1).contiguous().movedim(1, -1)],
    ):
        assert served(strange, attrs) == set()
    assert (
        served([x, torch.empty_like(weight[..., :32]), None, None, None], attrs | {"groups": 2})
        == set()
    )
    assert served(*operands((2, 4, 6, 20), 64)) == set()
    assert served([sliced(x, 4), weight, None, None, None], attrs) == {"conv2d"}  # no place for TMA
    huge = described((64, 1024, 512, 64), 64)
    assert not any(
        find(f"triton.{name}").supports(huge, chip()) for name in ("conv2d", "conv2d_tma")
    )


SIZES = [
    ((2, 64, 64, 320), 320, {}),
    ((2, 8, 8, 1280), 1280, {}),
    ((2, 16, 16, 2560), 1280, {}),
    ((2, 128, 128, 640), 320, {}),
    ((2, 64, 64, 320), 320, {"stride": 2}),
    ((2, 32, 32, 640), 640, {"upsample": (64, 64)}),
    ((1, 13, 19, 1280), 1280, {"upsample": (25, 38)}),
    ((2, 512, 512, 16), 16, {}),
    ((1, 7, 5, 32), 32, {}),
]


def pixels_of(config: Config) -> int:
    """Of a tile."""
    if "box" not in config:
        return int(config["block_m"])
    return prod(int(side) for side in str(config["box"]).split("x"))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("capability", [c for c in CHIPS if c >= (8, 0)], ids=str)
def test_configurations_fit(size: Any, capability: tuple[int, int]) -> None:
    x, channels, attrs = size
    call, hardware = described(x, channels, **attrs), chip(capability)
    assert find("triton.conv2d").supports(call, hardware)
    for kernel in (find("triton.conv2d"), find("triton.conv2d_tma")):
        if not kernel.supports(call, hardware):
            continue
        assert kernel.configs is not None and hardware.shared_bytes is not None
        found = kernel.configs(call, hardware)
        assert 0 < len(found) <= conv.MOST_CONFIGS
        assert len({tuple(sorted(config.items())) for config in found}) == len(found)
        for config in found:
            block_n, block_k = int(config["block_n"]), int(config["block_k"])
            block_m = pixels_of(config)
            stages, parts = int(config["stages"]), int(config["parts"])
            wide = block_n + int(config.get("tail_n", 0))
            assert (block_m + wide) * block_k * 2 * stages < hardware.shared_bytes
            assert x[3] % block_k == 0
            size_of_parts = parts * call.out.rows * channels * 4 if parts > 1 else 0
            assert kernel.workspace(call, config) == size_of_parts


def test_small_images_fill_the_chip() -> None:
    """8x8 pixels are one tile of pixels: sums are split until there is work for most SMs."""
    call = described((2, 8, 8, 1280), 1280)
    for config in find("triton.conv2d_tma").configs(call, chip())[:4]:  # type: ignore[misc]
        across = -(-1280 // (int(config["block_n"]) + int(config["tail_n"])))
        tiles = -(-128 // pixels_of(config)) * across
        assert 90 <= tiles * int(config["parts"]) <= 264
    large = described((2, 128, 128, 640), 640)
    assert find("triton.conv2d_tma").configs(large, chip())[0]["parts"] == 1  # type: ignore[misc]


def test_twice_the_size_reads_the_half_of_the_index() -> None:
    """What the kernels take for granted of PyTorch, which scales indices in float32."""
    for size in [*range(1, 300), 1023, 2048]:
        for wide in (2 * size - 1, 2 * size):
            row = torch.arange(size, dtype=torch.float64).view(1, 1, size)
            found = F.interpolate(row, size=wide, mode="nearest").flatten()
            assert torch.equal(found, (torch.arange(wide) // 2).double())


# Libraries.


@pytest.mark.parametrize("riders", ["bias", "embedding", "residual", ALL])
@pytest.mark.parametrize("channels", [4, 40, 192])
def test_addition_is_one_pass(riders: str, channels: int) -> None:
    tensors, _ = operands((3, 3, 5, 8), channels, riders)
    bias, embedding, residual = tensors[2:]
    out = torch.randn(3, 3, 5, channels).to(DEVICE, torch.float16)
    truth = out.double()
    for rider in (bias, residual, None if embedding is None else embedding[:, None, None]):
        truth = truth if rider is None else truth + rider.double()
    launch = conv.addition(out, bias, embedding, residual)
    assert launch is not None
    launch.run()
    torch.testing.assert_close(out, truth.half(), rtol=0, atol=0)


def test_addition_refuses_what_it_cannot_read() -> None:
    out = torch.zeros(2, 3, 4, 8)
    across = torch.zeros(2, 8, 3, 4).movedim(1, -1)
    assert conv.addition(out, None, None, across) is None
    assert conv.addition(out, None, torch.zeros(8, 2).t(), None) is None
    assert conv.addition(torch.zeros(0, 3, 4, 8), torch.zeros(8), None, None) is None


@pytest.mark.parametrize("riders", ["", "bias", "embedding", "residual", ALL])
@pytest.mark.parametrize("upsample", [None, (5, 8), (9, 4)], ids=str)
def test_the_library(
    riders: str, upsample: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if DEVICE.type == "cpu":  # cuDNN's part is played by ATen

        def convolution(image: Any, weight: Any, *rest: Any, out: Any) -> Any:
            padding, stride, dilation, groups = rest[:4]
            return out.copy_(F.conv2d(image, weight, None, stride, padding, dilation, groups))

        stub = SimpleNamespace(out=convolution)
        monkeypatch.setattr(torch.ops.aten, "cudnn_convolution", stub)
    tensors, attrs = operands((2, 3, 4, 16), 24, riders, upsample=upsample)
    check("cudnn.conv2d", tensors, attrs, factor=1.7)  # conv and riders are rounded one by one
    call, _ = call_of("conv2d", tensors, attrs)
    size = 0 if upsample is None else 2 * upsample[0] * upsample[1] * 16 * 2
    assert find("cudnn.conv2d").workspace(call, {}) == size


# cuDNN's frontend, played by an object that computes with PyTorch what it was told to.


class FakeTensor:
    def __init__(self, dim: Any = None, stride: Any = None, uid: int = -1) -> None:
        self.dim, self.stride, self.uid, self.output = dim, stride, uid, False
        self.made_by: Any = None

    def set_output(self, value: bool) -> None:
        self.output = value

    def set_data_type(self, value: str) -> None:
        self.type = value

    def set_dim(self, value: Any) -> None:
        self.dim = value

    def set_stride(self, value: Any) -> None:
        self.stride = value

    def set_uid(self, value: int) -> None:
        self.uid = value


class FakeGraph:
    """Of six proposals the second and fourth cannot be built; each plan wants 1 KiB of memory."""

    def __init__(self, handle: Any, **types: Any) -> None:
        assert handle == "handle"
        assert types["compute_data_type"] == types["intermediate_data_type"] == "float"
        self.type, self.last, self.built, self.steps = types["io_data_type"], None, [], []

    def tensor(self, dim: Any, stride: Any, data_type: str, uid: int) -> FakeTensor:
        assert data_type == self.type
        return FakeTensor(dim, stride, uid)

    def _emit(self, made_by: Any) -> FakeTensor:
        self.last = FakeTensor()
        self.last.made_by = made_by
        return self.last

    def conv_fprop(self, image: Any, weight: Any, **window: Any) -> FakeTensor:
        return self._emit(lambda get: F.conv2d(get(image), get(weight), None, **window))

    def add(self, a: Any, b: Any) -> FakeTensor:
        return self._emit(lambda get: get(a) + get(b))

    def validate(self) -> None:
        assert self.last.output and self.last.type == self.type
        self.steps.append("validated")

    def build_operation_graph(self) -> None:
        self.steps.append("graph")

    def create_execution_plans(self, modes: Any) -> None:
        assert modes == ["A"]
        self.steps.append("plans")

    def deselect_numeric_notes(self, notes: Any) -> None:
        assert self.steps == ["validated", "graph", "plans"] and notes == ["random"]

    def get_execution_plan_count(self) -> int:
        return 6

    def build_plan_at_index(self, index: int) -> None:
        if index in (1, 3):
            raise RuntimeError("no engine")
        self.built.append(index)

    def get_workspace_size_plan_at_index(self, index: int) -> int:
        assert index in self.built
        return 1024

    def execute_plan_at_index(self, pack: Any, workspace: int, index: int, handle: Any) -> None:
        assert index in self.built and handle == "handle"
        ctypes.memset(workspace, 0, 1024)
        dtype = {"half": torch.float16, "bf16": torch.bfloat16}[self.type]

        def get(tensor: Any) -> torch.Tensor:
            if tensor.made_by is not None:
                return tensor.made_by(get)
            return at(tensor).float()

        def at(tensor: Any) -> torch.Tensor:
            reach = sum((n - 1) * s for n, s in zip(tensor.dim, tensor.stride, strict=True)) + 1
            memory = (ctypes.c_char * (reach * 2)).from_address(pack[tensor.uid])
            flat = torch.frombuffer(memory, dtype=dtype)
            return flat.as_strided(tensor.dim, tensor.stride)

        at(self.last).copy_(self.last.made_by(get))


@pytest.fixture
def frontend(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    graphs: list[FakeGraph] = []

    def graph(**options: Any) -> FakeGraph:
        graphs.append(FakeGraph(**options))
        return graphs[-1]

    library = SimpleNamespace(
        data_type=SimpleNamespace(HALF="half", BFLOAT16="bf16", FLOAT="float"),
        heur_mode=SimpleNamespace(A="A"),
        numerical_note=SimpleNamespace(NONDETERMINISTIC="random"),
        pygraph=graph,
        graphs=graphs,
    )
    monkeypatch.setattr(cudnn, "frontend", lambda: library)
    monkeypatch.setattr(cudnn, "_handle", lambda library, device: "handle")
    monkeypatch.setattr(cudnn, "_graphs", {})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    yield library


needs_no_gpu = pytest.mark.skipif(DEVICE.type != "cpu", reason="the fake reads the CPU's memory")


@needs_no_gpu
@pytest.mark.parametrize(
    "case",
    [
        ((2, 5, 7, 16), "bias", {}),
        ((2, 6, 4, 16), "", {"stride": 2, "dtype": torch.bfloat16}),
        ((2, 3, 4, 16), ALL, {}),
        ((2, 3, 4, 16), "bias residual", {"upsample": (6, 7)}),
        ((3, 3, 4, 16), "embedding", {"kernel": 1, "padding": 0}),
    ],
    ids=str,
)
def test_the_frontend(case: Any, frontend: SimpleNamespace) -> None:
    x, riders, attrs = case
    tensors, found = operands(x, 24, riders, **attrs)
    call, _ = call_of("conv2d", tensors, found)
    kernel = find("cudnn_frontend.conv2d")
    assert kernel.configs is not None
    configs = kernel.configs(call, chip())
    assert len(configs) == 4
    chosen = (configs[0], configs[2 if configs[0]["fused"] is False else 3])
    for config in chosen:
        check("cudnn_frontend.conv2d", tensors, found, config, factor=1.7)
    # One graph for each set of riders, whatever the plan; what failed to build is passed over.
    assert len(frontend.graphs) == len({config["fused"] for config in chosen})
    built = [graph.built for graph in frontend.graphs]
    assert built == (
        [[0], [0]] if "embedding" in riders or "residual" in riders else [[0, 2, 4, 5]]
    )
    with pytest.raises(RuntimeError, match="only 4 plans"):
        kernel.workspace(call, {"plan": 4, "fused": True})


@needs_no_gpu
def test_the_frontend_reads_slices(frontend: SimpleNamespace) -> None:
    tensors, attrs = operands((2, 3, 4, 16), 24, ALL)
    x, weight, bias, embedding, residual = tensors
    assert x is not None and embedding is not None and residual is not None
    strided = [sliced(x), weight, bias, sliced(embedding), sliced(residual)]
    check("cudnn_frontend.conv2d", strided, attrs, {"plan": 0, "fused": True})


def test_the_frontend_refuses(frontend: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = find("cudnn_frontend.conv2d")

    def supported(tensors: list[torch.Tensor | None], attrs: dict[str, Any]) -> bool:
        return kernel.supports(call_of("conv2d", tensors, attrs)[0], chip())

    good, attrs = operands((2, 3, 4, 16), 24)
    x, weight, bias, *_ = good
    assert x is not None and weight is not None and bias is not None
    assert supported(good, attrs)
    assert not supported([x.float(), weight.float(), None, None, None], attrs)
    assert not supported([x, weight, bias.float(), None, None], attrs)
    assert not supported([x, weight.transpose(1, 2), None, None, None], attrs)
    assert not supported([x, weight[..., :8].contiguous(), None, None, None], attrs | {"groups": 2})
    assert not supported([sliced(x, 4), weight, None, None, None], attrs)
    assert not supported(*operands((2, 3, 4, 12), 24))
    assert not supported(*operands((2, 3, 4, 16), 4))
    monkeypatch.setattr(cudnn, "frontend", lambda: None)
    assert not supported(good, attrs)


def test_a_broken_frontend_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(name: str) -> None:
        assert name == "cudnn"
        raise OSError("libcudnn.so.9 is missing")

    monkeypatch.setattr(cudnn.importlib, "import_module", failing)
    assert cudnn.frontend.__wrapped__() is None
    old = SimpleNamespace(pygraph=SimpleNamespace(execute=None))
    monkeypatch.setattr(cudnn.importlib, "import_module", lambda name: old)
    assert cudnn.frontend.__wrapped__() is None


def test_nothing_to_add_is_no_pass() -> None:
    out = torch.ones(1, 2, 2, 8)
    assert library.add_to_pixels(out, None, None, None) is out
