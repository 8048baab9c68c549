"""Recipes: how a constant of the plan is made from parameters of the source model.

A recipe never computes; it says where each source parameter lies inside the constant. So a
parameter can be rewritten alone (a LoRA touches three keys of a merged projection, not the whole of
it), and one `copy_` into a view does the cast, the transposition and the placing at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from ..errors import InvalidPlan

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Param:
    """A parameter of the source model, by canonical name."""

    name: str
    shape: Shape


@dataclass(frozen=True)
class Permute:
    """`of` with its dimensions in another order."""

    of: Recipe
    dims: tuple[int, ...]

    @property
    def shape(self) -> Shape:
        """The shape of the result."""
        return tuple(self.of.shape[d] for d in self.dims)


@dataclass(frozen=True)
class Reshape:
    """`of` with the same elements in another shape."""

    of: Recipe
    shape: Shape


@dataclass(frozen=True)
class Cat:
    """Parts side by side along `dim`."""

    parts: tuple[Recipe, ...]
    dim: int

    @property
    def shape(self) -> Shape:
        """The shape of the result."""
        shape = list(self.parts[0].shape)
        shape[self.dim] = sum(part.shape[self.dim] for part in self.parts)
        return tuple(shape)


@dataclass(frozen=True)
class Literal:
    """Values fixed by the structure, such as the frequencies of a timestep embedding."""

    values: tuple[float, ...]
    shape: Shape


Recipe = Param | Permute | Reshape | Cat | Literal


def params(recipe: Recipe) -> Iterator[Param]:
    """The source parameters that `recipe` reads."""
    match recipe:
        case Param():
            yield recipe
        case Permute(of=of) | Reshape(of=of):
            yield from params(of)
        case Cat(parts=parts):
            for part in parts:
                yield from params(part)


def places(
    recipe: Recipe, constant: torch.Tensor
) -> Iterator[tuple[Param | Literal, torch.Tensor]]:
    """Each source of `recipe` with the view of `constant` that it fills, in the source's shape."""
    match recipe:
        case Param() | Literal():
            yield recipe, constant
        case Permute(of=of, dims=dims):
            inverse = sorted(range(len(dims)), key=dims.__getitem__)
            yield from places(of, constant.permute(inverse))
        case Reshape(of=of):
            yield from places(of, constant.view(of.shape))
        case Cat(parts=parts, dim=dim):
            start = 0
            for part in parts:
                length = part.shape[dim]
                yield from places(part, constant.narrow(dim, start, length))
                start += length


def to_json(recipe: Recipe) -> dict[str, Any]:
    """The recipe as `json.dumps` takes it."""
    match recipe:
        case Param(name=name, shape=shape):
            return {"param": name, "shape": list(shape)}
        case Permute(of=of, dims=dims):
            return {"permute": list(dims), "of": to_json(of)}
        case Reshape(of=of, shape=shape):
            return {"reshape": list(shape), "of": to_json(of)}
        case Cat(parts=parts, dim=dim):
            return {"cat": dim, "of": [to_json(part) for part in parts]}
        case Literal(values=values, shape=shape):
            return {"literal": list(values), "shape": list(shape)}


def from_json(data: dict[str, Any]) -> Recipe:
    """The recipe written by `to_json`; `InvalidPlan` for anything else."""
    try:
        if "param" in data:
            return Param(data["param"], tuple(data["shape"]))
        if "permute" in data:
            return Permute(from_json(data["of"]), tuple(data["permute"]))
        if "reshape" in data:
            of, shape = from_json(data["of"]), tuple(data["reshape"])
            if prod(of.shape) != prod(shape):
                raise InvalidPlan(f"a recipe reshapes {of.shape} to {shape}")
            return Reshape(of, shape)
        if "cat" in data:
            cat = Cat(tuple(from_json(part) for part in data["of"]), data["cat"])
            rests = {(*part.shape[: cat.dim], *part.shape[cat.dim + 1 :]) for part in cat.parts}
            if len(rests) != 1:
                raise InvalidPlan(f"a recipe joins parts of unlike shapes: {sorted(rests)}")
            return cat
        return Literal(tuple(data["literal"]), tuple(data["shape"]))
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise InvalidPlan(f"a weight recipe cannot be read: {str(data)[:80]}") from error
