"""cublasLt by its C functions: layouts, riders, algorithms; what is refused, what is reported.

Without a GPU the library is played by C functions with the signatures of cublasLt.h, which see no
more than what crosses that border: numbers, addresses, and what lies there.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import struct
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import DEVICE, call_of, check, chip, error, exact, find, run

pytest.importorskip("triton")
from accel import kernels
from accel.kernels import Call, TensorSpec, cublaslt

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
RIDERS = ["", "bias", "residual", "bias residual"]
NONE = {"activation": "none"}
GEGLU = {"activation": "geglu"}


def operands(
    leading: int | tuple[int, ...],
    columns: int,
    depth: int,
    riders: str = "bias residual",
    activation: str = "none",
    dtype: torch.dtype = F16,
) -> tuple[list[torch.Tensor | None], dict[str, Any]]:
    """Random tensors of a linear layer, and its attributes. riders: which optional ones."""
    shape = (leading,) if isinstance(leading, int) else leading
    generator = torch.Generator().manual_seed(sum(shape))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    wide = columns * (2 if activation == "geglu" else 1)
    made = [
        normal(*shape, depth),
        normal(wide, depth) * depth**-0.5,
        normal(wide) if "bias" in riders else None,
        normal(*shape, columns) if "residual" in riders else None,
    ]
    tensors = [None if t is None else t.to(DEVICE, dtype) for t in made]
    return tensors, {"activation": activation}


def slices(tensors: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """The same values, x and residual as slices of something wider, as of a merged projection."""
    x, weight, bias, residual = tensors
    assert x is not None and residual is not None
    apart = F.pad(x, (8, 16), value=7.0)[..., 8:-16]
    beside = F.pad(residual, (16, 8), value=7.0)[..., 16:-8]
    if x.shape[0] > 1:  # of a single row, nothing tells
        assert not apart.is_contiguous() and not beside.is_contiguous()
    return [apart, weight, bias, beside]


# The library, as its header declares it.

STATUS, PLACE, NUMBER, SIZE = ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
INVALID, UNSUPPORTED = 7, 15
STREAM = 0x5EED

SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cublasLtGetStatusName": (PLACE, NUMBER),
    "cublasLtCreate": (STATUS, PLACE),
    "cublasLtMatmulDescCreate": (STATUS, PLACE, NUMBER, NUMBER),
    "cublasLtMatmulDescSetAttribute": (STATUS, PLACE, NUMBER, PLACE, SIZE),
    "cublasLtMatrixLayoutCreate": (
        *(STATUS, PLACE, NUMBER, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_int64),
    ),
    "cublasLtMatmulPreferenceCreate": (STATUS, PLACE),
    "cublasLtMatmulPreferenceDestroy": (STATUS, PLACE),
    "cublasLtMatmulPreferenceSetAttribute": (STATUS, PLACE, NUMBER, PLACE, SIZE),
    "cublasLtMatmulAlgoGetHeuristic": (STATUS, *(PLACE,) * 7, NUMBER, PLACE, PLACE),
    "cublasLtMatmul": (
        *(STATUS, PLACE, PLACE, PLACE, PLACE, PLACE, PLACE, PLACE, PLACE),
        *(PLACE, PLACE, PLACE, PLACE, PLACE, PLACE, SIZE, PLACE),
    ),
}

# Bytes of the attributes: TRANSA, EPILOGUE, BIAS_POINTER, BIAS_DATA_TYPE.
OPERATION_BYTES = {3: 4, 7: 4, 8: 8, 26: 4}
# MAX_WORKSPACE_BYTES, REDUCTION_SCHEME_MASK, MIN_ALIGNMENT_{A,B,C,D}_BYTES.
PREFERENCE_BYTES = {1: 8, 3: 4, 5: 4, 6: 4, 7: 4, 8: 4}

# The algorithms' numbers, workspaces and states: one comes twice, one cannot run.
PROPOSED = [(70, 0, 0), (71, 512, UNSUPPORTED), (70, 0, 0), (72, 4096, 0), (73, 256, 0)]


class Failed(Exception):
    """What a function answers with a status instead of success."""


class FakeLibrary:
    """Functions of the C library, in memory of the CPU."""

    def __init__(self) -> None:
        self.objects: dict[int, Any] = {}
        self.proposed = PROPOSED
        self.ran: list[int] = []
        self.asked = 0
        self.pause = 0.0
        self.problems: list[BaseException] = []
        self._names: list[Any] = []
        self._kept: list[Any] = []
        for name, signature in SIGNATURES.items():
            callback = ctypes.CFUNCTYPE(*signature)(self._guarded(name))
            self._kept.append(callback)
            # As a loaded library has it: an address, and nothing known of its arguments.
            address = ctypes.cast(callback, ctypes.c_void_p).value
            assert address is not None
            setattr(self, name, ctypes.CFUNCTYPE(ctypes.c_int)(address))

    def _guarded(self, name: str) -> Callable[..., int]:
        function = getattr(self, name.removeprefix("cublasLt").lower())

        def guarded(*arguments: Any) -> int:
            try:
                return function(*arguments) or 0
            except Failed as failure:
                return int(failure.args[0])
            except BaseException as problem:  # it would be lost on its way through C
                self.problems.append(problem)
                return 14

        return guarded

    def _new(self, place: int, value: Any) -> None:
        key = 0x1000 + 16 * len(self.objects)
        self.objects[key] = value
        ctypes.c_void_p.from_address(place).value = key

    def _attribute(self, key: int, sizes: dict[int, int], number: int, at: int, size: int) -> None:
        assert size == sizes[number]
        self.objects[key][number] = int.from_bytes(ctypes.string_at(at, size), "little")

    def getstatusname(self, status: int) -> int:
        self._names.append(ctypes.create_string_buffer(b"STATUS_%d" % status))
        return ctypes.addressof(self._names[-1])

    def create(self, place: int) -> None:
        self._new(place, "handle")

    def matmuldesccreate(self, place: int, compute: int, scale: int) -> None:
        assert (compute, scale) == (68, 0)  # CUBLAS_COMPUTE_32F, CUDA_R_32F
        self._new(place, {3: 0, 7: 1})

    def matmuldescsetattribute(self, key: int, number: int, at: int, size: int) -> None:
        self._attribute(key, OPERATION_BYTES, number, at, size)
        time.sleep(self.pause)

    def matrixlayoutcreate(self, place: int, dtype: int, rows: int, columns: int, ld: int) -> None:
        if ld < rows:
            raise Failed(INVALID)
        self._new(place, (dtype, rows, columns, ld))

    def matmulpreferencecreate(self, place: int) -> None:
        self._new(place, {})

    def matmulpreferencedestroy(self, key: int) -> None:
        assert self.objects[key]
        self.objects[key] = None

    def matmulpreferencesetattribute(self, key: int, number: int, at: int, size: int) -> None:
        self._attribute(key, PREFERENCE_BYTES, number, at, size)

    def _sizes(self, operation: Any, a: Any, b: Any, c: Any, d: Any) -> None:
        """What a product's matrices must have in common."""
        assert operation[3] == 1
        assert len({matrix[0] for matrix in (a, b, c, d)}) == 1
        depth, rows = a[1], a[2]
        assert b[1] == depth and c[1:3] == d[1:3] == (rows, b[2])
        assert operation[7] in (1, 4)
        if operation[7] == 4:
            assert operation[26] == d[0] and operation[8] % 16 == 0 and operation[8]

    def matmulalgogetheuristic(self, handle: int, operation: int, *rest: int) -> None:
        *layouts, preference, wanted, place, count = rest
        assert self.objects[handle] == "handle" and len(layouts) == 4
        self._sizes(*(self.objects[key] for key in (operation, *layouts)))
        alignments = dict.fromkeys((5, 6, 7, 8), 16)
        assert self.objects[preference] == {1: 32 << 20, 3: 2} | alignments
        self.asked += 1
        if not self.proposed:
            raise Failed(UNSUPPORTED)
        found = self.proposed[:wanted]
        for index, (number, workspace, state) in enumerate(found):
            entry = struct.pack("8QQif4i", number, *(0,) * 7, workspace, state, 1.0, *(0,) * 4)
            ctypes.memmove(place + index * len(entry), entry, len(entry))
        ctypes.c_int.from_address(count).value = len(found)

    def matmul(self, handle: int, operation_key: int, alpha: int, *rest: Any) -> None:
        a, a_key, b, b_key, beta, c, c_key, d, d_key, algorithm, workspace, size, stream = rest
        assert self.objects[handle] == "handle" and stream == STREAM
        operation = self.objects[operation_key]
        layouts = [self.objects[key] for key in (a_key, b_key, c_key, d_key)]
        self._sizes(operation, *layouts)
        number = ctypes.c_uint64.from_address(algorithm).value
        needed = {entry[0]: entry[1] for entry in self.proposed}[number]
        if needed > (size or 0):
            raise Failed(INVALID)
        if needed:
            ctypes.memset(workspace, 0x7F, needed)
        factors = [ctypes.c_float.from_address(factor).value for factor in (alpha, beta)]
        left, right, addend, result = (
            self._matrix(at, layout) for at, layout in zip((a, b, c, d), layouts, strict=True)
        )
        value = factors[0] * (left.t().float() @ right.float())
        if factors[1] != 0:
            value += factors[1] * addend.float()
        if operation[7] == 4:
            rows = layouts[3][1]
            value += self._matrix(operation[8], (operation[26], rows, 1, rows)).float()
        result.copy_(value)
        self.ran.append(number)

    @staticmethod
    def _matrix(at: int, layout: tuple[int, int, int, int]) -> torch.Tensor:
        dtype, rows, columns, ld = layout
        memory = (ctypes.c_char * (((columns - 1) * ld + rows) * 2)).from_address(at)
        flat = torch.frombuffer(memory, dtype={2: F16, 14: BF16}[dtype])
        return flat.as_strided((rows, columns), (1, ld))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeLibrary]:
    if DEVICE.type != "cpu":
        pytest.skip("the fake reads the CPU's memory")
    made = FakeLibrary()
    places = []

    def load(place: str) -> FakeLibrary:
        places.append(place)
        return made

    with monkeypatch.context() as patch:
        patch.setattr(torch.version, "cuda", "13.0")
        patch.setattr(ctypes, "CDLL", load)
        loaded = cublaslt.shared_object.__wrapped__()
    assert loaded is made and len(places) == 1
    monkeypatch.setattr(cublaslt, "shared_object", lambda: made)
    monkeypatch.setattr(cublaslt, "_handles", {})
    monkeypatch.setattr(cublaslt, "_products", {})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    stream = SimpleNamespace(cuda_stream=STREAM)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    yield made
    if made.problems:
        raise made.problems[0]


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize("riders", RIDERS)
@pytest.mark.parametrize("size", [((2, 9), 24, 40), (1, 8, 16), (37, 72, 8)], ids=str)
def test_riders(size: Any, riders: str, dtype: torch.dtype, fake: FakeLibrary) -> None:
    tensors, attrs = operands(*size, riders, dtype=dtype)
    before = [None if t is None else t.clone() for t in tensors]
    for number in range(3):
        check("cublaslt.linear", tensors, attrs, {"algorithm": number})
    assert fake.ran == [70, 72, 73]  # what cannot run, and what came before, is passed over
    assert fake.asked == 1
    for tensor, copy in zip(tensors, before, strict=True):
        assert tensor is copy is None or torch.equal(tensor, copy)


