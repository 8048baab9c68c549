"""What every test of kernels shares."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest


class _WithoutTriton(pytest.Module):
    """A test file that cannot be imported where there is no Triton."""

    def collect(self) -> Any:
        pytest.skip("needs triton (triton-windows on Windows)", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: Any) -> pytest.Module | None:
    """Leave the files of this folder unread without Triton."""
    return _WithoutTriton.from_parent(parent, path=module_path) if _MISSING else None


_MISSING = find_spec("triton") is None


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


@pytest.fixture(autouse=True)
def products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of bfloat16 numbers; Triton's interpreter multiplies their bits, as integers."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    builder = interpreter.InterpreterBuilder
    dot = builder.create_dot

    def wide(value: Any) -> Any:
        if str(value.dtype.scalar) != "bf16":
            return value
        bits = value.data.astype("uint32") << 16
        return interpreter.TensorHandle(bits.view("float32"), interpreter.tl.float32)

    def product(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, wide(a), wide(b), *rest)

    monkeypatch.setattr(builder, "create_dot", product)
