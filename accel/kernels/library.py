"""PyTorch's own CUDA libraries (cuBLAS, cuDNN, its attention), writing into planned buffers.

Not faster than eager PyTorch by itself; it saves the passes that fused operators make unnecessary,
and it is what other kernels have to beat.
"""

from __future__ import annotations

import logging
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..hardware import Hardware
from .registry import NO_CONFIG, Call, Config, TensorSpec, kernel

logger = logging.getLogger(__name__)

_CUDA = ("cuda",)


def regular(call: Call) -> bool:
    """Whether a `linear` is in half precision, its rows of whole 16 bytes and at one distance."""
    x, weight, bias, residual = call.tensors
    if x is None or weight is None:
        return False
    present = [spec for spec in (x, weight, bias, residual, call.out) if spec is not None]
    apart = [spec for spec in (x, residual, call.out) if spec is not None]
    return (
        x.dtype in (torch.float16, torch.bfloat16)
        and all(spec.dtype == x.dtype and spec.aligned for spec in present)
        and weight.contiguous
        and (bias is None or bias.contiguous)
        and x.shape[-1] % 8 == 0
        and call.out.shape[-1] % 8 == 0
        and all(_rows_apart(spec) for spec in apart)
    )


def _rows_apart(spec: TensorSpec) -> bool:
    """Whether one stride leads from row to row, and keeps them at multiples of 16 bytes."""
    step = spec.row_stride()
    return spec.stride[-1] == 1 and step is not None and step % 8 == 0


def product_bytes(call: Call, config: Config) -> int:
    """Bytes of a GEGLU layer's columns before the activation."""
    weight = call.tensors[1]
    if weight is None or call.attrs["activation"] != "geglu":
        return 0
    return call.out.rows * weight.shape[0] * call.out.dtype.itemsize


def product_into(
    out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> None:
    """`x @ weight^T + bias` into out [rows of x, rows of the weight], in one launch."""
    rows = x.reshape(-1, x.shape[-1])
    if bias is None:
        torch.mm(rows, weight.t(), out=out)
    else:
        torch.addmm(bias, rows, weight.t(), out=out)


@kernel(
    "linear",
    name="cublas.linear",
    devices=_CUDA,
    adds_apart=True,
    configs=lambda call, hardware: (NO_CONFIG,),
    workspace=product_bytes,
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
    """The bias rides in cuBLASLt's epilogue; GEGLU and the residual are passes of their own."""
    flat = out.view(-1, out.shape[-1])
    if activation == "none":
        product_into(flat, x, weight, bias)
    else:
        assert workspace is not None
        product = workspace.view(out.dtype).view(flat.shape[0], -1)
        product_into(product, x, weight, bias)
        hidden, gate = product.chunk(2, dim=-1)
        torch.mul(hidden, torch.ops.aten.gelu.out(gate, out=gate), out=flat)
    return out if residual is None else out.add_(residual)


@kernel(
    "linear",
    name="cublas.linear_onto",
    devices=_CUDA,
    adds_apart=True,
    supports=lambda call, hardware: (
        call.tensors[3] is not None and call.attrs["activation"] == "none"
    ),
)
def linear_onto(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor,
    *,
    activation: str,
) -> torch.Tensor:
    """The residual, and the bias with it, goes to where cuBLAS then adds the product.

    PyTorch has no call that gives cuBLAS both. Against a pass of its own after the product, the
    pass before reads one tensor less.
    """
    if bias is None:
        out.copy_(residual)
    else:
        torch.add(residual, bias, out=out)
    out.view(-1, out.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]), weight.t())
    return out


def _tf32_allowed() -> bool:
    """Whether the host lets cuDNN round float32 to TF32, in whichever of PyTorch's two settings."""
    try:
        return torch.backends.cudnn.allow_tf32
    except RuntimeError:  # the host has used the newer setting, and the older cannot be read then
        return torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]


def upsampled_bytes(call: Call) -> int:
    """Bytes of a convolution's x as up-sampled, which a library can only read from memory."""
    x, size = call.tensors[0], call.attrs.get("upsample")
    if x is None or size is None:
        return 0
    return x.shape[0] * prod(size) * x.shape[3] * x.dtype.itemsize


def upsampled(x: torch.Tensor, size: tuple[int, int], workspace: torch.Tensor) -> torch.Tensor:
    """x [B, H, W, C] at the size given, at the start of the workspace."""
    shape = (x.shape[0], *size, x.shape[3])
    large = workspace[: prod(shape) * x.element_size()].view(x.dtype).view(shape)
    torch.ops.aten.upsample_nearest2d.out(
        x.permute(0, 3, 1, 2), size, None, None, out=large.permute(0, 3, 1, 2)
    )
    return large