def test_rows_may_lie_apart(fake: FakeLibrary) -> None:
    tensors, attrs = operands((2, 17), 24, 48)
    result = check("cublaslt.linear", slices(tensors), attrs)
    assert torch.equal(result, run("cublaslt.linear", tensors, attrs))
    assert fake.asked == 2  # an algorithm is for strides, too


def test_the_result_may_lie_apart(fake: FakeLibrary) -> None:
    tensors, attrs = operands(7, 24, 48)
    dense = run("cublaslt.linear", tensors, attrs)
    wide = torch.full((7, 40), math.nan, dtype=F16)
    out = wide[:, 8:32]
    run_kernel = find("cublaslt.linear").run
    assert run_kernel(out, *tensors, config={"algorithm": 0}, workspace=None, **attrs) is out
    assert torch.equal(out, dense)
    assert wide[:, :8].isnan().all() and wide[:, 32:].isnan().all()


def test_each_run_has_its_own_bias(fake: FakeLibrary) -> None:
    """All layers of a size share what was prepared for it; also two threads at a time."""
    x, weight, _, _ = operands(5, 16, 24)[0]
    biases = [torch.full((16,), float(value), dtype=F16) for value in range(4)]
    plain = run("cublaslt.linear", [x, weight, None, None], NONE).float()
    fake.pause = 0.002
    results: dict[int, torch.Tensor] = {}

    def work(index: int) -> None:
        results[index] = run("cublaslt.linear", [x, weight, biases[index], None], NONE)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(4):
        torch.testing.assert_close(results[index].float(), plain + index, rtol=0, atol=4e-3)
    assert fake.asked == 2


