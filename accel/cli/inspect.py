"""`inspect FILE…`: what a file holds, and whether an engine for it is ready. Headers only."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InvalidFile, SwitchyardError
from . import output

if TYPE_CHECKING:
    from ..structure import Structure
    from ..tensorfile import TensorInfo

# Other networks by the names of their tensors, in the namings of single files and of diffusers.
_PARTS: dict[str, tuple[str, ...]] = {
    "VAE": ("first_stage_model.", "vae.", "decoder.conv_in.", "encoder.conv_in."),
    "text encoder": (
        *("cond_stage_model.", "conditioner.", "text_encoder", "clip_l.", "clip_g.", "t5xxl."),
        *("text_model.", "transformer.text_model.", "embeddings.token_embedding."),
    ),
    "textual inversion": ("emb_params", "string_to_param", "<"),
}


def add(commands: Any) -> None:
    """Declare the command."""
    command = commands.add_parser(
        "inspect",
        help="what a file holds, and whether its engine is ready",
        description="Print family, structure, engine (shipped, cached or to build), dtype and size "
        "of checkpoints, LoRAs and ControlNets. Reads the headers only. Exit code 2 if a file "
        "cannot be used; the others are printed all the same.",
    )
    command.add_argument("files", nargs="+", metavar="FILE", type=Path, help=".safetensors file")
    command.add_argument("--json", action="store_true", help="print a JSON list instead")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print one row a file."""
    from ..compiler import open_cache

    cached = {entry.path for entry in open_cache(None, None).entries()}
    cache_folder = open_cache(None, None).folder
    rows = []
    for path in options.files:
        try:
            rows.append({"file": str(path), **examine(path, cached, cache_folder), "error": None})
        except SwitchyardError as error:
            rows.append({"file": str(path), "error": str(error)})
    if options.json:
        output.print_json(rows)
    else:
        _print(rows)
    return 2 if any(row["error"] for row in rows) else 0


def examine(path: Path, cached: Iterable[Path] = (), cache_folder: Path = Path()) -> dict[str, Any]:
    """The facts about one file as plain JSON values. Raises InvalidFile."""
    from ..lora import is_lora
    from ..tensorfile import TensorFile

    tensors = TensorFile(path).tensors
    shapes = {name: info.shape for name, info in tensors.items()}
    facts: dict[str, Any] = {"bytes": path.stat().st_size, "tensors": len(tensors)}
    if is_lora(tensors):
        return {"kind": "lora", **facts, "dtype": _dtype(tensors, tensors), **_lora(shapes)}

    from ..structure import structure_of

    structure = structure_of(shapes)
    others = [
        part for part, starts in _PARTS.items() if any(name.startswith(starts) for name in tensors)
    ]
    if structure.kind == "module":
        kind = others[0] if len(others) == 1 else "other"
        holds = " + ".join(others) or "no network that Switchyard knows"
        return {"kind": kind, **facts, "dtype": _dtype(tensors, tensors), "holds": holds}
    title = "ControlNet" if structure.kind == "controlnet" else "UNet"
    return {
        "kind": structure.kind,
        **facts,
        "dtype": _dtype(tensors, _own_names(shapes, structure)),
        "holds": " + ".join([title, *others]),
        "family": structure.family,
        "title": _title(structure),
        "graph_key": structure.graph_key,
        "shape_key": structure.shape_key,
        "engine": engine_state(structure, cached, cache_folder),
    }


def engine_state(structure: Structure, cached: Iterable[Path], cache_folder: Path) -> str:
    """Where the structure's plan would come from: "shipped", "cached" or "to build"."""
    if structure.graph_key is None:
        return "needs its module"
    from ..compiler import shipped_plan

    if shipped_plan(structure) is not None:
        return "shipped"
    return (
        "cached" if cache_folder / "plan" / f"{structure.graph_key}.json" in cached else "to build"
    )


def _title(structure: Structure) -> str:
    from ..models import FAMILIES

    named = {family.name: family.title for family in FAMILIES}
    return named.get(structure.family or "", "no published family")


def _own_names(shapes: Mapping[str, tuple[int, ...]], structure: Structure) -> Iterable[str]:
    """The names in the file of the denoiser's own parameters."""
    from ..structure import canonical_names

    if structure.config is not None:
        return canonical_names(shapes, structure.config).values()
    # Without a family the file's other networks are told apart by their prefixes.
    return [name for name in shapes if not name.startswith((*_PARTS["VAE"], "cond", "text"))]


def _dtype(tensors: Mapping[str, TensorInfo], names: Iterable[str]) -> str:
    """The dtype that most of the bytes have."""
    weight: Counter[str] = Counter()
    for name in names:
        info = tensors[name]
        weight[str(info.dtype).removeprefix("torch.")] += prod(info.shape) * info.dtype.itemsize
    return weight.most_common(1)[0][0] if weight else "—"


def _lora(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Which families take every layer of a LoRA; if none does, how far the best one gets."""
    from ..lora import fits
    from ..lora.reader import FORMATS
    from ..models import FAMILIES, adapter_names, parameters

    formats = [form.name for form in FORMATS if any(form.parse(name, shapes) for name in shapes)]
    layers, fitting, best, best_title = 0, [], 0, ""
    for family in FAMILIES:
        own = {name: parameter.shape for name, parameter in parameters(family.config).items()}
        matched, layers = fits(shapes, adapter_names(family.config), own)
        if layers and matched == layers:
            fitting.append(family)
        elif matched > best:
            best, best_title = matched, family.title
    facts: dict[str, Any] = {"format": " + ".join(formats) or "not supported", "layers": layers}
    facts["fits"] = [family.name for family in fitting]
    holds = f"LoRA ({facts['format']}), "
    if fitting:
        # Variants of a family, such as inpainting, take its LoRAs too: the first is the family.
        holds += f"fits: {fitting[0].title}, {layers} layers"
    elif best:
        holds += f"fits no family whole: {best} of {layers} layers match {best_title}"
    elif layers:
        holds += f"fits no known family, {layers} layers"
    else:
        holds += "for text encoders only"
    return {**facts, "holds": holds}


def _print(rows: list[dict[str, Any]]) -> None:
    columns = ("file", "holds", "family", "structure", "engine", "dtype", "size")
    table = []
    for row in rows:
        name = Path(row["file"]).name
        if row["error"]:
            reason = row["error"].removeprefix(row["file"]).strip()
            table.append((name, f"error: {reason}", "", "", "", "", ""))
            continue
        key = row.get("graph_key") or row.get("shape_key")
        # A key of the shapes alone is marked: it is not the one by which engines are found.
        short = "—" if key is None else key[:12] if row["graph_key"] else f"shapes {key[:12]}"
        table.append(
            (
                name,
                row["holds"],
                row.get("title") or "—",
                short,
                row.get("engine") or "—",
                row["dtype"],
                output.size(row["bytes"]),
            )
        )
    output.print_table(columns, table, right=("size",))


def structure_of_file(path: Path) -> Structure:
    """The structure of a file, when it holds a network of a published family.

    Raises InvalidFile for a file without one.
    """
    from ..structure import structure_of

    structure = structure_of(path)
    if structure.config is None:
        raise InvalidFile(
            f"{path} holds no network of a published family: "
            f"`python -m accel inspect {path.name}` says what it holds"
        )
    return structure
