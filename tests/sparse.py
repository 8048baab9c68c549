"""Files of full-size networks that take no room: a true header, and data that is one hole."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path

from accel.models import FAMILIES, parameters


def sparse_file(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Path:
    """A .safetensors of fp16 zeros with these tensors; returns `path`."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * prod(shape)
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return path


def ldm_shapes(family: str, prefix: str = "") -> dict[str, tuple[int, ...]]:
    """The tensors of a published family as single files name them."""
    config = next(entry.config for entry in FAMILIES if entry.name == family)
    return {prefix + entry.ldm_name: entry.shape for entry in parameters(config).values()}