@pytest.mark.parametrize("riders", RIDERS)
def test_geglu(riders: str, fake: FakeLibrary) -> None:
    tensors, attrs = operands((2, 9), 24, 40, riders, "geglu")
    call, _ = call_of("linear", tensors, attrs)
    kernel = find("cublaslt.geglu")
    for number, own in enumerate((0, 4096, 256)):
        check("cublaslt.geglu", tensors, attrs, {"algorithm": number})
        assert kernel.workspace(call, {"algorithm": number}) == 18 * 48 * 2 + 64 + own
    assert fake.ran == [70, 72, 73]


def test_workspaces_and_algorithms_that_are_not_there(fake: FakeLibrary) -> None:
    tensors, attrs = operands(9, 24, 40)
    call, _ = call_of("linear", tensors, attrs)
    kernel = find("cublaslt.linear")
    assert kernel.configs is not None
    configs = kernel.configs(call, chip())
    assert configs == [{"algorithm": number} for number in range(4)]
    assert [kernel.workspace(call, config) for config in configs[:3]] == [0, 4096, 256]
    with pytest.raises(RuntimeError, match="only 3 algorithms"):
        kernel.workspace(call, configs[3])


def test_failures_are_told(fake: FakeLibrary) -> None:
    tensors, attrs = operands(9, 24, 40)
    _, out = call_of("linear", tensors, attrs)
    kernel = find("cublaslt.linear")
    short = torch.zeros(4095, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match=r"^cublasLtMatmul failed: STATUS_7 \(7\)$"):
        kernel.run(out, *tensors, config={"algorithm": 1}, workspace=short, **attrs)
    assert out.isnan().all()
    fake.proposed = []
    other, _ = call_of("linear", operands(10, 24, 40)[0], attrs)
    with pytest.raises(RuntimeError, match=r"^cublasLtMatmulAlgoGetHeuristic failed: STATUS_15"):
        kernel.workspace(other, {"algorithm": 0})
    assert not [entry for entry in fake.objects.values() if isinstance(entry, dict) and 1 in entry]