@kernel(
    "conv2d",
    name="cudnn.conv2d",
    devices=_CUDA,
    configs=lambda call, hardware: (NO_CONFIG,),
    workspace=lambda call, config: upsampled_bytes(call),
)
def conv2d(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    embedding: torch.Tensor | None,
    residual: torch.Tensor | None,
    *,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    upsample: tuple[int, int] | None = None,
    config: Config = NO_CONFIG,
    workspace: torch.Tensor | None = None,
) -> torch.Tensor:
    """cuDNN's own choice of algorithm; bias, time embedding and residual are added in one pass.

    Trying all algorithms was no faster on an H100, and cost seconds at the first image and at each
    new size.
    """
    if upsample is not None:
        assert workspace is not None
        x = upsampled(x, upsample, workspace)
    torch.ops.aten.cudnn_convolution.out(
        x.permute(0, 3, 1, 2),
        weight.permute(0, 3, 1, 2),
        padding,
        stride,
        dilation,
        groups,
        False,  # benchmark
        False,  # deterministic
        x.dtype == torch.float32 and _tf32_allowed(),
        out=out.permute(0, 3, 1, 2),
    )
    return add_to_pixels(out, bias, embedding, residual)


def add_to_pixels(
    out: torch.Tensor,
    bias: torch.Tensor | None,
    embedding: torch.Tensor | None,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    """`out += bias + embedding + residual`, in one pass where there is Triton.

    out [B, H, W, O] contiguous, bias [O], embedding [B, O], residual [B, H, W, O].
    """
    if bias is None and embedding is None and residual is None:
        return out
    if out.is_cuda and _add_at_once(out, bias, embedding, residual):
        return out
    if embedding is not None:
        embedding = embedding[:, None, None, :]
        out.add_(embedding if bias is None else embedding + bias)
    elif bias is not None:
        out.add_(bias)
    return out if residual is None else out.add_(residual)


_triton_failed = False


def _add_at_once(out: torch.Tensor, *riders: torch.Tensor | None) -> bool:
    """Add with one launch of Triton's; whether it could be done."""
    global _triton_failed
    from . import load_triton

    old = torch.cuda.get_device_capability(out.device) < (8, 0)
    if _triton_failed or (old and out.dtype == torch.bfloat16) or not load_triton():
        return False
    from . import conv

    launch = conv.addition(out, *riders)
    if launch is None:
        return False
    try:
        launch.run()
    except Exception as error:  # no C compiler, say: PyTorch's kernels need none
        logger.warning("additions to convolutions take several passes, Triton fails: %s", error)
        _triton_failed = True
    return not _triton_failed


@kernel("group_norm", name="torch.group_norm", devices=_CUDA)
def group_norm(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    shift: torch.Tensor | None = None,
    offset: torch.Tensor | None = None,
    *,
    groups: int,
    eps: float,
    activation: str,
) -> torch.Tensor:
    """PyTorch's norm makes a channels-first result; the activation's pass puts it back in order.

    What is to be added first takes a pass of its own, by way of the result's buffer.
    """
    if shift is not None:
        shift = shift.view(x.shape[0], *[1] * (x.dim() - 2), -1)
        x = torch.add(x, shift if offset is None else shift + offset, out=out)
    elif offset is not None:
        x = torch.add(x, offset, out=out)
    y = torch.group_norm(x.movedim(-1, 1), groups, weight, bias, eps)
    if activation == "silu":
        torch.ops.aten.silu.out(y, out=out.movedim(-1, 1))
        return out
    return out.copy_(y.movedim(1, -1))


@kernel("layer_norm", name="torch.layer_norm", devices=_CUDA, allocates=True)
def layer_norm(
    out: None,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    *,
    eps: float,
) -> torch.Tensor:
    """PyTorch's fused norm, which has no variant that writes into a given buffer."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


@kernel("add_layer_norm", name="torch.add_layer_norm", devices=_CUDA)
def add_layer_norm(
    out: torch.Tensor,
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    *,
    eps: float,
) -> torch.Tensor:
    """Two launches: PyTorch's sum, then its LayerNorm."""
    total = torch.add(x, residual, out=out[0])
    statistics = x.new_empty(2, *x.shape[:-1], 1, dtype=torch.float32)
    torch.ops.aten.native_layer_norm.out(
        total,
        x.shape[-1:],
        weight,
        bias,
        eps,
        out0=out[1],
        out1=statistics[0],
        out2=statistics[1],
    )
    return out


@kernel("attention", name="torch.sdpa", devices=_CUDA, allocates=True)
def attention(
    out: None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    heads: int,
    scale: float,
) -> torch.Tensor:
    """FlashAttention or cuDNN, whichever PyTorch prefers for the head size."""
    return _attend(query, key, value, heads, scale)


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int, scale: float
) -> torch.Tensor:
    """Results come in the memory order of `query`, so that joining the heads copies nothing."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    result = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return result.transpose(1, 2).flatten(2)


def _half_heads(call: Call, hardware: Hardware) -> int | None:
    """Columns of a head, if the backends made for tensor cores take what is called for."""
    query, key, value = call.tensors
    if query is None or key is None or value is None:
        return None
    head = query.shape[-1] // call.attrs["heads"]
    taken = (
        hardware.capability is not None
        and hardware.capability >= (8, 0)
        and query.dtype in (torch.float16, torch.bfloat16)
        and all(spec.stride[-1] == 1 and spec.aligned for spec in (query, key, value))
        and head % 8 == 0
    )
    return head if taken else None


def _cudnn_attends(call: Call, hardware: Hardware) -> bool:
    head = _half_heads(call, hardware)
    version = tuple(map(int, (hardware.cudnn or "0.0").split(".")[:2]))
    widest = 256 if hardware.capability == (9, 0) and version >= (9, 10) else 128
    return head is not None and version >= (9, 0) and head <= widest


def _flash_attends(call: Call, hardware: Hardware) -> bool:
    head = _half_heads(call, hardware)
    return head is not None and head <= 256


@kernel(
    "attention",
    name="cudnn.attention",
    devices=_CUDA,
    allocates=True,
    priority=2,
    supports=_cudnn_attends,
)
def cudnn_attention(
    out: None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    heads: int,
    scale: float,
) -> torch.Tensor:
    """cuDNN also where PyTorch would prefer another."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return _attend(query, key, value, heads, scale)


