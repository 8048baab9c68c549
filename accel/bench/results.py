"""The file of a benchmark: one JSON object, to which further runs on the same machine add rows."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import InvalidFile, InvalidInput
from .machine import UNKNOWN

Document = dict[str, Any]
"""`{"meta": …, "ceilings": …, "rows": […]}`, and "ops" where tables of operators were asked for.

Rows of one `run` were measured together; `meta["runs"]` has each run's command, date and ceilings.
"""

SAME = ("gpu", "driver", "torch", "triton", "cudnn", "commit")
"""What runs in one file have in common."""

CASE = ("run", "model", "width", "height", "batch", "controlnets", "loras", "precision")
"""What the rows of one comparison, and its table of operators, have in common."""


def new_document(machine: Mapping[str, Any], note: str) -> Document:
    """A document without rows. machine: `meta` and `ceilings` of the run."""
    meta, ceilings = dict(machine["meta"]), machine["ceilings"]
    meta["note"] = note
    meta["runs"] = [_run(meta, ceilings)]
    return {"meta": meta, "ceilings": ceilings, "rows": []}


def appended(old: Document, machine: Mapping[str, Any], path: Path) -> Document:
    """`old` with another run in it, as yet without rows.

    Raises `InvalidInput` unless both are of the same machine, software and commit.
    """
    meta, before = machine["meta"], old["meta"]
    for name in SAME:
        if before.get(name) != meta.get(name):
            raise InvalidInput(
                f"{path} is of {name} {before.get(name)}, this run of {meta.get(name)}: "
                "leave --append out, or give another --out"
            )
    if meta["commit"] == UNKNOWN:
        raise InvalidInput(f"{path}: rows are only added to a known commit: give --commit")
    runs = before.get("runs") or [_run(before, old["ceilings"])]
    rows = [{"run": 0, **row} for row in old["rows"]]
    merged = {**before, "runs": [*runs, _run(meta, machine["ceilings"])]}
    return {**old, "meta": merged, "rows": rows}


def _run(meta: Mapping[str, Any], ceilings: Mapping[str, Any]) -> dict[str, Any]:
    return {"command": meta["command"], "date": meta["date"], "ceilings": dict(ceilings)}


def case_key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Equal for rows that were measured together, and for their table of operators."""
    return tuple(row.get(name) for name in CASE)


def title(row: Mapping[str, Any]) -> str:
    """What a row or a table is about, in words."""
    return " + ".join([f"{row['model']} {row['width']}x{row['height']}", *extras(row)])


def extras(row: Mapping[str, Any]) -> list[str]:
    """What runs beside the UNet, in words."""
    count = row["controlnets"]
    found = [f"{count} ControlNet" + ("s" if count > 1 else "")] if count else []
    return found + (["LoRA"] if row["loras"] else [])


def load(path: Path) -> Document:
    """A document from a file. Raises `InvalidFile` for what is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InvalidFile(f"{path} does not exist") from None
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InvalidFile(f"{path} is no JSON file of the benchmark: {reason}") from None
    parts = {"meta": dict, "ceilings": dict, "rows": list}
    if not isinstance(data, dict) or not all(
        isinstance(data.get(name), kind) for name, kind in parts.items()
    ):
        raise InvalidFile(f"{path} is no file of the benchmark: it lacks meta, ceilings or rows")
    return data


def save(document: Document, path: Path) -> None:
    """Write a document, whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(part, path)