def test_it_is_the_first_of_the_libraries(fake: FakeLibrary) -> None:
    """Its first algorithm is PyTorch's choice as well, without the copy of the residual."""
    for riders, activation in (("bias residual", "none"), ("bias", "geglu")):
        call, _ = call_of("linear", *operands(90, 24, 40, riders, activation))
        found = kernels.candidates(call, chip())
        name = "cublaslt.linear" if activation == "none" else "cublaslt.geglu"
        assert [kernel.name for kernel, _ in found].count(name) == 4
        first = next((kernel, config) for kernel, config in found if kernel.launches is None)
        assert first[0].name == name and first[1] == {"algorithm": 0}


# What is refused.


def spec(*shape: int, dtype: torch.dtype = F16) -> TensorSpec:
    return TensorSpec.of(torch.empty(shape, dtype=dtype, device="meta"))


def strided(shape: tuple[int, ...], stride: tuple[int, ...], aligned: bool = True) -> TensorSpec:
    return TensorSpec(shape, stride, F16, aligned)


def call(x: Any, weight: Any, bias: Any = None, residual: Any = None, **attrs: Any) -> Call:
    columns = weight.shape[0] // (2 if attrs.get("activation") == "geglu" else 1)
    out = spec(*x.shape[:-1], columns, dtype=x.dtype)
    return Call("linear", out, (x, weight, bias, residual), NONE | attrs)


