"""`build FILE|FAMILY…`: make the plans of structures ahead of the first image."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import SwitchyardError
from . import output
from .inspect import structure_of_file

if TYPE_CHECKING:
    from torch import nn

    from ..structure import Structure


def add(commands: Any) -> None:
    """Declare the command."""
    command = commands.add_parser(
        "build",
        help="make engines ahead of the first image",
        description="Make the plan of each structure and keep it in the cache. A plan serves every "
        "checkpoint, LoRA and image size of its structure, so one file of a kind is enough.",
    )
    command.add_argument(
        "targets",
        nargs="*",
        metavar="FILE|FAMILY",
        help=".safetensors file, or the name of a family, such as sdxl",
    )
    command.add_argument("--family", action="append", default=[], help="the same as a bare name")
    command.add_argument("--all", action="store_true", help="every published family")
    command.add_argument(
        "--force", action="store_true", help="build again, even if shipped or cached"
    )
    command.add_argument("--json", action="store_true", help="print a JSON list instead")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Build what is missing and say where each plan is."""
    from ..compiler import open_cache

    structures = _structures(options)
    cache = open_cache(None, None)
    rows = []
    for title, structure in structures:
        started = time.perf_counter()
        rows.append(_build(title, structure, cache, options.force))
        rows[-1]["seconds"] = round(time.perf_counter() - started, 3)
    if options.json:
        output.print_json(rows)
    else:
        output.print_table(
            ("structure", "key", "engine", "where", "seconds"),
            [
                (r["target"], r["graph_key"][:12], r["source"], r["where"], f"{r['seconds']:.1f}")
                for r in rows
            ],
            right=("seconds",),
        )
    if cache.problem is not None and any(row["source"] == "built" for row in rows):
        raise SwitchyardError(cache.problem)
    return 0


def _build(title: str, structure: Structure, cache: Any, force: bool) -> dict[str, Any]:
    """One row: what was done for a structure, and where its plan is now."""
    from ..compiler import SHIPPED, compile_network, plan_for, shipped_plan

    key = structure.graph_key
    assert key is not None
    entry = cache.folder / "plan" / f"{key}.json"
    shipped = SHIPPED / f"{structure.family}.json"
    row = {"target": title, "family": structure.family, "graph_key": key}
    if not force and shipped_plan(structure) is not None:
        return {**row, "source": "shipped", "where": str(shipped)}
    if not force and cache.get(key, "plan") is not None:
        return {**row, "source": "cache", "where": str(entry)}
    network = _diffusers_class(structure)
    with output.progress(f"building {title}") as report:
        if force:
            plan = compile_network(structure, network, report)
            cache.put(key, "plan", plan.to_json())
            source = "built"
        else:
            _, source = plan_for(structure, network, cache, report)
    where = str(entry) if cache.problem is None else "not kept"
    if force and shipped_plan(structure) is not None:
        output.stderr().print(f"{title}: the shipped plan is used before the one in the cache")
    return {**row, "source": source, "where": where}


def _structures(options: argparse.Namespace) -> list[tuple[str, Structure]]:
    """What to build, each structure once. All are checked before anything is built."""
    from ..models import FAMILIES
    from ..structure import structure_of

    families = {family.name: family for family in FAMILIES}
    targets = [*options.targets, *options.family, *(families if options.all else ())]
    if not targets:
        raise SwitchyardError(
            f"nothing to build: give a file, a family ({', '.join(families)}) or --all"
        )
    found: dict[str | None, tuple[str, Structure]] = {}
    for target in targets:
        if target in families:
            config = families[target].config
            structure = structure_of(_shapes(config))
        elif target in options.family or not Path(target).suffix:
            raise SwitchyardError(
                f"{target!r} is no family: use one of {', '.join(families)}, or a .safetensors file"
            )
        else:
            structure = structure_of_file(Path(target))
        found.setdefault(structure.graph_key, (Path(target).name, structure))
    return list(found.values())


def _shapes(config: Any) -> dict[str, tuple[int, ...]]:
    from ..models import parameters

    return {name: parameter.shape for name, parameter in parameters(config).items()}


def _diffusers_class(structure: Structure) -> type[nn.Module]:
    try:
        from diffusers import ControlNetModel, UNet2DConditionModel
    except ImportError:
        raise SwitchyardError(
            "building from a file or a family needs diffusers: pip install diffusers"
        ) from None
    networks: dict[str, Any] = {"unet": UNet2DConditionModel, "controlnet": ControlNetModel}
    network: type[nn.Module] = networks[structure.kind]
    return network
