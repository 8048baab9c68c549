"""The benchmark of swaps, in small on the CPU: its rows, and that what it times is right."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import two_levels

from accel.bench.networks import Case
from benchmarks import swaps

CPU = torch.device("cpu")
LIMITS = {"matmul_tflops": 0.1, "copy_tbps": 0.01, "h2d_gbps": None}


@pytest.fixture(scope="module")
def case() -> Case:
    return Case("tiny", two_levels(), 64, 64, batch=1, precision="fp32")


def test_every_figure_has_its_row(
    case: Case, small_plans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    for name, value in {"SWAPS": 4, "FORWARDS": 1, "ROUNDS": 1, "LORA_ROUNDS": 1}.items():
        monkeypatch.setattr(swaps, name, value)
    monkeypatch.setenv("SWITCHYARD_CACHE_DIR", str(small_plans))
    parts = set(swaps.PARTS) - {"comfyui", "audition"}
    found: dict[tuple[Any, ...], Any] = {
        (row["variant"], row["operation"], row.get("tier"), row.get("loras")): row
        for row in swaps.measure(case, CPU, tmp_path, LIMITS, checkpoints=2, parts=parts)
    }
    assert all(row["tier"] for row in found.values())
    tiers = ("page cache", "pinned RAM", "device")
    operations = ("checkpoint_file", "checkpoint_pinned", "checkpoint_seat")
    for operation, tier in zip(operations, tiers, strict=True):
        row = found["engine", operation, tier, None]
        assert row["bytes"] > 1 << 20 and 0 < row["ms_min"] <= row["ms"] <= row["ms_max"]
        assert row["limit_ms"] > 0 and row["must_ms"] > 0 and row["first_step_ms"] > 0
    assert found["engine", "checkpoint_seat", "device", None]["waiting"] == 2
    assert found["engine", "checkpoint_pinned", "pinned RAM", None]["waiting"] == 2
    for tier in tiers[1:]:
        whole = found["engine", operations[0], tiers[0], None]["bytes"]
        for operation, count in (
            *(("lora_on", 1), ("lora_strength", 1), ("lora_off", 1), ("lora_on", 5)),
        ):
            assert 0 < found["engine", operation, tier, count]["bytes"] < whole, "only what changes"
    assert found["engine", "lora_schedule", "device", 1]["bytes"] > 0
    for operation in ("mix", "add_difference"):
        assert found["engine", operation, "page cache", None]["bytes"] == whole
    first = found["engine", "lora_first_on", "device", 1]
    assert first["factors"] == "page cache" and first["ms"] > 0
    for tier in ("device", "pinned RAM"):
        row = found["engine", "step_beside_prefetch", tier, None]
        assert row["waiting"] == 1, "the other checkpoint was fetched while steps ran"
        assert row["ms"] > 0 and row["alone_ms"] > 0
        assert row["held"] == (row["ms"] <= 1.03 * row["alone_ms"])
    after = found["engine", "forward_after_swaps", "device", None]
    assert after["equal"] is True and after["pool"]["events"]["hits_cpu"] > 0
    for operation, tier, count in (
        ("checkpoint_file", "page cache", None),
        ("lora_on", "device", 1),
        ("lora_off", "device", 1),
    ):
        assert found["diffusers", operation, tier, count]["ms"] > 0


def test_a_row_comes_as_soon_as_it_is_measured(
    case: Case, small_plans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SWITCHYARD_CACHE_DIR", str(small_plans))
    monkeypatch.setattr(swaps, "FORWARDS", 1)
    row = swaps.Bench.row

    def late(self: swaps.Bench, operation: str, *rest: Any, **facts: Any) -> swaps.Row:
        if operation == "checkpoint_pinned":
            raise TimeoutError(operation)
        return row(self, operation, *rest, **facts)

    monkeypatch.setattr(swaps.Bench, "row", late)
    found = []
    with pytest.raises(TimeoutError):
        for one in swaps.measure(case, CPU, tmp_path, LIMITS, checkpoints=1):
            found.append(one["operation"])
    assert found == ["checkpoint_file"]


def test_parts_are_chosen_on_the_command_line() -> None:
    def parts(*, model: str = "sdxl", comfyui: Path | None = None, **given: Any) -> list[str]:
        wanted = {"only": None, "only_loras": False, "skip_diffusers": False} | given
        return swaps.chosen(Namespace(model=model, comfyui=comfyui, **wanted))

    everything = [part for part in swaps.PARTS if part != "comfyui"]
    assert parts() == everything
    assert parts(comfyui=Path("there")) == list(swaps.PARTS)
    assert parts(skip_diffusers=True) == [part for part in everything if part != "diffusers"]
    assert parts(only_loras=True) == ["loras", "schedule", "forwards"]
    assert parts(only="forwards,prefetch") == ["prefetch", "forwards"]
    with pytest.raises(SystemExit, match="prefetches"):
        parts(only="prefetches")
