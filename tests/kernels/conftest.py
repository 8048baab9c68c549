"""What every test of kernels shares."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture(autouse=True)
def rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the nearest bfloat16, as on every GPU; Triton's interpreter cuts off."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    convert = interpreter._convert_float

    def nearest(data: Any, source: Any, target: Any, mode: Any) -> Any:
        if str(source) != "fp32" or str(target) != "bf16":
            return convert(data, source, target, mode)
        bits = data.view("uint32").astype("uint64")
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("uint16")

    monkeypatch.setattr(interpreter, "_convert_float", nearest)
