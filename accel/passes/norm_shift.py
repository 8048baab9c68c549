"""What a convolution adds to every pixel alike, added by the GroupNorm that reads its result.

A norm has each element in hand in float32, so that the addends cost it nothing, while a bare
convolution is what every library runs fastest: most have no epilogue, and pass over memory again.
"""

from __future__ import annotations

from torch.fx import Graph

from .. import ops
from . import ir


def fuse_norm_shift(graph: Graph) -> None:
    """Move bias and time embedding from `conv2d` to `group_norm`, where that is its only reader.

    With a residual they stay: the sum is what others read of it, and it is added in one go.
    """
    for norm in ir.calls(graph, ops.group_norm):
        x, weight, bias, *addends = ir.tensors(norm)
        if any(addends) or not ir.is_call(x, ops.conv2d) or ir.only_user(x) is not norm:
            continue
        image, filters, offset, shift, residual = ir.tensors(x)
        if residual is not None or (offset is None and shift is None):
            continue
        with graph.inserting_before(x):
            bare = ir.emit(graph, ops.conv2d, [image, filters, None, None, None], x.kwargs, like=x)
        ir.replace(x, bare)
        norm.args = (bare, weight, bias, shift, offset)
