"""Write the model-made profiles of GPUs that nobody has measured.

    python -m benchmarks.model_profiles

Needs no GPU. For every chip of `accel.tuning.chips` unlike those that were measured one file in
`tuning_profiles/`, marked `"made_by": "model"`: what is known of the chip, and constants of the
performance model for the kernels that run there, the geometric mean of those in the measured
profiles (but see `_products`). There are no choices in it: engines make them from these constants
at each size. They are as good as that is, which no time says.
"""

from __future__ import annotations

import argparse
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from accel.tuning import profile_file
from accel.tuning.chips import KNOWN, Chip
from accel.tuning.cost import Fit
from accel.tuning.profile import SHIPPED

HOPPER_ALONE = ("triton.matmul_tma", "triton.conv2d_tma", "cuda.attention", "cuda.matmul")
"""Kernels that want at least sm_90."""

TENSOR_CORES = ("triton.matmul", "triton.conv2d", "triton.attention")
"""Kernels that want at least sm_80; the compiler makes something else of their tiles on sm_90."""


LIBRARIES = {"matmul": "cublas.linear", "conv2d": "cudnn.conv2d", "attention": "torch.sdpa"}
"""Whose share of the tensor cores' rate ours cannot exceed, by a part of our kernels' names."""


def main() -> None:
    """Fit and write."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    for name, text in made(SHIPPED).items():
        (SHIPPED / name).write_text(text, encoding="utf-8")
        print(name)


def made(folder: Path) -> dict[str, str]:
    """The files' texts by their names, as the measured profiles in a folder lead to them."""
    contents = [profile_file.read(path) for path in sorted(folder.glob("*.json"))]
    measured = [c for c in contents if not c.model_made and c.fit is not None]
    known = [content.meta["capability"] for content in measured]
    fitted = mean([Fit.from_json(content.fit) for content in measured])
    origins = [content.meta["gpu"] for content in measured]
    return {
        f"{file_name(chip)}.json": text_of(chip, fitted, origins)
        for chip in KNOWN
        if list(chip.capability) not in known
    }


def file_name(chip: Chip) -> str:
    """The chip's name as one of a file."""
    return re.sub(r"\W+", "_", chip.name.lower())


def mean(fits: Sequence[Fit]) -> Fit:
    """The geometric mean of constants, each of those fits that have it."""

    def of(values: Sequence[float]) -> float:
        return math.exp(sum(map(math.log, values)) / len(values))

    terms: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    tiles: dict[str, list[float]] = defaultdict(list)
    for fitted in fits:
        for form, constants in fitted.constants.items():
            for term, value in constants.items():
                terms[form][term].append(value)
        for tile, factor in fitted.tiles.items():
            tiles[tile].append(factor)
    return Fit(
        {form: {term: of(v) for term, v in found.items()} for form, found in terms.items()},
        {tile: of(values) for tile, values in tiles.items()},
    )


def text_of(chip: Chip, fitted: Fit, origins: Sequence[str]) -> str:
    """The file of a chip's profile."""
    absent = tuple(
        name
        for names, least in ((HOPPER_ALONE, (9, 0)), (TENSOR_CORES, (8, 0)))
        for name in names
        if chip.capability < least
    )
    remade = () if chip.capability[0] == 9 else (*TENSOR_CORES, *HOPPER_ALONE)
    own = Fit(
        {
            form: {**terms, **_products(form, fitted)} if "math" in terms else terms
            for form, terms in fitted.constants.items()
            if form not in absent
        },
        {
            tile: factor
            for tile, factor in fitted.tiles.items()
            if tile.partition(" ")[0] not in (*absent, *remade)
        },
    )
    facts = asdict(chip)
    meta = {
        "gpu": facts.pop("name"),
        "capability": list(facts.pop("capability")),
        "multiprocessors": facts.pop("multiprocessors"),
        **{"torch": "any", "cuda": None, "cudnn": None, "triton": None},
        "made_by": "model",
        "constants_of": list(origins),
        "command": "python -m benchmarks.model_profiles",
        "chip": facts,
    }
    return profile_file.written(profile_file.Content(meta, {}, own.to_json()))


def _products(form: str, fitted: Fit) -> dict[str, float]:
    """How many times the tensor cores' own rate products take, and more when all are at work.

    On the chips that were measured something else decides the times of most of our kernels, and so
    they tell little of this, down to twice as fast as can be. Where the tensor cores are what is
    slow, that would promise what no chip can do: there ours take as long as a library's.
    """
    library = next((name for part, name in LIBRARIES.items() if part in form), form)
    slower = max((form, library), key=lambda name: fitted.constants[name]["math"])
    return {k: v for k, v in fitted.constants[slower].items() if k in ("math", "busy")}


if __name__ == "__main__":
    main()
