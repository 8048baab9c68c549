"""PyTorch's own CUDA libraries (cuBLAS, cuDNN, its attention), writing into planned buffers.

Not faster than eager PyTorch by itself; it saves the passes that fused operators make unnecessary,
and it is what other kernels have to beat.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from .registry import kernel

_CUDA = ("cuda",)


@kernel("linear", name="cublas.linear", devices=_CUDA)
def linear(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    *,
    activation: str,
) -> torch.Tensor:
    """The bias rides in cuBLASLt's epilogue; GEGLU and the residual are passes of their own."""
    rows = x.reshape(-1, x.shape[-1])
    target = out.view(-1, out.shape[-1]) if activation == "none" else None
    if bias is None:
        product = torch.mm(rows, weight.t(), out=target)
    else:
        product = torch.addmm(bias, rows, weight.t(), out=target)
    if activation == "geglu":
        hidden, gate = product.chunk(2, dim=-1)
        torch.mul(hidden, F.gelu(gate), out=out.view(-1, out.shape[-1]))
    return out if residual is None else out.add_(residual)


def _tf32_allowed() -> bool:
    """Whether the host lets cuDNN round float32 to TF32, in whichever of PyTorch's two settings."""
    try:
        return torch.backends.cudnn.allow_tf32
    except RuntimeError:  # the host has used the newer setting, and the older cannot be read then
        return torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]


@kernel("conv2d", name="cudnn.conv2d", devices=_CUDA)
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
) -> torch.Tensor:
    """cuDNN's own choice of algorithm; bias and time embedding are added in one pass.

    Trying all algorithms was no faster on an H100, and cost seconds at the first image and at each
    new size.
    """
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
    if embedding is not None:
        embedding = embedding[:, None, None, :]
        out.add_(embedding if bias is None else embedding + bias)
    elif bias is not None:
        out.add_(bias)
    return out if residual is None else out.add_(residual)


@kernel("group_norm", name="torch.group_norm", devices=_CUDA)
def group_norm(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    groups: int,
    eps: float,
    activation: str,
) -> torch.Tensor:
    """PyTorch's norm makes a channels-first result; the activation's pass puts it back in order."""
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
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    result = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return result.transpose(1, 2).flatten(2)


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
