"""Calls from their keys: a profile keeps the text alone, the performance model needs the sizes."""

from __future__ import annotations

import re
from math import prod
from typing import Any

import torch

from ..kernels.registry import Call, TensorSpec

_DTYPES = {
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "f32": torch.float32,
    "f64": torch.float64,
    "i64": torch.int64,
    "i32": torch.int32,
}
_CALL = re.compile(r"(\w+)\((.*?)\) -> (\S+)(?: (.*))?")
_TENSOR = re.compile(r"([\dx]+):([a-z]+\d+)(?:@([\d,]+))?(!?)(c?)")


def call_of(key: str) -> Call:
    """The call that has this key, as far as the key tells: rows may be one dimension.

    Raises ValueError for a text that is none.
    """
    match = _CALL.fullmatch(key)
    if match is None:
        raise ValueError(f"{key[:80]!r} is no call's key")
    op, tensors, out, attrs = match.groups()
    specs = [None if text == "-" else _tensor(text) for text in tensors.split()]
    made = _tensor(out)
    named = (item.partition("=") for item in (attrs or "").split())
    return Call(op, made, tuple(specs), {name: _value(text) for name, _, text in named})


def _tensor(text: str) -> TensorSpec:
    match = _TENSOR.fullmatch(text)
    if match is None:
        raise ValueError(f"{text[:80]!r} is no tensor of a call's key")
    sizes, dtype, strides, odd, constant = match.groups()
    if dtype not in _DTYPES:
        raise ValueError(f"{dtype!r} is no dtype of a call's key")
    shape = tuple(int(size) for size in sizes.split("x"))
    stride = tuple(prod(shape[place + 1 :]) for place in range(len(shape)))
    if strides:
        given = tuple(int(step) for step in strides.split(","))
        # One number: from row to row, which is all there is of two dimensions.
        stride = (*given, 1) if len(given) == 1 and len(shape) == 2 else given
    if len(stride) != len(shape):
        raise ValueError(f"{text[:80]!r} has other strides than sizes, in a call's key")
    return TensorSpec(shape, stride, _DTYPES[dtype], not odd, bool(constant))


def _value(text: str) -> Any:
    if text.startswith("("):
        return tuple(_value(item) for item in text[1:-1].split(",") if item)
    if text in ("True", "False", "None"):
        return {"True": True, "False": False, "None": None}[text]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
