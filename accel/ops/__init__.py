"""Fused operators: schema, shape rule, eager reference, flops. Images are `[B, H, W, C]`."""

from .attention import attention
from .concat import concat
from .conv import conv2d
from .linear import linear
from .norm import add_layer_norm, concat_group_norm, group_norm, layer_norm
from .pointwise import add, cast, gelu, mul, pointwise, residual_add, silu
from .registry import OPS, Op, aten_arguments, aten_name, get, of
from .upsample import upsample_nearest
from .view import expand, permute, reshape, result, slice_dim

__all__ = [
    "OPS",
    "Op",
    "add",
    "add_layer_norm",
    "aten_arguments",
    "aten_name",
    "attention",
    "cast",
    "concat",
    "concat_group_norm",
    "conv2d",
    "expand",
    "gelu",
    "get",
    "group_norm",
    "layer_norm",
    "linear",
    "mul",
    "of",
    "permute",
    "pointwise",
    "reshape",
    "residual_add",
    "result",
    "silu",
    "slice_dim",
    "upsample_nearest",
]