@kernel(
    "attention",
    name="flash.attention",
    devices=_CUDA,
    allocates=True,
    priority=2,
    supports=_flash_attends,
)
def flash_attention(
    out: None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    heads: int,
    scale: float,
) -> torch.Tensor:
    """FlashAttention also where PyTorch would prefer another."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return _attend(query, key, value, heads, scale)


@kernel("concat", name="torch.cat", devices=_CUDA)
def concat(out: torch.Tensor, *pairs: torch.Tensor | None) -> torch.Tensor:
    """Parts that bring a residual are added straight into their place."""
    parts, residuals = [part for part in pairs[::2] if part is not None], pairs[1::2]
    if all(residual is None for residual in residuals):
        torch.cat(parts, dim=-1, out=out)
        return out
    start = 0
    for part, residual in zip(parts, residuals, strict=True):
        place = out.narrow(-1, start, part.shape[-1])
        if residual is None:
            place.copy_(part)
        else:
            torch.add(part, residual, out=place)
        start += part.shape[-1]
    return out


@kernel("concat_group_norm", name="torch.concat_group_norm", devices=_CUDA)
def concat_group_norm(
    out: torch.Tensor, *tensors: torch.Tensor, groups: int, eps: float, activation: str
) -> torch.Tensor:
    """As many passes as PyTorch takes for the one and then the other."""
    *pairs, weight, bias = tensors
    image = concat(out[0], *pairs)
    group_norm(out[1], image, weight, bias, groups=groups, eps=eps, activation=activation)
    return out


@kernel("upsample_nearest", name="torch.upsample_nearest2d", devices=_CUDA)
def upsample_nearest(out: torch.Tensor, x: torch.Tensor, *, size: tuple[int, int]) -> torch.Tensor:
    """PyTorch's kernel writes channels-last where input and output are."""
    torch.ops.aten.upsample_nearest2d.out(
        x.permute(0, 3, 1, 2), size, None, None, out=out.permute(0, 3, 1, 2)
    )
    return out


@kernel("silu", name="torch.silu", devices=_CUDA)
def silu(out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """One pass, as eager runs it."""
    torch.ops.aten.silu.out(x, out=out)
    return out


@kernel("gelu", name="torch.gelu", devices=_CUDA)
def gelu(out: torch.Tensor, x: torch.Tensor, *, approximate: str = "none") -> torch.Tensor:
    """One pass, as eager runs it."""
    torch.ops.aten.gelu.out(x, approximate=approximate, out=out)
    return out


@kernel("add", name="torch.add", devices=_CUDA)
def add(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """One pass, as eager runs it."""
    return torch.add(a, b, out=out)


@kernel("mul", name="torch.mul", devices=_CUDA)
def mul(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """One pass, as eager runs it."""
    return torch.mul(a, b, out=out)


@kernel("cast", name="torch.copy", devices=_CUDA)
def cast(out: torch.Tensor, x: torch.Tensor, *, dtype: torch.dtype) -> torch.Tensor:
    """A copy converts."""
    return out.copy_(x)


@kernel("residual_add", name="torch.residual_add", devices=_CUDA)
def residual_add(
    out: torch.Tensor, x: torch.Tensor, residual: torch.Tensor | None, **attrs: Any
) -> torch.Tensor:
    """The sum; without a residual there is no step."""
    assert residual is not None, "without a residual the plan drops this step"
    return torch.add(x, residual, out=out)
