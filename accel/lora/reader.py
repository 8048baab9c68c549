"""Reading a LoRA of any format against one model: all of it fits, or none of it is used."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..errors import InvalidLora
from .diffusers import DIFFUSERS
from .format import DAMAGED, OTHER_MODEL, Format, Layer, Patch, open_source
from .hadamard import LOHA
from .kohya import KOHYA
from .kronecker import LOKR
from .names import is_text_encoder, layer_name

# In this order a layer's parts are offered to the formats: the first that owns them reads it.
FORMATS: tuple[Format, ...] = (KOHYA, DIFFUSERS, LOHA, LOKR)

# Formats that are known by name only, so that a file of theirs is refused as what it is.
_UNSUPPORTED = tuple(
    (name, re.compile(pattern))
    for name, pattern in (
        ("DoRA", r"\.(dora_scale|lora_magnitude_vector)(\.|$)"),
        ("BOFT", r"\.boft_"),
        ("OFT", r"\.oft_"),
        ("IA3", r"\.(on_input|ia3_l)(\.|$)"),
        ("GLoRA", r"\.([ab][12]|bm)\.weight$|\.glora_"),
        ("T-LoRA", r"\.(lambda_layer|[qp]_layer\.weight)$"),
        ("AdaLoRA", r"\.lora_E(\.|$)|\.ranknum(\.|$)"),
        ("VeRA", r"\.?vera_(lambda_|A|B)"),
        ("Full difference", r"\.(diff|diff_b|set_weight|w_norm|b_norm)$"),
        ("LoRA with biases", r"\.lora_(up|down|mid|[AB](\.[^.]+)?)\.bias$"),
        ("LoRA of a reshaped layer", r"\.reshape_weight$"),
        ("LoRA with fully trained layers", r"\.modules_to_save\."),
        ("ControlNet-LLLite", r"^lllite_"),
        ("Control-LoRA", r"^lora_controlnet$"),
    )
)


@dataclass(frozen=True)
class Lora:
    """A LoRA that fits its model as a whole.

    name:    of the file, without suffix.
    format:  name of its format, or of several joined by " + ".
    patches: canonical parameter name -> what changes it.
    skipped: keys of text encoders, which were not read.
    """

    name: str
    format: str
    patches: dict[str, Patch]
    skipped: tuple[str, ...]


@dataclass(frozen=True)
class _Header:
    layers: list[Layer]
    skipped: list[str]
    unknown: list[str]
    repeated: list[str]


def read_lora(
    source: str | Path | Mapping[str, Tensor | float],
    targets: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
) -> Lora:
    """Read a LoRA for one model.

    source:  `.safetensors` path (mapped; only the adapters' own tensors are read) or state dict
             (an alpha may be a plain number).
    targets: `models.unet.adapter_names(config)`, every spelling of a layer -> parameter name.
    shapes:  parameter name -> shape.

    Raises InvalidFile when the file cannot be opened, and InvalidLora when it is of a format not
    supported yet, damaged, or made for another model: a LoRA of which only some layers fit would
    give a wrong image. All that the header can tell is checked before any tensor is read.
    """
    opened = open_source(source)
    title = f"LoRA {opened.title!r}"
    header = _layers(opened.shapes, targets)
    for name, pattern in _UNSUPPORTED:
        if any(pattern.search(key) for key in header.unknown):
            raise InvalidLora(f"{title}: {name} is not supported yet; use a plain LoRA or LoCon")
    if not header.layers:
        found = (
            f"all {len(header.skipped)} keys are of text encoders"
            if header.skipped and not header.unknown
            else f"the first key is {header.unknown[0]!r}"
            if header.unknown
            else "the file is empty"
        )
        raise InvalidLora(f"{title} has no layer for this model ({found}); choose a LoRA file")
    if header.unknown:
        raise InvalidLora(
            f"{title}: {header.unknown[0]!r} is of no known LoRA format, and leaving it out would "
            "give another image; use a plain LoRA or LoCon"
        )
    if header.repeated:
        raise InvalidLora(f"{title} adapts {header.repeated[0]!r} twice; keep one of the two")

    named = [layer for layer in header.layers if layer.target is not None]
    counted = f"{len(named)} of {len(header.layers)} layers match this model by name"
    lost = next((layer for layer in header.layers if layer.target is None), None)
    if lost is not None:
        raise InvalidLora(f"{title}: {counted}, but {lost.name!r} does not; {OTHER_MODEL}")
    groups: dict[str, tuple[Format, list[Layer]]] = {}
    for layer in named:
        form = _format_of(layer)
        if form is None:
            parts = ", ".join(sorted(layer.keys))
            raise InvalidLora(
                f"{title}: layer {layer.name!r} is incomplete, it has only {parts}; {DAMAGED}"
            )
        reason = form.check(layer, shapes)
        if reason is not None:
            raise InvalidLora(f"{title}: {counted}, but layer {layer.name!r} {reason}")
        groups.setdefault(form.name, (form, []))[1].append(layer)

    patches = {
        patch.target: patch
        for form, layers in groups.values()
        for patch in form.read(layers, opened)
    }
    return Lora(opened.title, " + ".join(groups), patches, tuple(header.skipped))


def fits(
    source_names_and_shapes: Mapping[str, tuple[int, ...]],
    targets: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
) -> tuple[int, int]:
    """How many of a LoRA's layers a model takes by name and shape, and how many it has in all.

    Needs the header only and raises nothing, so that it can be asked of one family after the other:
    (n, n) with n > 0 is a LoRA made for this model. Text encoders and keys of unsupported formats
    do not count.
    """
    header = _layers(source_names_and_shapes, targets)
    # An alpha alone belongs to a layer of an unsupported format.
    layers = [layer for layer in header.layers if layer.keys.keys() != {"alpha"}]
    matched = 0
    for layer in layers:
        form = _format_of(layer) if layer.target is not None else None
        matched += form is not None and form.check(layer, shapes) is None
    return matched, len(layers)


def _layers(shapes: Mapping[str, tuple[int, ...]], targets: Mapping[str, str]) -> _Header:
    """Sort the keys of a header into layers, without judging them."""
    header = _Header([], [], [], [])
    found: dict[str, dict[str, str]] = {}
    for key in shapes:
        if is_text_encoder(key):
            header.skipped.append(key)
            continue
        parsed = _parse(key)
        if parsed is None:
            header.unknown.append(key)
            continue
        parts = found.setdefault(layer_name(parsed[0]), {})
        if parts.setdefault(parsed[1], key) != key:
            header.repeated.append(key)
    taken: set[str] = set()
    for name, keys in found.items():
        target = targets.get(name)
        if target is not None and target in taken:
            header.repeated.append(next(iter(keys.values())))
        elif target is not None:
            taken.add(target)
        header.layers.append(
            Layer(name, target, keys, {p: tuple(shapes[k]) for p, k in keys.items()})
        )
    return header


def _parse(key: str) -> tuple[str, str] | None:
    layer = key.removesuffix(".alpha")
    if layer != key:
        # Some writers hang the alpha below the key of a factor instead of below the layer.
        of_factor = _parse(layer)
        return (of_factor[0] if of_factor else layer), "alpha"
    return next((parsed for form in FORMATS if (parsed := form.parse(key))), None)


def _format_of(layer: Layer) -> Format | None:
    return next((form for form in FORMATS if form.owns(layer.keys.keys())), None)
