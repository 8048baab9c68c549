"""Reading a LoRA of any format against one model: all of it fits, or none of it is used."""

from __future__ import annotations

import re
from collections.abc import Collection, Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

from torch import Tensor

from ..errors import InvalidLora
from . import dora
from .boft import BOFT
from .diffusers import DIFFUSERS
from .format import DAMAGED, OTHER_MODEL, Format, Layer, Patch, open_source
from .full import BIAS_PARTS, FULL
from .glora import GLORA
from .hadamard import LOHA
from .ia3 import IA3
from .kohya import KOHYA
from .kronecker import LOKR
from .merged import stacked, take_apart
from .names import is_text_encoder, layer_name, merged
from .oft import OFT

# In this order a layer's parts are offered to the formats: the first that owns them reads it.
FORMATS: tuple[Format, ...] = (KOHYA, DIFFUSERS, LOHA, LOKR, GLORA, OFT, BOFT, IA3, FULL)

# Formats that are known by name only, so that a file of theirs is refused as what it is.
_UNSUPPORTED = tuple(
    (name, re.compile(pattern))
    for name, pattern in (
        ("OFT of an earlier kind", r"\.oft_(diag|r)(\.|$)"),
        ("GLoRA of peft", r"\.glora_"),
        ("T-LoRA", r"\.(lambda_layer|[qp]_layer\.weight)$"),
        ("AdaLoRA", r"\.lora_E(\.|$)|\.ranknum(\.|$)"),
        ("VeRA", r"\.?vera_(lambda_|A|B)"),
        ("LoRA with biases of its factors", r"\.lora_(up|down|mid|A(\.[^.]+)?)\.bias$"),
        ("LoRA of a reshaped layer", r"\.reshape_weight$"),
        ("ControlNet-LLLite", r"^lllite_"),
        ("Control-LoRA", r"^lora_controlnet$"),
    )
)
_ANY_UNSUPPORTED = re.compile("|".join(pattern.pattern for _, pattern in _UNSUPPORTED))


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
    _parts: dict[str, Mapping[str | None, Lora]] = field(
        default_factory=dict, repr=False, compare=False
    )

    def by_block(self, of: Mapping[str, str]) -> Mapping[str | None, Lora]:
        """The LoRA taken apart by block, what lies in none under None; the same objects each time.

        of: parameter name -> its block, always the same for one LoRA. What holds a part knows by
        its identity that nothing of that block has changed.
        """
        if "parts" not in self._parts:
            found: dict[str | None, dict[str, Patch]] = {}
            for target, patch in self.patches.items():
                found.setdefault(of.get(target), {})[target] = patch
            parts = {block: replace(self, patches=own, _parts={}) for block, own in found.items()}
            self._parts.setdefault("parts", parts)  # of two threads the first one's
        return self._parts["parts"]


@dataclass(frozen=True)
class _Header:
    """What the keys of a file come to.

    layers: those of the model.
    lost:   (name, parts) of those that it does not have.
    merged: a parameter, made up, that merges some of the model's -> these.
    """

    layers: list[Layer]
    lost: list[tuple[str, Collection[str]]]
    merged: dict[str, tuple[str, ...]]
    skipped: Sequence[str]
    unknown: Sequence[str]
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
    header = _layers(opened.shapes, targets, shapes)
    for name, pattern in _UNSUPPORTED:
        if any(pattern.search(key) for key in header.unknown):
            raise InvalidLora(f"{title}: {name} is not supported yet; use a plain LoRA or LoCon")
    if not header.layers and not header.lost:
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

    total = len(header.layers) + len(header.lost)
    counted = f"{len(header.layers)} of {total} layers match this model by name"
    if header.lost:
        raise InvalidLora(f"{title}: {counted}, but {header.lost[0][0]!r} does not; {OTHER_MODEL}")
    groups: dict[str, tuple[Format, list[Layer]]] = {}
    for layer in header.layers:
        form, reason = _judged(layer, header.merged)
        if form is None or reason is not None:
            raise InvalidLora(f"{title}: {counted}, but layer {layer.name!r} {reason}")
        groups.setdefault(form.name, (form, []))[1].append(layer)

    patches: dict[str, Patch] = {}
    for form, layers in groups.values():
        for patch in form.read(layers, opened):
            if patch.target in patches:
                raise InvalidLora(f"{title} adapts {patch.target!r} twice; keep one of the two")
            patches[patch.target] = patch
    decomposed = False
    for layer in header.layers:
        part = dora.part_of(layer)
        if part is not None:
            decomposed = True
            patches[layer.target] = dora.read(patches[layer.target], layer, part, opened)
        if layer.target in header.merged:
            whole = patches.pop(layer.target)
            for patch in take_apart(whole, header.merged[layer.target], shapes):
                patches[patch.target] = patch
    formats = [*groups, *(["DoRA"] if decomposed else [])]
    return Lora(opened.title, " + ".join(formats), patches, tuple(header.skipped))


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
    header = _layers(source_names_and_shapes, targets, shapes)
    matched = sum(_judged(layer, header.merged)[1] is None for layer in header.layers)
    # An alpha alone belongs to a layer of an unsupported format.
    parts = [*(layer.keys.keys() for layer in header.layers), *(own for _, own in header.lost)]
    return matched, sum(own != {"alpha"} for own in parts)


