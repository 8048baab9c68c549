"""Recipes: every source parameter lands where it belongs, and the JSON gives them back."""

from __future__ import annotations

import json
import random
from math import prod

import pytest
import torch

from accel.errors import InvalidPlan
from accel.plan.recipe import (
    Cat,
    Literal,
    Param,
    Permute,
    Recipe,
    Reshape,
    from_json,
    params,
    places,
    to_json,
)

Tensors = dict[str, torch.Tensor]


def materialised(recipe: Recipe, tensors: Tensors) -> torch.Tensor:
    """The constant by plain PyTorch: what placing must come to."""
    match recipe:
        case Param(name=name):
            return tensors[name]
        case Literal(values=values, shape=shape):
            return torch.tensor(values).view(shape)
        case Permute(of=of, dims=dims):
            return materialised(of, tensors).permute(dims)
        case Reshape(of=of, shape=shape):
            return materialised(of, tensors).reshape(shape)
        case Cat(parts=parts, dim=dim):
            return torch.cat([materialised(part, tensors) for part in parts], dim)


def placed(recipe: Recipe, tensors: Tensors) -> torch.Tensor:
    constant = torch.full(recipe.shape, float("nan"))
    for source, place in places(recipe, constant):
        assert tuple(place.shape) == source.shape
        place.copy_(materialised(source, tensors))
    return constant


def tensors_of(recipe: Recipe) -> Tensors:
    return {param.name: torch.randn(param.shape) for param in params(recipe)}


A, B, C = Param("a", (6, 4)), Param("b", (2, 4)), Param("c", (6, 4, 1, 1))
FILTER = Param("filter", (6, 4, 3, 3))

RECIPES = {
    "parameter": A,
    "literal": Literal((1.0, 2.0, 3.0, 4.0), (2, 2)),
    "channels-last filter": Permute(FILTER, (0, 2, 3, 1)),
    "pointwise convolution": Reshape(C, (6, 4)),
    "stacked": Cat((A, B), 0),
    "stacked with pointwise convolutions": Cat((Reshape(C, (6, 4)), B, A), 0),
    "side by side": Cat((A, Permute(Param("d", (4, 6)), (1, 0))), 1),
    "a column more": Cat((A, Reshape(Param("e", (6,)), (6, 1))), 1),
    "nested": Permute(Cat((Cat((A, B), 0), Permute(Param("f", (4, 3)), (1, 0))), 0), (1, 0)),
    "twice": Cat((A, A), 1),
    "split rows": Permute(Reshape(Cat((A, B), 0), (4, 2, 4)), (2, 0, 1)),
}


@pytest.mark.parametrize("name", RECIPES)
def test_places_are_the_materialised_constant(name: str) -> None:
    recipe = RECIPES[name]
    tensors = tensors_of(recipe)
    expected = materialised(recipe, tensors)
    assert recipe.shape == tuple(expected.shape)
    assert torch.equal(placed(recipe, tensors), expected)


def random_recipe(rng: random.Random, depth: int, rank: int, names: list[str]) -> Recipe:
    if depth == 0:
        names.append(f"p{len(names)}")
        return Param(names[-1], tuple(rng.choice((1, 2, 3, 4)) for _ in range(rank)))
    of = random_recipe(rng, depth - 1, rank, names)
    if rng.random() < 0.5:
        dims = list(range(rank))
        rng.shuffle(dims)
        return Permute(of, tuple(dims))
    dim = rng.randrange(rank)
    shape = list(of.shape)
    shape[dim] = rng.choice((1, 2, 3))
    names.append(f"p{len(names)}")
    parts = [of, Param(names[-1], tuple(shape))]
    rng.shuffle(parts)
    return Cat(tuple(parts), dim)


def test_random_nestings() -> None:
    rng = random.Random(0)
    for _ in range(200):
        recipe = random_recipe(rng, rng.randint(1, 5), rng.randint(1, 4), [])
        tensors = tensors_of(recipe)
        assert torch.equal(placed(recipe, tensors), materialised(recipe, tensors))
        assert sum(prod(param.shape) for param in params(recipe)) == prod(recipe.shape)
        assert from_json(json.loads(json.dumps(to_json(recipe)))) == recipe


@pytest.mark.parametrize("name", RECIPES)
def test_json_gives_the_recipe_back(name: str) -> None:
    assert from_json(json.loads(json.dumps(to_json(RECIPES[name])))) == RECIPES[name]


def test_literals_survive_json_bit_for_bit() -> None:
    values = torch.exp(-torch.arange(100) / 7)
    literal = Literal(tuple(values.tolist()), (100,))
    assert torch.equal(
        torch.tensor(from_json(json.loads(json.dumps(to_json(literal)))).values), values
    )


@pytest.mark.parametrize(
    "data",
    [
        {},
        [],
        None,
        "param",
        {"param": "a"},
        {"permute": [0], "of": {"param": "a"}},
        {"permute": 3, "of": {"param": "a", "shape": [2]}},
        {"reshape": [5], "of": {"param": "a", "shape": [2, 2]}},
        {"cat": 0, "of": []},
        {"cat": 0, "of": [{"param": "a", "shape": [2, 3]}, {"param": "b", "shape": [2, 4]}]},
        {"quantize": 8, "of": {"param": "a", "shape": [2]}},
    ],
    ids=str,
)
def test_damage_is_refused(data: object) -> None:
    with pytest.raises(InvalidPlan):
        from_json(data)
