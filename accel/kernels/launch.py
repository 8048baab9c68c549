"""One launch of a Triton kernel as data: it can be run, captured, compiled ahead, or looked at."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

_GPU_ONLY = ("launch_cooperative_grid", "launch_pdl")
"""Options of a launch that the interpreter, which runs block after block, does not know."""


_POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Launch:
    """`kernel[grid](**args, **options)`.

    kernel: a `@triton.jit` function. args: by parameter name: tensors, tensor descriptors, numbers,
    constexprs. options: num_warps, num_stages and other options of Triton's launcher.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)

    def run(self) -> None:
        """Launch on the current stream (in the interpreter: run now)."""
        options = self.options
        if interpreted(self.kernel):
            options = {name: value for name, value in options.items() if name not in _GPU_ONLY}
        self.kernel[self.grid](**self.args, **options)

    def compile(self) -> Any:
        """Triton's compiled kernel for the current GPU, from its cache if it is there."""
        return self.kernel.warmup(**self.args, grid=self.grid, **self.options)

    def store(self) -> None:
        """Compile into Triton's cache on disk, for another process."""
        from triton.backends.nvidia.driver import CudaLauncher

        compiled = self.compile()
        with contextlib.suppress(Exception):  # C code to some versions, which they keep there too
            CudaLauncher(compiled.src, compiled.metadata)

    def warm(self) -> None:
        """Compile, and bring the code to the GPU, which is else done at the first launch."""
        if interpreted(self.kernel):
            return
        prepare = getattr(self.compile(), "_init_handles", None)
        if prepare is not None:
            prepare()

    def specialise(self) -> tuple[dict[str, str], dict[Any, Any], dict[Any, Any]]:
        """Signature, constexprs and attributes, as Triton finds them from aligned arguments."""
        signature, constants, attributes = {}, {}, {}
        for index, param in enumerate(self.kernel.params):
            if param.name not in self.args:  # left to its default
                signature[param.name], constants[(index,)] = "constexpr", param.default
                continue
            value = self.args[param.name]
            fixed = param.do_not_specialize
            one = type(value) is int and value == 1 and not fixed
            if param.is_constexpr or value is None or one:
                signature[param.name], constants[(index,)] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[param.name] = _POINTERS[value.dtype]
                attributes[(index,)] = [["tt.divisibility", 16]]
            elif hasattr(value, "block_shape"):
                name = _POINTERS[value.base.dtype].removeprefix("*")
                signature[param.name] = f"tensordesc<{name}{list(value.block_shape)}>"
            elif isinstance(value, bool):
                signature[param.name] = "u1"
            elif isinstance(value, int):
                signature[param.name] = "i32" if abs(value) < 2**31 else "i64"
                if value % 16 == 0 and not fixed:
                    attributes[(index,)] = [["tt.divisibility", 16]]
            else:
                signature[param.name] = "fp32"
        return signature, constants, attributes

    def key(self) -> str:
        """What makes it another piece of code than a second launch's."""
        source = getattr(self.kernel, "cache_key", self.kernel.__name__)  # interpreted: a name
        return repr((source, *self.specialise(), sorted(self.options.items())))


def interpreted(kernel: Any) -> bool:
    """Whether Triton's interpreter runs the kernel (TRITON_INTERPRET=1)."""
    return type(kernel).__name__ == "InterpretedFunction"


def cdiv(dividend: int, divisor: int) -> int:
    """The quotient, rounded up. Triton's, which kernels may call too, takes ten times as long."""
    return -(-dividend // divisor)


def next_power_of_2(number: int) -> int:
    """The least that is not smaller; of nothing 1. Triton's takes longer, as that of `cdiv`."""
    return 1 << max(0, number - 1).bit_length()


def pretend(capability: tuple[int, int]) -> None:
    """Let Triton compile, in this process, for a GPU of that capability, which need not be here."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    target = GPUTarget("cuda", capability[0] * 10 + capability[1], 32)
    stand_in: Any = SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
    )
    driver.set_active(stand_in)


def cache_token() -> str | None:
    """A name for Triton's cache on disk, another one once it was cleared; None if it has none."""
    try:
        from triton import knobs

        folder = Path(knobs.cache.dir)
    except (ImportError, AttributeError):
        default = Path.home() / ".triton" / "cache"
        folder = Path(os.environ.get("TRITON_CACHE_DIR") or default)
    place = folder / "switchyard.token"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError), place.open("x") as file:
            file.write(secrets.token_hex(8))
        return place.read_text()
    except OSError:
        return None
