"""Make the plans that come with the pack: `python -m benchmarks.make_shipped_plans [FAMILY…]`.

Needs diffusers. Half a minute a family of SDXL's size; run it after any change of passes or schema.
"""

from __future__ import annotations

import argparse
import time

import torch
from diffusers import ControlNetModel, UNet2DConditionModel

from accel.compiler import SHIPPED, compile_network
from accel.models import FAMILIES, diffusers_kwargs
from accel.plan.schema import dumps
from accel.structure import structure_of


def main() -> None:
    """Capture each family on the `meta` device and write its plan."""
    names = [family.name for family in FAMILIES]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("family", nargs="*", help=", ".join(names))
    chosen = parser.parse_args().family or names
    if unknown := set(chosen) - set(names):
        parser.error(f"unknown family: {', '.join(sorted(unknown))}")
    SHIPPED.mkdir(parents=True, exist_ok=True)
    for family in FAMILIES:
        if family.name not in chosen:
            continue
        started = time.perf_counter()
        network = UNet2DConditionModel if family.config.kind == "unet" else ControlNetModel
        with torch.device("meta"):
            module = network(**diffusers_kwargs(family.config)).eval()
        plan = compile_network(structure_of(module), network)
        text = dumps(plan)
        (SHIPPED / f"{family.name}.json").write_text(text, encoding="utf-8")
        seconds = time.perf_counter() - started
        size = len(text) / 1024
        print(
            f"{family.name}: {len(plan.steps)} steps, {size:.0f} KiB, {seconds:.0f} s", flush=True
        )


if __name__ == "__main__":
    main()
