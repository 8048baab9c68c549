"""cuDNN through its frontend library, an optional one: every plan it has, and the bias fused.

PyTorch runs one plan of cuDNN's for a convolution, and adds the bias in a pass of its own. NVIDIA's
`nvidia-cudnn-frontend` offers them all: the first few that cuDNN's heuristic names are candidates
here, for timing to choose from. Time embedding and residual can be fused too, where cuDNN has an
engine for that, or be added afterwards in one pass, which may be faster.

Whatever the library cannot do it says by raising, while a plan is made: such a candidate drops out.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

from ..hardware import Hardware
from . import library as pytorch  # `library` is cuDNN in here
from .registry import Call, Config, TensorSpec, kernel

PLANS = 4
"""Plans of cuDNN's that are tried for a convolution without time embedding and residual."""

TRIES = 24
"""How many of the heuristic's proposals are looked at for a plan that can be built."""

REFUSED = ("NONDETERMINISTIC", "REDUCED_PRECISION_REDUCTION", "DOWN_CONVERT_INPUTS")
"""What a plan must not be: runs give equal bits, and sums are in float32."""


@cache
def frontend() -> Any:
    """The library, or None where it, or cuDNN, is not installed, or is too old."""
    try:
        found = importlib.import_module("cudnn")
        for name in ("build_plan_at_index", "execute_plan_at_index", "deselect_numeric_notes"):
            getattr(found.pygraph, name)
    except Exception:  # it loads cuDNN when imported, which fails in many ways
        return None
    return found


def _supports(call: Call, hardware: Hardware) -> bool:
    x, weight, bias, embedding, residual = call.tensors
    assert x is not None and weight is not None
    if x.dtype not in (torch.float16, torch.bfloat16) or call.attrs["groups"] != 1:
        return False
    if any(t is not None and (t.dtype != x.dtype or not t.aligned) for t in call.tensors):
        return False
    if any(t is not None and t.stride[-1] != 1 for t in (bias, embedding)):
        return False
    for image in (x, residual):
        if image is not None and (image.row_stride() is None or image.stride[-1] != 1):
            return False
    # Its engines for tensor cores want channels in eights; others are no faster than PyTorch's.
    if x.shape[3] % 8 or call.out.shape[3] % 8 or (x.row_stride() or 0) % 8:
        return False
    return weight.contiguous and call.out.contiguous and frontend() is not None


