"""Checkpoints and a LoRA by ComfyUI's own loader and patcher, for `benchmarks.swaps` to start.

    python -m benchmarks.swaps_comfyui COMFYUI --lora FILE [--model sdxl] [--cpu] FILE...

Without its server and without dynamic VRAM, so that the weights are in place once ComfyUI's manager
has loaded them. A LoRA's file is read beforehand, as its loader node keeps the last one. Writes a
row a line, as JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .comfyui import import_main

if TYPE_CHECKING:  # nothing here may import torch before ComfyUI, which chooses its allocator
    from accel.bench.networks import Case

LORA_ROUNDS = 3

Row = dict[str, Any]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("comfyui", type=Path)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--lora", type=Path, required=True)
    parser.add_argument("--model", default="sdxl")
    parser.add_argument("--size", default="1024x1024")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--cpu", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        measure(arguments, Path(scratch))


def measure(arguments: argparse.Namespace, scratch: Path) -> None:
    """Start ComfyUI in this process, and print its rows."""
    sys.argv = ["main.py", "--disable-all-custom-nodes", "--user-directory", str(scratch)]
    known = (arguments.comfyui / "comfy" / "cli_args.py").read_text(encoding="utf-8")
    if "--disable-dynamic-vram" in known:  # an older one has none
        sys.argv.append("--disable-dynamic-vram")
    if arguments.cpu:
        sys.argv.append("--cpu")
    import_main(arguments.comfyui)
    import torch

    from accel.bench.networks import case_of

    width, height = map(int, arguments.size.split("x"))
    case = case_of(arguments.model, (width, height), arguments.batch)
    with torch.inference_mode():
        for row in rows(case, arguments.files, arguments.lora):
            print(json.dumps(row), flush=True)


def rows(case: Case, files: Sequence[Path], lora_file: Path) -> Iterator[Row]:
    """Each file into place in turn; then the LoRA on the last one, stronger, off."""
    import comfy.sd
    import comfy.utils
    import comfyui_version
    import torch
    from comfy import model_management as management

    from accel.bench.timing import seconds

    device = management.get_torch_device()
    model: Any = None

    def load(path: Path) -> None:
        nonlocal model
        model = comfy.sd.load_diffusion_model(str(path))
        management.load_models_gpu([model], force_full_load=True)

    def change(lora: Any, strength: float) -> Any:
        """The MODEL with the LoRA, in place; without, for strength 0."""
        patched = model
        if strength:
            patched, _ = comfy.sd.load_lora_for_models(model, None, lora, strength, 0.0)
            assert patched.patches, "the LoRA fits none of the model's parameters"
        management.load_models_gpu([patched], force_full_load=True)
        return patched

    def step() -> None:
        """A call of the denoiser at the case's size, by the MODEL that is in place."""
        size = (case.batch, case.config.in_channels, case.height // 8, case.width // 8)
        given = {"c_crossattn": torch.randn(case.batch, 77, case.config.context_dim)}
        if case.config.pooled_dim:
            given["y"] = torch.randn(case.batch, case.config.pooled_dim)
        given = {name: value.to(device) for name, value in given.items()}
        times = torch.ones(case.batch, device=device)
        model.model.apply_model(torch.randn(size).to(device), times, **given)

    def timed(changes: Sequence[Callable[[], Any]]) -> tuple[list[float], list[float]]:
        times, firsts = [], []
        for one in changes:
            times.append(seconds(one, device) * 1e3)
            firsts.append(seconds(step, device) * 1e3)
        return times, firsts

    def row(operation: str, times: Sequence[float], firsts: Sequence[float], **facts: Any) -> Row:
        return {
            "variant": "comfyui",
            "operation": operation,
            "ms": statistics.median(times),
            "ms_min": min(times),
            "ms_max": max(times),
            "first_step_ms": statistics.median(firsts),
            "comfyui": comfyui_version.__version__,
            "dynamic_vram": False,
            **facts,
        }

    load(files[0])  # what is imported and set up once
    step()
    times, firsts = [], []
    for path in files:
        model = None  # as when a loader node's result goes
        management.cleanup_models_gc()
        one, first = timed([lambda path=path: load(path)])
        times, firsts = times + one, firsts + first
    yield row("checkpoint_file", times, firsts, tier="page cache")

    lora = comfy.utils.load_torch_file(str(lora_file), safe_load=True)
    found: dict[str, tuple[list[float], list[float]]] = {}
    for _ in range(LORA_ROUNDS):
        for operation, strength in (("lora_on", 0.8), ("lora_strength", 0.3), ("lora_off", 0.0)):
            one, first = timed([lambda strength=strength: change(lora, strength)])
            own = found.setdefault(operation, ([], []))
            own[0].extend(one)
            own[1].extend(first)
    for operation, (times, firsts) in found.items():
        yield row(operation, times, firsts, tier="RAM", loras=1, factors="RAM")


if __name__ == "__main__":
    main()
