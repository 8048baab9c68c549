"""`demo`: one engine for two checkpoints, a LoRA, a ControlNet and two sizes."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from . import output


def add(commands: Any) -> None:
    """Declare the command."""
    command = commands.add_parser(
        "demo",
        help="see one engine serve two checkpoints, a LoRA, a ControlNet and two sizes",
        description="Without arguments: paints with a tiny world of its own (two checkpoints, a "
        "LoRA, a ControlNet; in assets/tiny), by plain PyTorch and by the engine. With "
        "--checkpoint: the same on your own SD1.5 or SDXL files; nothing is downloaded.",
    )
    command.add_argument(
        "--out",
        type=Path,
        default=Path("switchyard-demo"),
        metavar="DIR",
        help="folder for the picture (default: %(default)s)",
    )
    command.add_argument(
        "--checkpoint",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="SD1.5 or SDXL .safetensors; give it twice to see a swap",
    )
    command.add_argument("--lora", type=Path, metavar="FILE", help="a LoRA for them")
    command.add_argument("--controlnet", type=Path, metavar="FILE", help="a ControlNet for them")
    command.add_argument("--prompt", help="what to paint; the tiny world knows coloured shapes")
    command.add_argument("--size", type=_size, metavar="WxH", help="pixels, multiples of 8")
    command.add_argument(
        "--tokenizer",
        type=Path,
        metavar="DIR",
        help="CLIP's vocab.json and merges.txt, such as ComfyUI/comfy/sd1_tokenizer",
    )
    command.add_argument("--steps", type=_positive, default=20, help="default: %(default)s")
    command.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    command.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda if there is one")
    command.add_argument("--json", action="store_true", help="print a JSON object instead")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the demo and print its table."""
    from ..demo import Options, run_demo

    if not options.checkpoint and (options.lora or options.controlnet):
        from ..errors import SwitchyardError

        raise SwitchyardError("--lora and --controlnet need the --checkpoint they were made for")
    with output.progress("demo") as report:
        result = run_demo(
            Options(
                out=options.out,
                checkpoints=tuple(options.checkpoint),
                lora=options.lora,
                controlnet=options.controlnet,
                prompt=options.prompt,
                size=options.size,
                steps=options.steps,
                seed=options.seed,
                device=options.device,
                tokenizer=options.tokenizer,
            ),
            report,
        )
    if options.json:
        output.print_json(result.to_json())
        return 0
    console = output.stdout()
    for line in result.heading:
        console.print(line, soft_wrap=True, markup=False)
    output.print_table(
        (
            "",
            "picture",
            "size",
            "engine",
            "captures",
            "change s",
            "plain s",
            "engine s",
            "error",
            "dB",
        ),
        [
            (
                str(row.number),
                row.title,
                row.size,
                row.engine,
                str(row.captures),
                f"{row.change_seconds:.2f}",
                f"{row.plain_seconds:.2f}",
                f"{row.engine_seconds:.2f}",
                f"{row.error:.1e}" + (f" (= {row.same_as})" if row.same_as else ""),
                "same" if row.psnr is None else f"{row.psnr:.0f}",
            )
            for row in result.rows
        ],
        right=("captures", "change s", "plain s", "engine s", "dB"),
    )
    for line in result.remarks:
        console.print(line, soft_wrap=True, markup=False)
    return 0


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)[xX×](\d+)", text.strip())
    width, height = (int(part) for part in match.groups()) if match else (0, 0)
    if not match or min(width, height) < 64 or max(width, height) > 8192 or width % 8 or height % 8:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no size: give WIDTHxHEIGHT in multiples of 8 from 64 up, such as 768x512"
        )
    return width, height


def _positive(text: str) -> int:
    number = int(text)
    if not 1 <= number <= 1000:
        raise argparse.ArgumentTypeError(f"{text} is no number of steps from 1 to 1000")
    return number


_positive.__name__ = "number"
