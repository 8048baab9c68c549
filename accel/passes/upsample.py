"""Up-sampling done where a convolution reads its pixels: the large image is never written."""

from __future__ import annotations

from torch.fx import Graph

from .. import ops
from . import ir


def fold_upsample(graph: Graph) -> None:
    """Fold `upsample_nearest` into the convolution that alone reads it, as its image."""
    for node in ir.calls(graph, ops.upsample_nearest):
        reader = ir.only_user(node)
        if not ir.is_call(reader, ops.conv2d) or ir.source(reader) is not node:
            continue
        if reader.kwargs.get("upsample") is None:
            reader.args = (ir.source(node), *reader.args[1:])
            reader.kwargs = {**reader.kwargs, "upsample": ir.attribute(node, "size")}
            graph.erase_node(node)
