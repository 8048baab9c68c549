"""Operators: each reference against plain PyTorch, its shape rule against what it returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from accel import ops
from accel.errors import InvalidPlan
from accel.kernels import reference
from accel.ops.pointwise import (
    ADD,
    COS,
    EXP,
    GELU,
    GELU_TANH,
    MUL,
    OFFSET,
    SCALE,
    SILU,
    SIN,
    SPLIT,
)


def image(*shape: int) -> torch.Tensor:
    """Random, channels-last."""
    return torch.randn(shape)


def first(x: torch.Tensor) -> torch.Tensor:
    """[B, H, W, C] as PyTorch's [B, C, H, W], contiguous: another path than the reference's."""
    return x.permute(0, 3, 1, 2).contiguous()


def last(x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 2, 3, 1)


def plain_attention(q: Any, k: Any, v: Any, heads: int, scale: float) -> torch.Tensor:
    results = []
    for q_head, k_head, v_head in zip(
        q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True
    ):
        results.append(torch.softmax(q_head @ k_head.mT * scale, -1) @ v_head)
    return torch.cat(results, -1)


def geglu(x: torch.Tensor) -> torch.Tensor:
    hidden, gate = x.chunk(2, -1)
    return hidden * 0.5 * gate * (1 + torch.erf(gate / 2**0.5))


torch.manual_seed(0)
X = image(2, 5, 7, 8)
FILTER = torch.randn(6, 3, 3, 8)
BIAS, EMBEDDING = torch.randn(6), torch.randn(2, 6)
TOKENS, MATRIX, COLUMNS = torch.randn(2, 9, 8), torch.randn(12, 8), torch.randn(12)
Q, K = torch.randn(2, 9, 12), torch.randn(2, 5, 12)
SCALES, SHIFT = torch.randn(8), torch.randn(8)
ANGLES = TOKENS[..., :1] * SCALES
JOINED = torch.cat([X * 3, X[..., :4]], -1)

SAME = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1}
HALF = {"stride": (2, 2), "padding": (1, 1), "dilation": (1, 1), "groups": 1}
WIDE = {"stride": (2, 1), "padding": (0, 2), "dilation": (1, 2), "groups": 2}


def conv(weight: torch.Tensor, bias: torch.Tensor | None, attrs: dict[str, Any]) -> torch.Tensor:
    return last(F.conv2d(first(X), first(weight), bias, **attrs))


def program(*instructions: tuple[float, ...], dtype: torch.dtype = torch.float32) -> Any:
    """The attributes of `ops.pointwise`."""
    return {"program": tuple(n for step in instructions for n in step), "dtype": dtype}


# Operator, tensors, attributes, what plain PyTorch makes of them.
CASES: list[tuple[Callable[..., torch.Tensor], list[Any], dict[str, Any], torch.Tensor]] = [
    (ops.add, [X, X[:, :1, :1]], {}, X + X[:, :1, :1]),
    (ops.add, [SCALES, X], {}, X + SCALES),
    (ops.mul, [X, TOKENS[0, 0]], {}, X * TOKENS[0, 0]),
    (ops.silu, [X], {}, X / (1 + torch.exp(-X))),
    (ops.gelu, [X], {}, X * 0.5 * (1 + torch.erf(X / 2**0.5))),
    (ops.gelu, [X], {"approximate": "tanh"}, F.gelu(X, approximate="tanh")),
    (ops.cast, [X], {"dtype": torch.float16}, X.half()),
    (
        ops.pointwise,  # cosines, then sines, of each row's angles
        [TOKENS[:, :, :1], SCALES],
        program((MUL, 0, 1, 0), (COS, 2, 2, 0), (SIN, 2, 2, 0), (SPLIT, 3, 4, 5)),
        torch.cat([ANGLES.cos()[..., :5], ANGLES.sin()[..., 5:]], -1),
    ),
    (
        ops.pointwise,
        [X, X[:, :1, :1]],
        program(
            (ADD, 0, 1, 0),
            (SILU, 2, 2, 0),
            (MUL, 3, 0, 0),
            (SCALE, 4, 4, 0.5),
            (OFFSET, 5, 5, -2.0),
        ),
        F.silu(X + X[:, :1, :1]) * X * 0.5 - 2,
    ),
    (
        ops.pointwise,
        [X],
        program((GELU, 0, 0, 0), (GELU_TANH, 1, 1, 0), (EXP, 2, 2, 0)),
        F.gelu(F.gelu(X), approximate="tanh").exp(),
    ),
    (ops.residual_add, [X, X * 2], {}, X * 3),
    (ops.residual_add, [X, None], {}, X),
    (ops.concat, [X, None, X * 2, None], {}, torch.cat([X, X * 2], -1)),
    (ops.concat, [X, X * 3, X[..., :3], None], {}, torch.cat([X * 4, X[..., :3]], -1)),
    (ops.linear, [TOKENS, MATRIX, None, None], {"activation": "none"}, TOKENS @ MATRIX.T),
    (ops.linear, [X, MATRIX, COLUMNS, None], {"activation": "none"}, X @ MATRIX.T + COLUMNS),
    (
        ops.linear,
        [TOKENS, MATRIX, COLUMNS, Q],
        {"activation": "none"},
        TOKENS @ MATRIX.T + COLUMNS + Q,
    ),
    (
        ops.linear,
        [TOKENS, MATRIX, COLUMNS, Q[..., :6]],
        {"activation": "geglu"},
        geglu(TOKENS @ MATRIX.T + COLUMNS) + Q[..., :6],
    ),
    (ops.conv2d, [X, FILTER, None, None, None], SAME, conv(FILTER, None, SAME)),
    (ops.conv2d, [X, FILTER, BIAS, None, None], HALF, conv(FILTER, BIAS, HALF)),
    (ops.conv2d, [X, FILTER[..., :4], BIAS, None, None], WIDE, conv(FILTER[..., :4], BIAS, WIDE)),
    (
        ops.conv2d,
        [X, FILTER, BIAS, EMBEDDING, X[..., :6]],
        SAME,
        conv(FILTER, BIAS, SAME) + EMBEDDING.view(2, 1, 1, 6) + X[..., :6],
    ),
    (
        ops.group_norm,
        [X, SCALES, SHIFT],
        {"groups": 4, "eps": 1e-3, "activation": "none"},
        last(F.group_norm(first(X), 4, SCALES, SHIFT, 1e-3)),
    ),
    (
        ops.group_norm,
        [TOKENS, SCALES, SHIFT],
        {"groups": 2, "eps": 1e-3, "activation": "silu"},
        F.silu(F.group_norm(TOKENS.mT.contiguous(), 2, SCALES, SHIFT, 1e-3)).mT,
    ),
    (
        ops.layer_norm,
        [TOKENS, SCALES, SHIFT],
        {"eps": 1e-3},
        (TOKENS - TOKENS.mean(-1, True))
        / (TOKENS.var(-1, False).unsqueeze(-1) + 1e-3).sqrt()
        * SCALES
        + SHIFT,
    ),
    (ops.layer_norm, [TOKENS, None, None], {"eps": 1e-3}, F.layer_norm(TOKENS, (8,), eps=1e-3)),
    (
        ops.add_layer_norm,
        [TOKENS, TOKENS.flip(1), SCALES, SHIFT],
        {"eps": 1e-3},
        torch.stack(
            [
                TOKENS + TOKENS.flip(1),
                F.layer_norm(TOKENS + TOKENS.flip(1), (8,), SCALES, SHIFT, 1e-3),
            ]
        ),
    ),
    (
        ops.concat_group_norm,
        [X, X * 2, X[..., :4], None, COLUMNS, COLUMNS.flip(0)],
        {"groups": 6, "eps": 1e-3, "activation": "silu"},
        torch.stack(
            [JOINED, last(F.silu(F.group_norm(first(JOINED), 6, COLUMNS, COLUMNS.flip(0), 1e-3)))]
        ),
    ),
    (
        ops.concat_group_norm,
        [TOKENS, TOKENS.flip(1), SCALES, SHIFT],
        {"groups": 2, "eps": 1e-3, "activation": "none"},
        torch.stack(
            [
                TOKENS + TOKENS.flip(1),
                F.group_norm((TOKENS + TOKENS.flip(1)).mT, 2, SCALES, SHIFT, 1e-3).mT,
            ]
        ),
    ),
    (
        ops.attention,
        [Q, K, K * 2],
        {"heads": 3, "scale": 0.3},
        plain_attention(Q, K, K * 2, 3, 0.3),
    ),
    (
        ops.upsample_nearest,
        [X],
        {"size": (10, 14)},
        X.repeat_interleave(2, 1).repeat_interleave(2, 2),
    ),
    (
        ops.upsample_nearest,
        [X],
        {"size": (9, 13)},  # to a skip of odd size
        X[:, [i * 5 // 9 for i in range(9)]][:, :, [i * 7 // 13 for i in range(13)]],
    ),
    (ops.reshape, [X], {"shape": (2, 35, 8)}, X.view(2, 35, 8)),
    (ops.permute, [X], {"dims": (0, 3, 1, 2)}, first(X)),
    (ops.expand, [EMBEDDING], {"shape": (4, 2, 6)}, EMBEDDING.repeat(4, 1, 1)),
    (ops.slice_dim, [X], {"dim": 2, "start": 1, "length": 3}, X[:, :, 1:4]),
    (ops.result, [X], {"index": 0}, X[0]),
]


@pytest.mark.parametrize(
    ("target", "tensors", "attrs", "expected"),
    CASES,
    ids=[f"{case[0].__name__}-{index}" for index, case in enumerate(CASES)],
)
def test_reference_and_shape_rule(
    target: Callable[..., torch.Tensor],
    tensors: list[torch.Tensor | None],
    attrs: dict[str, Any],
    expected: torch.Tensor,
) -> None:
    result = target(*tensors, **attrs)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    op = ops.of(target)
    assert op is not None and ops.get(op.name) is op
    shapes = [None if t is None else tuple(t.shape) for t in tensors]
    assert op.shape(shapes, attrs) == tuple(result.shape)
    assert isinstance(op.shape(shapes, attrs), tuple)
    # What runs on the CPU fills the buffer that it was given.
    out = torch.empty_like(result, memory_format=torch.contiguous_format)
    assert reference(op.name).run(out, *tensors, **attrs) is out
    assert torch.equal(out, result)


def test_every_operator_is_tested() -> None:
    tested = {case[0].__name__ for case in CASES}
    assert tested == {name for name in ops.OPS if not name.startswith("aten.")}


VIEWS = [ops.reshape, ops.permute, ops.expand, ops.slice_dim, ops.result]


@pytest.mark.parametrize("target", VIEWS)
def test_views_share_memory_and_say_so(target: Callable[..., torch.Tensor]) -> None:
    case = next(case for case in CASES if case[0] is target)
    op = ops.of(target)
    assert op is not None and op.view
    assert target(*case[1], **case[2]).data_ptr() - case[1][0].data_ptr() in (0, 4 * 8)
    assert sum(entry.view for entry in ops.OPS.values()) == len(VIEWS)


def test_several_results_may_lie_apart() -> None:
    """In a tuple in place of the tensor that stacks them."""
    several = [case for case in CASES if ops.get(case[0].__name__).results > 1]
    assert len(several) == 3
    for target, tensors, attrs, _ in several:
        stacked = target(*tensors, **attrs)
        apart = tuple(torch.empty_like(one) for one in stacked)
        assert reference(target.__name__).run(apart, *tensors, **attrs) is apart
        assert len(apart) == ops.get(target.__name__).results
        for index, one in enumerate(apart):
            assert torch.equal(one, stacked[index])
            assert ops.result(apart, index=index) is one


def test_flops_count_a_multiply_add_as_two() -> None:
    linear, conv2d, attention = (ops.get(name) for name in ("linear", "conv2d", "attention"))
    assert linear.flops([(2, 9, 8), (12, 8)], (2, 9, 12), {}) == 2 * 2 * 9 * 8 * 12
    assert conv2d.flops([(2, 5, 7, 8), (6, 3, 3, 8)], (2, 5, 7, 6), {}) == 2 * 2 * 5 * 7 * 6 * 9 * 8
    # both products, each B*heads matrices of S x D by D x T
    assert attention.flops([(2, 9, 12), (2, 5, 12)], (2, 9, 12), {}) == 2 * 2 * 2 * 9 * 12 * 5


@pytest.mark.parametrize("target", [ops.add, ops.mul])
def test_sizes_that_do_not_broadcast_are_refused(target: Callable[..., torch.Tensor]) -> None:
    op = ops.of(target)
    assert op is not None
    assert op.shape([(3, 1, 5), (4, 1)], {}) == (3, 4, 5)
    with pytest.raises(InvalidPlan, match=r"\(3, 4\) and \(3, 5\) do not broadcast"):
        op.shape([(3, 4), (3, 5)], {})


def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(InvalidPlan, match="'relu'"):
        ops.linear(TOKENS, MATRIX, None, None, activation="relu")


def test_functional_aten_operators_need_no_entry() -> None:
    name = ops.aten_name(torch.ops.aten.clamp.default)
    assert name == "aten.clamp.default"
    entry = ops.get(name)
    attrs = {"args": ({"tensor": 0}, -0.5), "kwargs": {"max": 0.5}}
    assert torch.equal(entry.reference(X, **attrs), X.clamp(-0.5, 0.5))
    assert entry.shape([X.shape], attrs) == X.shape
    assert not entry.view
    nested = {"args": (({"tensor": 0}, {"tensor": 1}), -1)}
    joined = ops.get("aten.cat.default").reference(X, X, **nested)
    assert torch.equal(joined, torch.cat([X, X], -1))


@pytest.mark.parametrize(
    "target",
    [
        torch.ops.aten.add_.Tensor,  # writes
        torch.ops.aten.view.default,  # aliases
        torch.ops.aten.var_mean.correction,  # two results
        torch.add,  # no overload of ATen's
    ],
)
def test_other_aten_operators_are_refused(target: Any) -> None:
    assert ops.aten_name(target) is None


@pytest.mark.parametrize("name", ["lstm", "aten.add_.Tensor", "aten.nothing.default", "aten.add"])
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(InvalidPlan, match="another version"):
        ops.get(name)


@pytest.mark.parametrize("shape", [(1, 2, 3, 32), (2, 16, 16, 64), (1, 1, 1, 64)])
def test_group_norm_keeps_its_digits_far_from_zero(shape: tuple[int, ...]) -> None:
    """A mean of thirty deviations, and images of few pixels: float32 against float64."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator) + 30
    weight, bias = (torch.randn(shape[-1], generator=generator) for _ in range(2))
    attrs: dict[str, Any] = {"groups": shape[-1] // 2, "eps": 1e-5}
    exact = ops.group_norm(x.double(), weight.double(), bias.double(), **attrs)
    result = ops.group_norm(x, weight, bias, **attrs)
    if shape[1:3] != (1, 1):  # of two values per group the difference itself is rounded
        assert float((result - exact).norm() / exact.norm()) < 1e-5
    assert result.shape == x.shape and result.isfinite().all()


def test_a_program_is_rounded_once() -> None:
    """What float16 could not hold on the way, and a float64 that stays one."""
    x = torch.tensor([300.0, 2050.0], dtype=torch.float16)
    steps = [(MUL, 0, 0, 0), (SCALE, 1, 1, 2**-8)]
    assert ops.pointwise(x, **program(*steps, dtype=torch.float16)).tolist() == [351.5, 16416.0]
    wide = torch.tensor([1 + 2**-40], dtype=torch.float64)
    kept = ops.pointwise(wide, **program((SCALE, 0, 0, 1.0), dtype=torch.float64))
    assert torch.equal(kept, wide)


def test_an_unknown_instruction_is_refused() -> None:
    with pytest.raises(InvalidPlan, match="no operator 99"):
        ops.pointwise(X, **program((99, 0, 0, 0)))
