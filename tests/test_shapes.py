"""Symbolic sizes: the grammar and its limits, and what a sympy expression becomes."""

from __future__ import annotations

import random

import pytest
import sympy
import torch
from torch.utils._sympy import functions

from accel.errors import InvalidPlan
from accel.plan.schema import Plan
from accel.plan.shapes import evaluate, evaluate_shape, from_sympy, names

DIMS = {"height": 65, "width": 33, "batch": 2}
H, W = sympy.symbols("height width", integer=True, positive=True)


@pytest.mark.parametrize(
    ("size", "value"),
    [
        (7, 7),
        ("7", 7),
        ("height", 65),
        ("(height - 1)//2 + 1", 33),
        ("batch*height*width", 2 * 65 * 33),
        ("-height + 70", 5),
        ("height % 8", 1),
        ("-7//2", -4),  # rounds down, as sympy's FloorDiv
        ("max(height, width, 40)", 65),
        ("min(height, width*2)", 65),
        ("((((((height - 1)//2))))) + max(1, 2)", 34),
    ],
)
def test_values(size: int | str, value: int) -> None:
    assert evaluate(size, DIMS) == value


def test_shapes_and_names() -> None:
    assert evaluate_shape((1, "batch", "height//2"), DIMS) == (1, 2, 32)
    assert names("max(height, 3) + batch*height") == {"height", "batch"}
    assert names(4) == names("4") == frozenset()


@pytest.mark.parametrize(
    "size",
    [
        "__import__('os')",
        "height.real",
        "height[0]",
        "height / 2",
        "height ** 2",
        "height << 1",
        "~height",
        "+height",
        "1.5",
        "True",
        "'height'",
        "(height, width)",
        "height if width else 1",
        "height < width",
        "height and width",
        "lambda: 1",
        "abs(height)",
        "max(height)",
        "max(*height)",
        "max(height, key=width)",
        "max(height, width, key=width)",
        "(max)(height, width)(3)",
        "[height for height in width]",
        "(height := 3)",
        "height width",
        "height +",
        "",
        "height; width",
        "height\nwidth",
        "\0",
        "(" * 500 + "1" + ")" * 500,
        "-" * 50_000 + "1",
        "1" + "+1" * 50_000,
        "9" * 5000,  # more digits than Python parses
    ],
    ids=lambda size: size[:20],
)
def test_anything_else_is_refused(size: str) -> None:
    with pytest.raises(InvalidPlan):
        evaluate(size, DIMS)


def test_an_unknown_name_is_named() -> None:
    with pytest.raises(InvalidPlan, match="no known dimension: depth"):
        evaluate("depth + 1", DIMS)


@pytest.mark.parametrize("size", ["height//0", "height % (batch - 2)"])
def test_division_by_zero_is_refused(size: str) -> None:
    with pytest.raises(InvalidPlan, match="has no value"):
        evaluate(size, DIMS)


@pytest.mark.parametrize(
    "expression",
    [
        sympy.Integer(4),
        H,
        H + 1,
        H - W,
        -H + 3 * W - 7,
        -(H - W) * (W + 2),
        2 * H * W,
        H**2 + W**3,
        functions.FloorDiv(H - 1, 2) + 1,
        functions.FloorDiv(functions.FloorDiv(H - 1, 2), 2) * functions.FloorDiv(W - 1, 2),
        functions.FloorDiv(H - 70, 3),
        functions.CleanDiv(8 * H, 4),
        functions.Mod(H, 8) + functions.PythonMod(W, 5),
        functions.Max(H, W + 40) - functions.Min(H, W),
        sympy.Max(H, 2 * W, 3),
    ],
    ids=str,
)
def test_sympy_is_printed_in_the_grammar(expression: sympy.Expr) -> None:
    size = from_sympy(expression)
    assert isinstance(size, int) == (not expression.free_symbols)
    random.seed(0)
    for _ in range(50):
        dims = {"height": random.randint(1, 200), "width": random.randint(1, 200)}
        assert evaluate(size, dims) == expression.subs({H: dims["height"], W: dims["width"]})


@pytest.mark.parametrize(
    "expression",
    [
        H / 2,
        1 / H,
        H + sympy.Rational(1, 2),
        H**W,
        sympy.sqrt(H),
        sympy.floor(H / 2),
        functions.IntTrueDiv(H, 2),  # no integer: h/2*2 is h, h//2*2 is not
        functions.ModularIndexing(H, 2, W),
        sympy.Piecewise((H, H > W), (W, True)),
    ],
    ids=str,
)
def test_sympy_outside_the_grammar_is_refused(expression: sympy.Expr) -> None:
    with pytest.raises(InvalidPlan):
        from_sympy(expression)


class Halvings(torch.nn.Module):
    """Three stride-2 convolutions, then a pad to an even width."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = torch.ones(1, 1, 3, 3, device=x.device)
        for _ in range(3):
            x = torch.nn.functional.conv2d(x, weight, stride=2, padding=1)
        return torch.nn.functional.pad(x, (0, x.shape[-1] % 2)).flatten(2)


def test_sizes_of_an_exported_network() -> None:
    """FloorDiv and Mod as torch.export writes them."""
    auto = torch.export.Dim.AUTO
    exported = torch.export.export(
        Halvings(),
        (torch.empty(1, 1, 72, 104, device="meta"),),
        dynamic_shapes=(({2: auto, 3: auto}),),
        strict=False,
    )
    x, *_, output = exported.graph.nodes
    result = output.args[0][0].meta["val"]
    height, width = (size.node.expr for size in x.meta["val"].shape[2:])
    symbols = {height: H, width: W}
    size = from_sympy(result.shape[2].node.expr.xreplace(symbols))
    assert "//" in str(size) and "%" in str(size)
    for sides in ((65, 33), (64, 64), (7, 99)):
        expected = Halvings()(torch.zeros(1, 1, *sides)).shape[2]
        assert evaluate(size, dict(zip(DIMS, sides, strict=False))) == expected


def test_sizes_of_the_tiny_plan(tiny_plan: Plan) -> None:
    """Each size is a positive integer for sizes of an image from 1 x 1 on."""
    sizes = {size for step in tiny_plan.steps for size in step.shape if isinstance(size, str)}
    assert any("//" in size for size in sizes)
    for side in (1, 2, 7, 8, 65):
        dims = {"batch": 1, "height": side, "width": 2 * side, "tokens": 1}
        assert all(evaluate(size, dims) >= 1 for size in sizes)
