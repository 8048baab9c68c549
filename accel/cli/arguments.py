"""Arguments that several commands have."""

from __future__ import annotations

import argparse
import re
from pathlib import Path


def painting(command: argparse.ArgumentParser, prompt: str) -> None:
    """Declare what every command that paints takes. prompt: the help for it."""
    command.add_argument("--prompt", help=prompt)
    command.add_argument("--size", type=size, metavar="WxH", help="pixels, multiples of 8")
    command.add_argument(
        "--tokenizer",
        type=Path,
        metavar="DIR",
        help="CLIP's vocab.json and merges.txt, such as ComfyUI/comfy/sd1_tokenizer",
    )
    command.add_argument("--steps", type=positive, default=20, help="default: %(default)s")
    command.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    command.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda if there is one")
    command.add_argument("--json", action="store_true", help="print a JSON object instead")


def size(text: str) -> tuple[int, int]:
    """Width and height in pixels, for `type`."""
    match = re.fullmatch(r"(\d+)[xX×](\d+)", text.strip())
    width, height = (int(part) for part in match.groups()) if match else (0, 0)
    if not match or min(width, height) < 64 or max(width, height) > 8192 or width % 8 or height % 8:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no size: give WIDTHxHEIGHT in multiples of 8 from 64 up, such as 768x512"
        )
    return width, height


def positive(text: str) -> int:
    """A number of steps or of pictures, for `type`."""
    number = int(text)
    if not 1 <= number <= 1000:
        raise argparse.ArgumentTypeError(f"{text} is no number of steps from 1 to 1000")
    return number


positive.__name__ = "number"