PLAIN = spec(64, 64)
REFUSED = {
    "fp32": call(spec(64, 64, dtype=F32), spec(64, 64, dtype=F32)),
    "mixed dtypes": call(PLAIN, spec(64, 64, dtype=BF16)),
    "a bias of fp32": call(PLAIN, PLAIN, spec(64, dtype=F32)),
    "a residual of fp32": call(PLAIN, PLAIN, None, spec(64, 64, dtype=F32)),
    "depth of no whole 16 bytes": call(spec(64, 60), spec(64, 60)),
    "a weight's rows of no whole 16 bytes": call(strided((64, 60), (64, 1)), spec(64, 60)),
    "columns of no whole 16 bytes": call(PLAIN, spec(20, 64)),
    "columns of no whole 16 bytes, in a wider result": Call(
        "linear", strided((64, 20), (24, 1)), (PLAIN, spec(20, 64), None, None), NONE
    ),
    "an unaligned start": call(strided((64, 64), (64, 1), aligned=False), PLAIN),
    "rows at odd distances": call(strided((64, 64), (68, 1)), PLAIN),
    "rows at two distances": call(strided((2, 32, 64), (4096, 64, 1)), PLAIN),
    "one row over and over": call(strided((64, 64), (0, 1)), PLAIN),
    "columns apart": call(strided((64, 64), (128, 2)), PLAIN),
    "a transposed weight": call(PLAIN, strided((64, 64), (1, 64))),
    "a residual at two distances": call(
        spec(2, 32, 64), PLAIN, None, strided((2, 32, 64), (4096, 64, 1))
    ),
    "one row added to all": call(PLAIN, PLAIN, None, strided((64, 64), (0, 1))),
    "a bias with gaps": call(PLAIN, PLAIN, strided((64,), (2,))),
    "another activation": call(PLAIN, PLAIN, activation="silu"),
    "no rows": call(spec(0, 64), PLAIN),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cublaslt, "shared_object", object)
    refused = REFUSED[name]
    assert find("cublaslt.linear").supports(call(PLAIN, PLAIN), chip())
    assert not find("cublaslt.linear").supports(refused, chip())
    if refused.attrs == NONE and refused.out.shape[-1] % 16 == 0:
        gated = Call("linear", spec(*refused.out.shape[:-1], 32), refused.tensors, GEGLU)
        assert find("cublaslt.geglu").supports(call(PLAIN, PLAIN, **GEGLU), chip())
        assert not find("cublaslt.geglu").supports(gated, chip())


def test_each_serves_one_activation(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, gated = call(PLAIN, PLAIN), call(PLAIN, PLAIN, **GEGLU)
    names = ("cublaslt.linear", "cublaslt.geglu")

    def served() -> list[list[bool]]:
        return [[find(name).supports(c, chip()) for c in (plain, gated)] for name in names]

    monkeypatch.setattr(cublaslt, "shared_object", object)
    assert served() == [[True, False], [False, True]]
    monkeypatch.setattr(cublaslt, "shared_object", lambda: None)
    assert served() == [[False, False], [False, False]]


def test_bfloat16_needs_ampere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cublaslt, "shared_object", object)
    supports = find("cublaslt.linear").supports
    half = spec(64, 64, dtype=BF16)
    assert supports(call(half, half), chip((8, 0)))
    assert not supports(call(half, half), chip((7, 5)))
    assert supports(call(PLAIN, PLAIN), chip((7, 5)))


# Where the library comes from.


