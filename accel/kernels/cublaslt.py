"""Linear layers by cublasLt, called directly: the whole epilogue in one launch, several algorithms.

PyTorch's addmm takes the algorithm that cublasLt's heuristic names first, and copies a residual to
where the result goes before it multiplies. The library itself can read the residual elsewhere, add
the bias in the same launch, and names more algorithms: the first few are candidates here, for
timing to choose from. It is the very library that PyTorch's builds for CUDA bring along.

Numbers and signatures are those of cublasLt.h, the same in CUDA 12 and 13. Matrices are stored
column by column there, so what is computed is the transpose: `out^T = weight @ x^T`.

What the library cannot do it says while an algorithm is looked for: such a candidate drops out.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from ..hardware import Hardware
from . import library
from .registry import Call, Config, TensorSpec, kernel
from .shared_objects import beside_pytorch, opened

ALGORITHMS = 4
"""Algorithms that are tried for a call, in the order of the heuristic's estimates."""

PROPOSALS = 8
"""How many the heuristic is asked for: it may name one twice, or one that cannot run."""

MAX_WORKSPACE_BYTES = 32 << 20
"""What NVIDIA recommends for Hopper, where algorithms want the most."""

ALIGNMENT_BYTES = 16
"""At what multiples operands and bias start; of the workspace, 256."""

_DATA_TYPES = {torch.float16: 2, torch.bfloat16: 14}  # CUDA_R_16F, CUDA_R_16BF
_R_32F = 0
_COMPUTE_32F = 68
_TRANSPOSED = 1  # CUBLAS_OP_T; the default is CUBLAS_OP_N

# cublasLtMatmulDescAttributes_t
_TRANSA, _EPILOGUE, _BIAS_POINTER, _BIAS_DATA_TYPE = 3, 7, 8, 26
_EPILOGUE_BIAS = 4
# cublasLtMatmulPreferenceAttributes_t
_MAX_WORKSPACE, _REDUCTION_SCHEMES, _MIN_ALIGNMENTS = 1, 3, (5, 6, 7, 8)
# Parts of a sum over K may go through memory in float32, to be added in a fixed order; the other
# two schemes round them to half precision. No parts at all are always allowed.
_REDUCTION_IN_COMPUTE_TYPE = 2

_ONE, _ZERO = ctypes.c_float(1.0), ctypes.c_float(0.0)


class _Algorithm(ctypes.Structure):
    """cublasLtMatmulAlgo_t"""

    _fields_ = [("data", ctypes.c_uint64 * 8)]