def is_lora(keys: Collection[str]) -> bool:
    """Whether a file with these keys is a LoRA, of a format that is read or only known by name."""
    return any(
        _unsupported(key) or ((parsed := parse(key, keys)) and parsed[1] != "alpha") for key in keys
    )


def _unsupported(key: str) -> bool:
    return _ANY_UNSUPPORTED.search(key) is not None


@dataclass(frozen=True)
class _Keys:
    """A file's keys, sorted without a model: by (layer, whether its bias), from part to key."""

    layers: dict[tuple[str, bool], dict[str, str]] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)


@lru_cache(maxsize=4)  # one file is asked about for one model after the other
def _sorted(keys: tuple[str, ...]) -> _Keys:
    found, present = _Keys(), frozenset(keys)
    for key in keys:
        if is_text_encoder(key):
            found.skipped.append(key)
            continue
        parsed = None if _unsupported(key) else parse(key, present)
        if parsed is None:
            found.unknown.append(key)
            continue
        # A bias is a layer of its own: its difference may stand beside any format of the weight.
        parts = found.layers.setdefault((layer_name(parsed[0]), parsed[1] in BIAS_PARTS), {})
        if parts.setdefault(parsed[1], key) != key:
            found.repeated.append(key)
    return found


def _layers(
    keys: Mapping[str, tuple[int, ...]],
    targets: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
) -> _Header:
    """The layers of a header with what they adapt in the model, without judging them."""
    known = _sorted(tuple(keys))
    header = _Header([], [], {}, known.skipped, known.unknown, list(known.repeated))
    taken: set[str] = set()
    for (name, of_bias), parts in known.layers.items():
        target = targets.get(name)
        members = (target,) if target else _members(name, targets, shapes)
        if not target and members:
            target = f"{name}.weight"
            header.merged[target] = members
        bias = f"{target.removesuffix('.weight')}.bias" if target else None
        bias = bias if bias in shapes else None
        if of_bias:
            name, target, bias = f"{name}.bias", bias, None
            members = (target,) if target else ()
        if target is None:
            header.lost.append((name, parts.keys()))
            continue
        if not taken.isdisjoint(members):
            header.repeated.append(next(iter(parts.values())))
        taken.update(members)
        own = stacked([tuple(shapes[member]) for member in members])
        found = {part: tuple(keys[key]) for part, key in parts.items()}
        header.layers.append(Layer(name, target, own, bias, parts, found))
    return header


def _members(
    name: str, targets: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[str, ...]:
    """The model's parameters that the projection `name` merges; () where it merges none."""
    own = tuple(targets[part] for part in merged(name) if part in targets)
    alike = len({shapes[target][1:] for target in own}) == 1
    return own if alike and len(own) == len(merged(name)) else ()


def parse(key: str, keys: Container[str]) -> tuple[str, str] | None:
    """(layer as spelled in the key, part), or None for a key of no known format."""
    layer = key.removesuffix(".alpha")
    if layer != key:
        # Some writers hang the alpha below the key of a factor instead of below the layer.
        of_factor = None if layer.endswith(".alpha") else parse(layer, keys)
        return (of_factor[0] if of_factor else layer), "alpha"
    magnitudes = dora.parse(key)
    if magnitudes is not None:
        return magnitudes
    return next((parsed for form in FORMATS if (parsed := form.parse(key, keys))), None)


def _judged(layer: Layer, made_up: Container[str]) -> tuple[Format | None, str | None]:
    """The format of a layer, and what keeps the model from taking it, if any.

    The latter is the end of the sentence "layer X …". made_up: what merges the model's parameters.
    """
    magnitudes = dora.part_of(layer)
    parts = {part: shape for part, shape in layer.shapes.items() if part != magnitudes}
    form = next((form for form in FORMATS if form.owns(parts)), None)
    if form is None:
        listed = ", ".join(sorted(layer.keys))
        return None, f"is incomplete, it has only {listed}; {DAMAGED}"
    if len(layer.own) < 2 and (magnitudes or not form.vectors):
        return form, f"is a norm or a bias, which is no matrix; {OTHER_MODEL}"
    together, decomposed = layer.target in made_up, magnitudes is not None
    if (together or decomposed) and (not form.additive or (together and decomposed)):
        kind = f"{form.name} with magnitudes" if decomposed else form.name
        where = " on merged projections" if together else ""
        return form, f"is {kind}{where}, which is not supported; use a plain LoRA or LoCon"
    reason = form.check(layer)
    if reason is None and magnitudes:
        reason = dora.check(layer, magnitudes)
    return form, reason