def _configs(call: Call, hardware: Hardware) -> list[Config]:
    """`fused`: time embedding and residual are added by cuDNN too; the bias always is."""
    if call.tensors[3] is None and call.tensors[4] is None:
        return [{"plan": plan, "fused": True} for plan in range(PLANS)]
    return [{"plan": plan, "fused": fused} for fused in (False, True) for plan in range(PLANS // 2)]


@dataclass
class _Graph:
    """A convolution with what cuDNN adds to it, and the plans for it that were built."""

    graph: Any
    proposals: int
    looked_at: int = 0
    built: list[int] = field(default_factory=list)

    def plan(self, number: int) -> int:
        """The index of the plan which is the `number`-th that can be built. Raises if none is."""
        while len(self.built) <= number:
            if self.looked_at >= min(self.proposals, TRIES):
                raise RuntimeError(f"cuDNN has only {len(self.built)} plans for this convolution")
            index = self.looked_at
            self.looked_at += 1
            try:
                self.graph.build_plan_at_index(index)
            except Exception:
                continue
            self.built.append(index)
        return self.built[number]


# Tensors of a graph by number.
_X, _WEIGHT, _BIAS, _EMBEDDING, _RESIDUAL, _OUT = range(1, 7)

_graphs: dict[tuple[Any, ...], _Graph] = {}
_lock = threading.Lock()
_local = threading.local()


def _handle(library: Any, device: int) -> Any:
    """cuDNN's handle of this thread for a device, on the current stream."""
    handles = _local.__dict__.setdefault("handles", {})
    if device not in handles:
        with torch.cuda.device(device):
            handles[device] = library.create_handle()
    library.set_stream(handle=handles[device], stream=torch.cuda.current_stream(device).cuda_stream)
    return handles[device]


def _prepared(
    specs: Sequence[TensorSpec | None], out: TensorSpec, attrs: Mapping[str, Any], device: int
) -> _Graph:
    """The graph of a convolution, x as it is read; made once for a device."""
    window = (tuple(attrs["stride"]), tuple(attrs["padding"]), tuple(attrs["dilation"]))
    key = (device, *specs, out, *window)
    with _lock:
        if key not in _graphs:
            _graphs[key] = _make(specs, out, *window, device)
        return _graphs[key]


def _make(
    specs: Sequence[TensorSpec | None],
    out: TensorSpec,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    device: int,
) -> _Graph:
    library = frontend()
    x, weight, bias, embedding, residual = specs
    assert x is not None and weight is not None
    half = library.data_type.HALF if x.dtype == torch.float16 else library.data_type.BFLOAT16
    graph = library.pygraph(
        io_data_type=half,
        intermediate_data_type=library.data_type.FLOAT,
        compute_data_type=library.data_type.FLOAT,
        handle=_handle(library, device),
    )

    def tensor(number: int, dim: Sequence[int], strides: Sequence[int]) -> Any:
        return graph.tensor(dim=list(dim), stride=list(strides), data_type=half, uid=number)

    y = graph.conv_fprop(
        image=tensor(_X, *_channels_first(x)),
        weight=tensor(_WEIGHT, *_channels_first(weight)),
        padding=list(padding),
        stride=list(stride),
        dilation=list(dilation),
    )
    channels = out.shape[3]
    if bias is not None:
        vector = [channels, 1, channels, channels]
        y = graph.add(a=y, b=tensor(_BIAS, [1, channels, 1, 1], vector))
    if embedding is not None:
        pitch = embedding.stride[0]
        rows = [embedding.shape[0], channels, 1, 1]
        y = graph.add(a=y, b=tensor(_EMBEDDING, rows, [pitch, 1, pitch, pitch]))
    if residual is not None:
        y = graph.add(a=y, b=tensor(_RESIDUAL, *_channels_first(residual)))
    dim, strides = _channels_first(out)
    y.set_output(True)
    y.set_data_type(half)
    y.set_dim(dim)
    y.set_stride(strides)
    y.set_uid(_OUT)
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([library.heur_mode.A])
    notes = (getattr(library.numerical_note, name, None) for name in REFUSED)
    graph.deselect_numeric_notes([note for note in notes if note is not None])
    return _Graph(graph, graph.get_execution_plan_count())


def _channels_first(image: TensorSpec) -> tuple[list[int], list[int]]:
    """Sizes and strides of [B, H, W, C] in cuDNN's order."""
    order = (0, 3, 1, 2)
    return [image.shape[d] for d in order], [image.stride[d] for d in order]


def _read(
    tensors: Sequence[TensorSpec | None], attrs: Mapping[str, Any], fused: bool
) -> list[TensorSpec | None]:
    """The tensors as cuDNN gets them: x up-sampled, and no more riders than it shall add."""
    x, weight, bias, embedding, residual = tensors
    assert x is not None
    size = attrs.get("upsample")
    if size is not None:
        x = TensorSpec.of(
            torch.empty((x.shape[0], *size, x.shape[3]), dtype=x.dtype, device="meta")
        )
    riders = [embedding, residual] if fused else [None, None]
    return [t and _bare(t) for t in (x, weight, bias, *riders)]


def _bare(spec: TensorSpec) -> TensorSpec:
    """Size and pitch, which is all that makes a graph another one."""
    if len(spec.shape) < 4:
        return TensorSpec(spec.shape, spec.stride, spec.dtype)
    _, height, width, channels = spec.shape
    pitch = spec.row_stride() or channels
    strides = (height * width * pitch, width * pitch, pitch, 1)
    return TensorSpec(spec.shape, strides, spec.dtype)


def _aligned(size: int) -> int:
    return -(-size // 256) * 256


def _workspace(call: Call, config: Config) -> int:
    """Bytes for the up-sampled x, and for the plan behind it. Makes the plan."""
    device = torch.cuda.current_device()
    specs = _read(call.tensors, call.attrs, bool(config["fused"]))
    found = _prepared(specs, _bare(call.out), call.attrs, device)
    with _lock:
        index = found.plan(int(config["plan"]))
    own = int(found.graph.get_workspace_size_plan_at_index(index))
    return _aligned(pytorch.upsampled_bytes(call)) + own


@kernel(
    "conv2d",
    name="cudnn_frontend.conv2d",
    priority=4,
    supports=_supports,
    configs=_configs,
    workspace=_workspace,
    planned=True,
)
def conv2d(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    embedding: torch.Tensor | None,
    residual: torch.Tensor | None,
    *,
    config: Config,
    workspace: torch.Tensor | None,
    **attrs: Any,
) -> torch.Tensor:
    """One of cuDNN's plans, on the current stream; can be captured."""
    library, device = frontend(), out.device.index or 0
    tensors = [x, weight, bias, embedding, residual]
    specs = _read(
        [t if t is None else TensorSpec.of(t) for t in tensors], attrs, bool(config["fused"])
    )
    found = _prepared(specs, _bare(TensorSpec.of(out)), attrs, device)
    with _lock:
        index = found.plan(int(config["plan"]))
    place = 0 if workspace is None else workspace.data_ptr()
    size = attrs.get("upsample")
    if size is not None:
        assert workspace is not None
        tensors[0] = large = pytorch.upsampled(x, size, workspace)
        place += _aligned(large.nbytes)
    pointers = {
        number: t.data_ptr()
        for number, t, spec in zip(range(_X, _OUT), tensors, specs, strict=True)
        if t is not None and spec is not None
    }
    pointers[_OUT] = out.data_ptr()
    handle = _handle(library, device)
    found.graph.execute_plan_at_index(pointers, place, index, handle=handle)
    return out if config["fused"] else pytorch.add_to_pixels(out, None, embedding, residual)
