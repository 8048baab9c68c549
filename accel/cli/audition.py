"""`audition`: one prompt and seed over a folder of checkpoints."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from . import output
from .arguments import painting, positive


def add(commands: Any) -> None:
    """Declare the command."""
    command = commands.add_parser(
        "audition",
        help="paint one prompt with every checkpoint of a folder, on one contact sheet",
        description="Checkpoints of one structure share an engine, and the next is read while one "
        "paints. What cannot be used is left out and named. Nothing is downloaded.",
    )
    command.add_argument(
        "--checkpoints",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder of SD1.5 or SDXL .safetensors files",
    )
    painting(command, prompt="what to paint")
    command.add_argument(
        "--images", type=positive, default=1, metavar="N", help="seeds for each checkpoint"
    )
    command.add_argument(
        "--out",
        type=Path,
        default=Path("audition.png"),
        metavar="FILE",
        help="the contact sheet (default: %(default)s)",
    )
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the audition and print its table."""
    from ..demo.audition import Options, run_audition

    with output.progress("audition") as report:
        result = run_audition(
            Options(
                folder=options.checkpoints,
                out=options.out,
                prompt=options.prompt,
                size=options.size,
                steps=options.steps,
                seed=options.seed,
                images=options.images,
                device=options.device,
                tokenizer=options.tokenizer,
            ),
            report,
        )
    if options.json:
        output.print_json(result.to_json())
        return 0
    console = output.stdout()
    console.print(result.heading, soft_wrap=True, markup=False)
    output.print_table(
        ("checkpoint", "seed", "swap ms", "steps s", "idle ms"),
        [
            (
                row.checkpoint,
                str(row.seed),
                f"{row.swap_ms:.0f}",
                f"{row.steps_ms / 1e3:.2f}",
                f"{row.idle_ms:.0f}",
            )
            for row in result.rows
        ],
        right=("seed", "swap ms", "steps s", "idle ms"),
    )
    for line in (*result.remarks, f"idle between pictures: {result.idle:.1%} of the time"):
        console.print(line, soft_wrap=True, markup=False)
    console.print(f"contact sheet: {result.sheet}", soft_wrap=True, markup=False)
    return 0