class _Proposal(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t"""

    _fields_ = [
        ("algorithm", _Algorithm),
        ("workspace_bytes", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    ]


_POINTER, _INT, _SIZE = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t

_FUNCTIONS: dict[str, list[Any]] = {
    "cublasLtGetStatusName": [_INT],
    "cublasLtCreate": [_POINTER],
    "cublasLtMatmulDescCreate": [_POINTER, _INT, _INT],
    "cublasLtMatmulDescSetAttribute": [_POINTER, _INT, _POINTER, _SIZE],
    "cublasLtMatrixLayoutCreate": [
        *(_POINTER, _INT, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_int64),
    ],
    "cublasLtMatmulPreferenceCreate": [_POINTER],
    "cublasLtMatmulPreferenceSetAttribute": [_POINTER, _INT, _POINTER, _SIZE],
    "cublasLtMatmulPreferenceDestroy": [_POINTER],
    # handle, operation, layouts of A, B, C, D, preference, how many, proposals, how many came
    "cublasLtMatmulAlgoGetHeuristic": [*(_POINTER,) * 7, _INT, _POINTER, _POINTER],
    # handle, operation, alpha, A, its layout, B, its layout, beta, C, its layout, D, its layout,
    # algorithm, workspace, its bytes, stream
    "cublasLtMatmul": [*(_POINTER,) * 14, _SIZE, _POINTER],
}


@cache
def shared_object() -> Any:
    """cublasLt of PyTorch's CUDA version, or None where it cannot be had."""
    version = torch.version.cuda
    if version is None:
        return None
    for place in _places(version.split(".")[0]):
        try:
            found = opened(place, _FUNCTIONS)
            found.cublasLtGetStatusName.restype = ctypes.c_char_p
        except (OSError, AttributeError):
            continue
        return found
    return None


def _places(major: str) -> list[str]:
    """The library's name alone, which finds the one that PyTorch has loaded; then its files."""
    name = f"cublasLt64_{major}.dll" if sys.platform == "win32" else f"libcublasLt.so.{major}"
    return [name, *beside_pytorch(name, "cublas", major)]


@dataclass(frozen=True)
class _Product:
    """`out = x @ weight^T`, plus what rides along: all that makes an algorithm another one.

    rows, columns, depth: of x and out, of out, of x. Strides are elements from row to row; the
    weight's rows lie side by side. `residual_stride`: None without a residual.
    """

    dtype: torch.dtype
    rows: int
    columns: int
    depth: int
    x_stride: int
    out_stride: int
    residual_stride: int | None
    bias: bool

    @staticmethod
    def of(
        out: TensorSpec,
        x: TensorSpec,
        weight: TensorSpec,
        bias: TensorSpec | None,
        residual: TensorSpec | None,
    ) -> _Product:
        """Of tensors that `multiplies` took."""
        return _Product(
            x.dtype,
            x.rows,
            weight.shape[0],
            weight.shape[1],
            _row_stride(x),
            _row_stride(out),
            None if residual is None else _row_stride(residual),
            bias is not None,
        )


def _row_stride(spec: TensorSpec) -> int:
    step = spec.row_stride()
    assert step is not None
    return step


@dataclass(frozen=True)
class _Prepared:
    """cublasLt's objects for a product, and the algorithms for it, the likeliest first.

    They are kept for the life of the process, as are the networks' shapes.
    """

    operation: ctypes.c_void_p
    weight: ctypes.c_void_p
    x: ctypes.c_void_p
    addend: ctypes.c_void_p
    out: ctypes.c_void_p
    algorithms: Sequence[_Proposal]

    def algorithm(self, number: int) -> _Proposal:
        """The algorithm of that number. Raises RuntimeError if there are fewer."""
        if number >= len(self.algorithms):
            count = len(self.algorithms)
            raise RuntimeError(f"cublasLt has only {count} algorithms for this product")
        return self.algorithms[number]


_lock = threading.Lock()  # over the dictionaries, and over an operation from its bias to its launch
_handles: dict[int, ctypes.c_void_p] = {}
_products: dict[tuple[int, _Product], _Prepared] = {}


def _call(name: str, *arguments: Any) -> None:
    """Call a function of the library. Raises RuntimeError unless it succeeds."""
    found = shared_object()
    status = getattr(found, name)(*arguments)
    if status != 0:
        told = found.cublasLtGetStatusName(status)
        raise RuntimeError(f"{name} failed: {(told or b'unknown status').decode()} ({status})")


def _created(kind: str, *arguments: Any) -> ctypes.c_void_p:
    """A new object of the library's."""
    made = ctypes.c_void_p()
    _call(f"cublasLt{kind}Create", ctypes.byref(made), *arguments)
    return made


def _set(kind: str, target: ctypes.c_void_p, attribute: int, value: Any) -> None:
    """Set an attribute; its type is that of `value`, a ctypes number."""
    size = ctypes.sizeof(value)
    _call(f"cublasLt{kind}SetAttribute", target, attribute, ctypes.byref(value), size)


def _prepared(product: _Product, device: int) -> _Prepared:
    """What a product needs on a device, made once. The caller holds the lock."""
    key = (device, product)
    if key not in _products:
        with torch.cuda.device(device):  # a handle is of the device that is current
            if device not in _handles:
                _handles[device] = _created("")
            _products[key] = _prepare(product, _handles[device])
    return _products[key]


def _prepare(product: _Product, handle: ctypes.c_void_p) -> _Prepared:
    dtype = _DATA_TYPES[product.dtype]
    rows, columns, depth = product.rows, product.columns, product.depth

    operation = _created("MatmulDesc", _COMPUTE_32F, _R_32F)
    _set("MatmulDesc", operation, _TRANSA, ctypes.c_int32(_TRANSPOSED))
    if product.bias:
        _set("MatmulDesc", operation, _EPILOGUE, ctypes.c_uint32(_EPILOGUE_BIAS))
        _set("MatmulDesc", operation, _BIAS_DATA_TYPE, ctypes.c_int32(dtype))
        # The heuristic reads from the address how the bias is aligned, and nothing else.
        _set("MatmulDesc", operation, _BIAS_POINTER, ctypes.c_void_p(ALIGNMENT_BYTES))

    # A row of a tensor is a column to the library.
    weight = _created("MatrixLayout", dtype, depth, columns, depth)
    x = _created("MatrixLayout", dtype, depth, rows, product.x_stride)
    addend = out = _created("MatrixLayout", dtype, columns, rows, product.out_stride)
    if product.residual_stride is not None:
        addend = _created("MatrixLayout", dtype, columns, rows, product.residual_stride)

    preference = _created("MatmulPreference")
    try:
        limits = {
            _MAX_WORKSPACE: ctypes.c_uint64(MAX_WORKSPACE_BYTES),
            _REDUCTION_SCHEMES: ctypes.c_uint32(_REDUCTION_IN_COMPUTE_TYPE),
            **dict.fromkeys(_MIN_ALIGNMENTS, ctypes.c_uint32(ALIGNMENT_BYTES)),
        }
        for attribute, value in limits.items():
            _set("MatmulPreference", preference, attribute, value)
        proposals, count = (_Proposal * PROPOSALS)(), ctypes.c_int()
        _call(
            "cublasLtMatmulAlgoGetHeuristic",
            *(handle, operation, weight, x, addend, out, preference),
            *(PROPOSALS, proposals, ctypes.byref(count)),
        )
    finally:
        _call("cublasLtMatmulPreferenceDestroy", preference)
    distinct: dict[bytes, _Proposal] = {}
    for proposal in proposals[: count.value]:
        if proposal.state == 0:
            distinct.setdefault(bytes(proposal.algorithm), proposal)
    return _Prepared(operation, weight, x, addend, out, list(distinct.values()))


def multiplies(call: Call, hardware: Hardware) -> bool:
    """Whether the library is there and takes the operands of a `linear`, whatever its activation.

    Half precision; rows of whole 16 bytes, one after another at one distance, none over another.
    """
    x, _, _, residual = call.tensors
    if x is None or hardware.capability is None or not library.regular(call):
        return False
    apart = [spec for spec in (x, residual, call.out) if spec is not None]
    return (
        (x.dtype == torch.float16 or hardware.capability >= (8, 0))
        and x.rows > 0
        and all((spec.row_stride() or 0) >= spec.shape[-1] for spec in apart)
        and shared_object() is not None
    )


def configs(call: Call, hardware: Hardware) -> list[Config]:
    """One for each algorithm; which of them there are is known when they are planned."""
    return [{"algorithm": number} for number in range(ALGORITHMS)]


def product_workspace(
    out: TensorSpec,
    x: TensorSpec,
    weight: TensorSpec,
    bias: TensorSpec | None,
    residual: TensorSpec | None,
    config: Config,
) -> int:
    """Bytes that the algorithm needs on the current device. Raises RuntimeError without it."""
    product = _Product.of(out, x, weight, bias, residual)
    with _lock:
        found = _prepared(product, torch.cuda.current_device())
    return int(found.algorithm(int(config["algorithm"])).workspace_bytes)


def product_into(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    config: Config,
    workspace: torch.Tensor | None,
) -> None:
    """`x @ weight^T + bias + residual` into out, in one launch on the current stream.

    x [..., K], weight [N, K], bias [N], residual and out [..., N]. Can be captured. Raises
    RuntimeError if the library fails, also where the workspace is too small.
    """
    device = out.device.index or 0
    specs = [None if t is None else TensorSpec.of(t) for t in (out, x, weight, bias, residual)]
    product = _Product.of(*specs)  # type: ignore[arg-type]
    addend = out if residual is None else residual
    stream = torch.cuda.current_stream(device).cuda_stream
    place, size = (0, 0) if workspace is None else (workspace.data_ptr(), workspace.nbytes)
    with _lock:
        found = _prepared(product, device)
        chosen = found.algorithm(int(config["algorithm"]))
        if bias is not None:
            pointer = ctypes.c_void_p(bias.data_ptr())
            _set("MatmulDesc", found.operation, _BIAS_POINTER, pointer)
        _call(
            "cublasLtMatmul",
            *(_handles[device], found.operation, ctypes.byref(_ONE)),
            *(weight.data_ptr(), found.weight, x.data_ptr(), found.x),
            ctypes.byref(_ZERO if residual is None else _ONE),
            *(addend.data_ptr(), found.addend, out.data_ptr(), found.out),
            *(ctypes.byref(chosen.algorithm), place, size, stream),
        )


def _supports(call: Call, hardware: Hardware) -> bool:
    return call.attrs["activation"] == "none" and multiplies(call, hardware)


def _workspace(call: Call, config: Config) -> int:
    x, weight, bias, residual = call.tensors
    assert x is not None and weight is not None
    return product_workspace(call.out, x, weight, bias, residual, config)


@kernel(
    "linear",
    name="cublaslt.linear",
    priority=0,
    supports=_supports,
    configs=configs,
    workspace=_workspace,
)
def linear(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    *,
    activation: str,
    config: Config,
    workspace: torch.Tensor | None,
) -> torch.Tensor:
    """One of the algorithms, with bias and residual in its epilogue."""
    product_into(out, x, weight, bias, residual, config, workspace)
    return out
