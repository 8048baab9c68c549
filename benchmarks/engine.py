"""Engine against PyTorch on a GPU at the sizes of the README, with what `accel bench` leaves out.

    python -m benchmarks.engine --out results.json [--only sd15:512x512] [--variants eager,graph]

The rows are those of `python -m accel bench`. To the engine's are added: fidelity at odd sizes and
with long prompts, without and with a ControlNet; swaps of checkpoints and LoRAs, timed; and that
what was swapped out comes back bit for bit. Networks have random weights at full size.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from accel.bench import results
from accel.bench.engines import EngineVariant
from accel.bench.machine import ceilings, meta
from accel.bench.measure import relative
from accel.bench.networks import (
    LORA_STRENGTH,
    Case,
    Inputs,
    Networks,
    case_of,
    make_inputs,
    make_networks,
    merge_lora,
    random_lora,
    release_memory,
)
from accel.bench.process import ProcessFailed, run_isolated
from accel.bench.run import ENGINE, Options, run_bench, title
from accel.bench.timing import enter, exact_float32
from accel.bench.variants import BASELINES, eager

__all__ = ["ceilings", "meta"]  # for benchmarks/comfyui.py

ROWS = [("sd15", 512, 512), ("sdxl", 1024, 1024), ("sd15", 768, 768), ("sdxl", 896, 1152)]
ODD_SIZES = [(520, 264, 77, False), (640, 512, 154, False), (512, 512, 77, True)]
ODD_SIZES += [(712, 600, 231, True)]
"""Width, height, tokens, and whether a ControlNet runs."""

OTHER_STRENGTH = 0.3
TIMEOUT = 500.0


def main() -> None:
    """Run every row's variants one after another and write one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", action="append", help="model:WxH")
    parser.add_argument("--variants", default=",".join(BASELINES))
    parser.add_argument("--commit")
    arguments = parser.parse_args()
    chosen = [
        row for row in ROWS if arguments.only is None or "{}:{}x{}".format(*row) in arguments.only
    ]
    options = Options(
        cases=tuple(case_of(model, (width, height)) for model, width, height in chosen),
        baselines=tuple(name for name in BASELINES if name in arguments.variants.split(",")),
        timeout=TIMEOUT,
        command="python -m benchmarks.engine",
        commit=arguments.commit,
    )
    document = run_bench(options, say, lambda document: results.save(document, arguments.out))
    engines = [row for row in document["rows"] if row["variant"] == ENGINE]
    for case, row in zip(options.cases, engines, strict=True):
        say(f"{title(case)}: odd sizes and swaps")
        try:
            row |= run_isolated(checks, case, options.device, timeout=TIMEOUT)
        except ProcessFailed as error:
            row["failed"] = str(error).splitlines()
        results.save(document, arguments.out)


def say(text: str) -> None:
    """Tell what is being done."""
    print(text, file=sys.stderr, flush=True)


def checks(case: Case, device_name: str) -> dict[str, Any]:
    """What the engine of a case has to show besides its row."""
    device = enter(device_name)
    control = replace(case, controlnets=1)
    networks = make_networks(control, device)
    plain = make_networks(control, device)  # the same weights
    networks.each(lambda network: nn.Module.to(network, "cpu"))
    release_memory(device)
    variant = EngineVariant(control, networks, device)
    with exact_float32():
        found = {"parity_other_sizes": odd_sizes(variant, plain, device)}
        inputs = make_inputs(case, 0, device)
        return found | swaps(variant, networks.unet, inputs) | loras(variant, plain, inputs)


def odd_sizes(
    variant: EngineVariant, plain: Networks, device: torch.device
) -> list[dict[str, Any]]:
    """Errors of the engine and of plain PyTorch against float32."""
    found = []
    exact = plain.in_float32()
    for width, height, tokens, controlled in ODD_SIZES:
        inputs = make_inputs(variant.case.resized(width, height), 7, device, tokens)
        if controlled:
            got = variant(inputs)
            ways = eager(exact), eager(plain)
        else:
            inputs = Inputs(inputs.arguments)
            got = variant.without_control(inputs)
            ways = eager(Networks(exact.unet, ())), eager(Networks(plain.unet, ()))
        truth = ways[0](inputs.cast(torch.float32))
        found.append(
            {
                "width": width,
                "height": height,
                "tokens": tokens,
                "controlnets": int(controlled),
                "rel_err": relative(got.float(), truth),
                "rel_err_eager": relative(ways[1](inputs).float(), truth),
            }
        )
    return found


def swaps(variant: EngineVariant, unet: Any, inputs: Inputs) -> dict[str, Any]:
    """Another checkpoint in and out again, from memory."""
    engine = variant.unet
    before = variant.without_control(inputs)
    other = {name: parameter * 0.5 for name, parameter in unet.state_dict().items()}
    swapped = vars(engine.load_weights(other))
    back = vars(engine.load_weights(unet.state_dict()))
    report = engine.report()
    return {
        "swap_checkpoint": swapped,
        "swap_back": back,
        "swap_back_equal": bool(torch.equal(variant.without_control(inputs), before)),
        "captures_after_swaps": report["captures"],
        "graphs_after_other_sizes": report["graphs"],
        "module_device": str(next(unet.parameters()).device),
    }


def loras(variant: EngineVariant, plain: Networks, inputs: Inputs) -> dict[str, Any]:
    """A LoRA on, at another strength, and off: exact on, exact off. Changes `plain`."""
    lora, engine = random_lora(variant.case.config), variant.unet
    before = variant.without_control(inputs)
    on = vars(engine.set_loras([(lora, LORA_STRENGTH)]))
    with_lora = variant.without_control(inputs)
    strength = vars(engine.set_loras([(lora, OTHER_STRENGTH)]))
    off = vars(engine.set_loras([]))
    after = variant.without_control(inputs)
    # The yardstick: weights merged in float32 without rounding; plain PyTorch merges and rounds.
    exact = Networks(plain.in_float32().unet, ())
    for unet in (exact.unet, plain.unet):
        merge_lora(unet, lora, LORA_STRENGTH)
    truth: Tensor = eager(exact)(inputs.cast(torch.float32))
    merged = eager(Networks(plain.unet, ()))(inputs).float()
    return {
        "lora_on": on,
        "lora_strength": strength,
        "lora_off": off,
        "lora_changes_output": relative(with_lora.float(), before.float()),
        "lora_rel_err": relative(with_lora.float(), truth),
        "lora_rel_err_eager": relative(merged, truth),
        "lora_off_equal": bool(torch.equal(before, after)),
    }


if __name__ == "__main__":
    main()
