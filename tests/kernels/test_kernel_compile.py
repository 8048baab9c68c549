"""Every kernel of ours compiles for every GPU generation that it claims, without such a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from harness import CHIPS

import install
from accel.kernels import kernels, load_triton

REGISTERS = 64 << 10
"""Of one multiprocessor; a block must find place in it."""

OLDER_CHIPS = ("75", "89", "90")
"""That the older Triton compiles for."""

STACK = 64
"""Bytes a thread may keep outside its registers: a few values put aside once, or a descriptor."""


@pytest.fixture(scope="module", params=["installed", "older"])
def variants(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """What offline.py says of each variant. Compiled elsewhere: here the interpreter is on.

    With the Triton that is installed, and with an older one, for a chip of each kind.
    """
    script = Path(__file__).with_name("offline.py")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if request.param == "older":
        older = Path(os.environ.get("OLDER_TRITON", install.older_triton()))
        if not (older / "triton").is_dir():
            pytest.skip(f"there is no older Triton in {older}: install.py test puts one there")
        environment["PYTHONPATH"] = str(older)
    chips = ["--chips", ",".join(OLDER_CHIPS)] if request.param == "older" else []
    done = subprocess.run(
        [sys.executable, str(script), *chips], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-4000:]
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return rows


def named(rows: list[dict[str, Any]]) -> list[str]:
    fields = ("chip", "kernel", "config", "call", "shared", "registers", "spilled", "failed")
    return [str({name: row[name] for name in fields if name in row}) for row in rows]


def test_every_variant_compiles(variants: list[dict[str, Any]]) -> None:
    assert len(variants) > 100
    failed = [row for row in variants if "failed" in row]
    assert not failed, "\n".join(["", *named(failed)])


def test_every_kernel_was_compiled(variants: list[dict[str, Any]]) -> None:
    assert load_triton()
    registered = {kernel.name for kernel in kernels() if kernel.launches is not None}
    compiled: dict[str, set[str]] = {}
    for row in variants:
        compiled.setdefault(row["chip"], set()).add(row["kernel"])
    assert set(OLDER_CHIPS) <= compiled.keys() <= {f"{a}{b}" for a, b in CHIPS}
    assert compiled["90"] == registered | {"weights"}
    assert all("weights" in found for found in compiled.values())
    for chip in compiled.keys() - {"75", "90"}:
        older = {n for n in registered if n.startswith("triton.") and "tma" not in n}
        assert compiled[chip] >= older, chip
    assert compiled["75"] >= {"triton.group_norm", "triton.layer_norm", "triton.gemv"}


def test_every_variant_fits_its_chip(variants: list[dict[str, Any]]) -> None:
    limits = {f"{a}{b}": shared for (a, b), (_, shared, _) in CHIPS.items()}
    large = [row for row in variants if row["shared"] > limits[row["chip"]]]
    crowded = [row for row in variants if row["registers"] * row["threads"] > REGISTERS]
    assert not large and not crowded, "\n".join(["", *named(large + crowded)])


def test_no_loop_spills_its_registers(variants: list[dict[str, Any]]) -> None:
    spilled = [row for row in variants if row["spilled"] > STACK]
    assert not spilled, "\n".join(["", *named(spilled)])


def test_matrix_products_run_on_tensor_cores(variants: list[dict[str, Any]]) -> None:
    # Weights are summed in float32 proper, which no tensor core does.
    dots = [row for row in variants if row["dots"] and row["kernel"] != "weights"]
    assert dots and not [row for row in dots if row["chip"] == "75"]
    wrong = [row for row in dots if row["tensor_cores"] is None]
    assert not wrong, "\n".join(["", *named(wrong)])
    assert {row["tensor_cores"] for row in dots if row["chip"] == "89"} == {"mma.sync"}
    assert "wgmma" in {row["tensor_cores"] for row in dots if row["chip"] == "90"}
