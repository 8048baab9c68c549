"""One launch of a Triton kernel as data: it can be run, captured, compiled ahead, or looked at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_GPU_ONLY = ("launch_cooperative_grid", "launch_pdl")
"""Options of a launch that the interpreter, which runs block after block, does not know."""


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

    def warm(self) -> None:
        """Compile for the current GPU, or fetch from Triton's cache, without launching."""
        if interpreted(self.kernel):
            return
        compiled = self.kernel.warmup(**self.args, grid=self.grid, **self.options)
        # Its launcher is compiled, and the code brought to the GPU, at the first use; this is one.
        prepare = getattr(compiled, "_init_handles", None)
        if prepare is not None:
            prepare()


def interpreted(kernel: Any) -> bool:
    """Whether Triton's interpreter runs the kernel (TRITON_INTERPRET=1)."""
    return type(kernel).__name__ == "InterpretedFunction"