@pytest.mark.parametrize("platform", ["linux", "win32"])
def test_where_the_library_is_looked_for(
    platform: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "cublasLt64_13.dll" if platform == "win32" else "libcublasLt.so.13"
    files = [tmp_path / "torch" / "lib", tmp_path / "nvidia" / "cu13" / "lib"]
    for folder in files:
        folder.mkdir(parents=True)
        (folder / name).touch()
    tried = []

    def load(place: str) -> Any:
        tried.append(place)
        if len(tried) == 1:
            raise OSError("no such library")
        if len(tried) == 2:
            return SimpleNamespace(cublasLtCreate=SimpleNamespace())  # too old a one
        return SimpleNamespace(**{name: SimpleNamespace() for name in SIGNATURES})

    monkeypatch.setattr(cublaslt.sys, "platform", platform)
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "torch" / "__init__.py"))
    monkeypatch.setattr(ctypes, "CDLL", load)
    assert cublaslt.shared_object.__wrapped__() is not None
    assert tried == [name, *(str(folder / name) for folder in files)]


def test_no_library_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(place: str) -> None:
        tried.append(place)
        raise OSError("no such library")

    tried: list[str] = []
    monkeypatch.setattr(ctypes, "CDLL", failing)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert cublaslt.shared_object.__wrapped__() is None and not tried
    monkeypatch.setattr(torch.version, "cuda", "12.9")
    assert cublaslt.shared_object.__wrapped__() is None and tried


def test_structures_have_the_sizes_of_the_header() -> None:
    assert ctypes.sizeof(cublaslt._Algorithm) == 64
    assert ctypes.sizeof(cublaslt._Proposal) == struct.calcsize("8QQif4i") == 96


# The library itself.

SIZES = [
    ((2, 1024), 640, 640),
    ((2, 4096), 320, 1280),
    (77, 1280, 2048),
    (154, 2560, 768),
    (1, 1280, 320),
    (2047, 1288, 328),
    (64, 1280, 5120),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize("riders", RIDERS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_algorithm(size: Any, riders: str, dtype: torch.dtype) -> None:
    assert cublaslt.shared_object() is not None, "PyTorch's own library is not found"
    tensors, attrs = operands(*size, riders, dtype=dtype)
    variants = [tensors, slices(tensors)] if "residual" in riders else [tensors]
    call, _ = call_of("linear", tensors, attrs)
    plain = error(torch_result(tensors), exact("linear", tensors, attrs))
    ran = 0
    for variant in variants:
        for config in cublaslt.configs(call, chip()):
            try:
                first = run("cublaslt.linear", variant, attrs, config)
            except RuntimeError as problem:
                assert "algorithms for this product" in str(problem)
                continue
            ran += 1
            assert error(first, exact("linear", tensors, attrs)) <= 1.1 * plain + 1e-6, config
            assert torch.equal(first, run("cublaslt.linear", variant, attrs, config)), config
    assert ran >= len(variants), "not even one algorithm"


def torch_result(tensors: list[torch.Tensor | None]) -> torch.Tensor:
    x, weight, bias, residual = tensors
    assert x is not None and weight is not None
    result = F.linear(x, weight, bias)
    return result if residual is None else result + residual


@pytest.mark.gpu
def test_geglu_by_every_algorithm() -> None:
    tensors, attrs = operands((2, 1024), 1280, 320, "bias residual", "geglu")
    for number in range(2):
        check("cublaslt.geglu", tensors, attrs, {"algorithm": number})


@pytest.mark.gpu
def test_runs_are_captured_with_the_bias_they_had() -> None:
    tensors, attrs = operands(154, 640, 768)
    x, weight, bias, residual = tensors
    assert bias is not None
    others = [tensors, [x, weight, bias + 1, residual]]
    config = {"algorithm": 0}
    call, _ = call_of("linear", tensors, attrs)
    kernel = find("cublaslt.linear")
    size = kernel.workspace(call, config)
    scratch = torch.empty(size, dtype=torch.uint8, device=DEVICE) if size else None
    expected = [run("cublaslt.linear", each, attrs, config) for each in others]
    outs = [torch.full_like(expected[0], math.nan) for _ in others]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for out, each in zip(outs, others, strict=True):
            kernel.run(out, *each, config=config, workspace=scratch, **attrs)
    for out in outs:
        out.fill_(math.nan)
    graph.replay()
    torch.cuda.synchronize()
    for out, result in zip(outs, expected, strict=True):
        assert torch.equal(out, result)
