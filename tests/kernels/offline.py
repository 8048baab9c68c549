"""Compile the kernels for GPUs that are not here, and say what each variant needs.

    python tests/kernels/offline.py [--all] [--chips 75,90] [--kernels NAME,…] > variants.json

Runs in a process of its own, since the other tests of kernels run Triton's interpreter. The calls
are those of the shipped plans, so that nothing is compiled that no network needs. Without --all,
each kernel is compiled once for every kind of call (which optional tensors are there, which
activation) with its first configuration, for chips that differ little from another one only once,
and once in each of its forms (persistent or not, sums split or not, …); with it, every
configuration of every call.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import torch  # noqa: E402
import triton  # noqa: E402
from harness import CHIPS, calls_of, chip  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from accel import kernels  # noqa: E402
from accel.kernels import Call, Config, Launch, TensorSpec  # noqa: E402
from accel.kernels.lowrank import add_products  # noqa: E402
from accel.kernels.nvrtc import CudaLaunch  # noqa: E402
from accel.tuning.compiling import launches_of  # noqa: E402

NETWORKS = (("sd15", 64, 64, 1), ("sd15-controlnet", 64, 64, 1), ("sdxl", 128, 128, 1))
"""Family, height and width of the latent, and in how many packs of 77 tokens the prompt comes."""

ALIKE = ((8, 6), (8, 9), (10, 0))
"""Chips whose code is made as for sm_80 or sm_90, but for limits."""

SAME = ((8, 6), (8, 9))
"""Of those the ones for which every form is made alike too."""

WEIGHTS = "weights"
"""The name of what is launched beside the registered kernels."""

BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def kind_of(call: Call) -> str:
    """What makes one call of an operator another piece of code than the next."""
    present = "".join("-" if spec is None else "x" for spec in call.tensors)
    named = ("activation", "stride")
    attrs = [str(call.attrs[name]) for name in named if name in call.attrs]
    upsampled = "up" if call.attrs.get("upsample") else ""
    shapes = [spec.shape for spec in call.tensors if spec is not None]
    narrow = [str(size <= 16) for size in (shapes[0][-1], call.out.shape[-1], call.out.rows)]
    other: list[str] = []
    if call.op in ("group_norm", "concat_group_norm"):  # small images have a scheme of their own
        other = [str(shapes[0][-2] <= 16)]
    elif call.op == "attention":  # a head's width, and whether the keys are the prompt's
        other = [str(call.out.shape[-1] // call.attrs["heads"]), str(shapes[0] == shapes[1])]
    return " ".join([call.op, present, *attrs, upsampled, *narrow, *other])


def form_of(config: Config) -> tuple[Any, ...]:
    """What makes one configuration another piece of code than the next, sizes of tiles apart."""
    return tuple(
        value if isinstance(value, (str, bool)) else value > (name in ("split", "parts"))
        for name, value in sorted(config.items())
        if isinstance(value, (str, bool)) or name in ("programs", "tail_n", "split", "parts")
    )


def other_calls() -> Iterator[Call]:
    """Calls of operators that networks beside the shipped ones may make."""
    image = TensorSpec.of(torch.empty(2, 64, 64, 320, dtype=torch.float16, device="meta"))
    large = TensorSpec.of(torch.empty(2, 128, 128, 320, dtype=torch.float16, device="meta"))
    for op in ("add", "mul"):
        yield Call(op, image, (image, image))
    yield Call("gelu", image, (image,), {"approximate": "none"})
    yield Call("cast", image, (image,), {"dtype": torch.float16})
    yield Call("upsample_nearest", large, (image,), {"size": (128, 128)})


def variants(every: bool, names: set[str], chips: Sequence[tuple[int, int]]) -> Iterator[Any]:
    """(chip, kernel, configuration, launch) of all that is to be compiled, each code once."""
    found = {call.key: call for call in other_calls()}
    for family, height, width, packs in NETWORKS:
        for optional in (False, True):
            for call in calls_of(family, height, width, packs, optional=optional):
                found[call.key if every else kind_of(call)] = call
    seen = set()
    for capability in chips:
        if not names or WEIGHTS in names:
            for which, launch in weights_launches(capability):
                yield capability, WEIGHTS, {}, which, launch
        taken: set[str] = set()
        forms: set[Any] = set()
        for call in found.values():
            if capability not in ALIKE:
                taken = set()
            for kernel, config in kernels.candidates(call, chip(capability)):
                if kernel.launches is None or (names and kernel.name not in names):
                    continue
                form = (kernel.name, form_of(config))
                known = kernel.name in taken and (capability in SAME or form in forms)
                if not every and known:
                    continue
                taken.add(kernel.name)
                forms.add(form)
                for launch in launches_of(kernel, config, call):
                    code = (capability, kernel.name, launch.key())
                    if code not in seen:
                        seen.add(code)
                        yield capability, kernel.name, dict(config), call.key, launch


def weights_launches(capability: tuple[int, int]) -> Iterator[tuple[str, Launch]]:
    """What is launched beside the operators: LoRAs put on, in arenas of every dtype."""
    some = torch.empty(8, 8, dtype=torch.int64, device="meta")
    tables = (some.to(torch.int32), some, some, some.to(torch.float32))
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        arena = torch.empty(64, dtype=dtype, device="meta")
        yield str(dtype), add_products(*tables, arena, arena, capability < (8, 0))


def compile_one(capability: tuple[int, int], launch: Launch | CudaLaunch) -> dict[str, Any]:
    """Shared memory, registers, spilled bytes and tensor-core instructions of one variant."""
    return (
        compile_cuda(launch)
        if isinstance(launch, CudaLaunch)
        else compile_triton(capability, launch)
    )


def compile_cuda(launch: CudaLaunch) -> dict[str, Any]:
    code = launch.compile()
    found = usage(code)
    with_instructions = tool("-sass", code)
    return {
        "shared": launch.shared + found["SHARED"],
        "registers": found["REG"],
        "threads": launch.threads,
        "spilled": found["LOCAL"] + found["STACK"],
        "tensor_cores": "wgmma" if "HGMMA" in with_instructions else None,
        "dots": True,
        "vector": "UTMALDG" in with_instructions,
    }


def usage(code: bytes) -> dict[str, int]:
    """What a block of it needs."""
    found = re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", tool("--dump-resource-usage", code))
    return {name: int(value) for name, value in found}


def tool(option: str, code: bytes) -> str:
    """What cuobjdump says of a cubin."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(code)
        command = [str(BINARIES / "cuobjdump"), option, str(cubin)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def compile_triton(capability: tuple[int, int], launch: Launch) -> dict[str, Any]:
    signature, constants, attributes = launch.specialise()
    source = ASTSource(launch.kernel, signature, constants, attributes)
    number = capability[0] * 10 + capability[1]
    target = GPUTarget("cuda", number, 32)
    compiled = triton.compile(source, target=target, options=dict(launch.options))
    ptx = compiled.asm["ptx"]
    found = usage(compiled.asm["cubin"])
    tensor_core = re.search(r"\b(wgmma|tcgen05\.mma|mma\.sync)", ptx)
    dots = re.search(r"tt\.dot|ttng\.warp_group_dot|ttng\.tc_gen5_mma", compiled.asm["ttgir"])
    return {
        "shared": compiled.metadata.shared,
        "registers": found["REG"],
        "threads": 32 * compiled.metadata.num_warps,
        "spilled": found.get("LOCAL", 0) + found.get("STACK", 0),
        "tensor_cores": tensor_core.group(1) if tensor_core else None,
        "dots": dots is not None,
        "vector": bool(re.search(r"ld\.global\S*\.v4|cp\.async|ld\.global\S*\.v2\.b64", ptx)),
    }


def function_of(launch: Launch | CudaLaunch) -> str:
    return launch.source if isinstance(launch, CudaLaunch) else launch.kernel.__name__


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--chips", default="")
    parser.add_argument("--kernels", default="")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    chips = [c for c in CHIPS if not options.chips or f"{c[0]}{c[1]}" in options.chips.split(",")]
    names = set(filter(None, options.kernels.split(",")))

    def one(variant: Any) -> dict[str, Any]:
        capability, kernel, config, call, launch = variant
        row = {"chip": f"{capability[0]}{capability[1]}", "kernel": kernel, "config": config}
        row |= {"call": call, "function": function_of(launch)}
        try:
            return row | compile_one(capability, launch)
        except Exception as error:
            return row | {"failed": f"{type(error).__name__}: {error}"[:500]}

    with ThreadPoolExecutor(options.threads) as threads:
        rows = list(threads.map(one, variants(options.all, names, chips)))
    json.dump(rows, sys.stdout)


if __name__ == "__main__":
    main()
