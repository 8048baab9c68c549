"""`demo`: one engine for two checkpoints, a LoRA, a ControlNet and two sizes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from . import output
from .arguments import painting


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
    painting(command, prompt="what to paint; the tiny world knows coloured shapes")
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
