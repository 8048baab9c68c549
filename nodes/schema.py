"""Schemas of nodes for every version of the host."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from comfy_api.latest import io


def schema(**given: Any) -> io.Schema:
    """The host's schema, without the fields that an older host does not know."""
    known = {field.name for field in fields(io.Schema)}
    return io.Schema(**{name: value for name, value in given.items() if name in known})
