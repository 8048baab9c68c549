"""Each pass on graphs built by hand: it fires, it refuses, and the numbers stay what they were."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import sympy
import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from accel import capture, ops
from accel.ops.pointwise import OPERANDS
from accel.passes import PASSES, ir, run_passes
from accel.passes.attention import fuse_attention
from accel.passes.canonicalize import canonicalize
from accel.passes.controlnet import fold_controlnet
from accel.passes.dead_code import remove_dead_code
from accel.passes.deduplicate import deduplicate
from accel.passes.epilogue import fuse_epilogues
from accel.passes.fold_constants import LIMIT, fold_constants
from accel.passes.geglu import fuse_geglu
from accel.passes.layout import TO_FIRST, TO_LAST, to_channels_last
from accel.passes.merge_linears import merge_linears
from accel.passes.norm_activation import fuse_norm_activation
from accel.passes.norm_shift import fuse_norm_shift
from accel.passes.phases import partition_phases
from accel.passes.pointwise import INSTRUCTIONS, fuse_pointwise
from accel.passes.upsample import fold_upsample
from accel.passes.views import simplify_views
from accel.plan.recipe import Literal, Param, places
from accel.plan.schema import Input

aten = torch.ops.aten
assert capture  # registers the markers

PLAIN = {"activation": "none"}
CONV = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1}
NORM = {"groups": 2, "eps": 1e-5, "activation": "none"}


class Build:
    """A graph of concrete sizes. Calls get their shape and dtype by running on `meta`."""

    def __init__(self) -> None:
        self.graph = Graph()
        self.values: dict[str, torch.Tensor] = {}
        self.generator = torch.Generator().manual_seed(0)

    def input(
        self, name: str, *shape: int, phase: str = "step", dtype: torch.dtype = torch.float32
    ) -> Node:
        node = self.graph.placeholder(name)
        node.meta.update(shape=shape, dtype=dtype, input=Input(name, (), "", phase))
        self.values[name] = torch.randn(shape, generator=self.generator).to(dtype)
        return node

    def constant(self, name: str, *shape: int) -> Node:
        node = self.graph.placeholder(name)
        node.meta.update(shape=shape, dtype=torch.float32, recipe=Param(name, shape))
        self.values[name] = torch.randn(shape, generator=self.generator)
        return node

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        node = self.graph.call_function(target, args, kwargs)

        def meta(n: Node) -> Any:
            if "shapes" in n.meta:
                return [torch.empty(shape, device="meta") for shape in n.meta["shapes"]]
            return torch.empty(ir.shape(n), dtype=ir.dtype(n), device="meta")

        made = target(*map_arg(args, meta), **map_arg(kwargs, meta))
        if isinstance(made, torch.Tensor):
            node.meta.update(shape=tuple(made.shape), dtype=made.dtype)
        else:
            node.meta["shapes"] = [tuple(part.shape) for part in made]
        return node

    def linear(self, x: Node, name: str, columns: int, bias: bool = True) -> Node:
        weight = self.constant(f"{name}_weight", columns, ir.shape(x)[-1])
        return self.call(
            ops.linear,
            x,
            weight,
            self.constant(f"{name}_bias", columns) if bias else None,
            None,
            **PLAIN,
        )

    def conv(self, x: Node, name: str, channels: int) -> Node:
        weight = self.constant(f"{name}_weight", channels, 3, 3, ir.shape(x)[-1])
        return self.call(
            ops.conv2d, x, weight, self.constant(f"{name}_bias", channels), None, None, **CONV
        )

    def slice(self, x: Node, dim: int, start: int, length: int) -> Node:
        return self.call(ops.slice_dim, x, dim=dim, start=start, length=length)

    def run(self) -> Any:
        """The outputs, with constants made from the source's parameters by their recipes."""
        tensors = {}
        for node in self.graph.nodes:
            if ir.is_constant(node):
                tensors[node.name] = torch.empty(ir.shape(node))
                for source, place in places(node.meta["recipe"], tensors[node.name]):
                    if isinstance(source, Param):
                        place.copy_(self.values[source.name])
                    else:
                        place.copy_(torch.tensor(source.values).view(source.shape))
            elif node.op == "placeholder" and node.name in self.values:
                tensors[node.name] = self.values[node.name]
        return ir.interpret(self.graph, {}, tensors)

    def after(self, rewrite: Callable[[Graph], None], *outputs: Node) -> Counter[str]:
        """Apply a pass, check that outputs, shapes and dtypes stay, and count the calls left."""
        sinks = [node for node in self.graph.nodes if node.op == "call_function" and not node.users]
        self.graph.output(tuple(outputs or sinks))
        order = [node for node in self.graph.nodes if node.op == "placeholder"]
        for node in reversed(order):  # tests declare constants where they use them
            next(iter(self.graph.nodes)).prepend(node)
        before = self.run()
        rewrite(self.graph)
        self.graph.lint()
        for left, right in zip(before, self.run(), strict=True):
            assert left.dtype == right.dtype
            torch.testing.assert_close(right, left, rtol=1e-5, atol=1e-5)
        self.check_annotations()
        return self.count()

    def check_annotations(self) -> None:
        metas: dict[Node, torch.Tensor] = {}
        for node in self.graph.nodes:
            if node.op == "placeholder":
                metas[node] = torch.empty(ir.shape(node), dtype=ir.dtype(node), device="meta")
            elif node.op == "call_function":
                metas[node] = node.target(
                    *map_arg(node.args, metas.__getitem__),
                    **map_arg(node.kwargs, metas.__getitem__),
                )
                if ir.is_tensor(node):
                    assert tuple(metas[node].shape) == ir.shape(node), node.format_node()
                    assert metas[node].dtype == ir.dtype(node), node.format_node()

    def count(self) -> Counter[str]:
        """Calls by name; those of ATen with their overload."""
        calls = [node.target for node in self.graph.nodes if node.op == "call_function"]
        return Counter(t.__name__ if ops.of(t) else str(t).replace("aten.", "") for t in calls)


@pytest.fixture
def b() -> Build:
    return Build()


# canonicalize


@pytest.mark.parametrize(
    ("target", "args", "kwargs", "expected"),
    [
        (aten.contiguous.default, (), {}, {}),
        (aten.clone.default, (), {"memory_format": torch.contiguous_format}, {}),
        (aten.dropout.default, (0.5, False), {}, {}),
        (aten.to.dtype, (torch.float32,), {}, {}),
        (aten.expand.default, ([-1, -1, 4, 6],), {}, {}),
        (aten.slice.Tensor, (2, 0, 9223372036854775807), {}, {}),
        (aten.slice.Tensor, (), {}, {}),
        (aten.mul.Tensor, (1.0,), {}, {}),
        (aten.div.Tensor, (1,), {}, {}),
        (aten.to.dtype, (torch.float16,), {}, {"cast": 1}),
        (aten._to_copy.default, (), {"dtype": torch.float64}, {"cast": 1}),
        (aten.view.default, ([2, 12, 6],), {}, {"reshape": 1}),
        (aten.reshape.default, ([-1],), {}, {"reshape": 1}),
        (aten.unsqueeze.default, (-1,), {}, {"reshape": 1}),
        (aten.squeeze.default, (), {}, {"reshape": 1}),
        (aten.squeeze.dim, (0,), {}, {"reshape": 1}),
        (aten.flatten.using_ints, (1,), {}, {"reshape": 1}),
        (aten.unflatten.int, (3, [2, 3]), {}, {"reshape": 1}),
        (aten.permute.default, ([0, -1, 1, 2],), {}, {"permute": 1}),
        (aten.transpose.int, (1, -1), {}, {"permute": 1}),
        (aten.movedim.int, (1, 3), {}, {"permute": 1}),
        (aten.expand.default, ([5, 2, 3, 4, 6],), {}, {"expand": 1}),
        (aten.slice.Tensor, (-1, 1, 4), {}, {"slice_dim": 1}),
        (aten.slice.Tensor, (3, 2, -1), {}, {"slice_dim": 1}),
        (aten.silu.default, (), {}, {"silu": 1}),
        (aten.gelu.default, (), {}, {"gelu": 1}),
        (aten.gelu.default, (), {"approximate": "tanh"}, {"gelu": 1}),
        (aten.layer_norm.default, ([6],), {}, {"layer_norm": 1}),
        (aten.layer_norm.default, ([6], None, None, 0.1), {}, {"layer_norm": 1}),
        # refused
        (aten.slice.Tensor, (1, 0, 3, 2), {}, {"slice.Tensor": 1}),
        (aten.slice.Tensor, (3, -4, 5), {}, {"slice.Tensor": 1}),
        (aten.mul.Tensor, (2.0,), {}, {"mul.Tensor": 1}),
        (aten.div.Tensor, (2,), {}, {"div.Tensor": 1}),
        (aten.add.Tensor, (1,), {}, {"add.Tensor": 1}),
        (aten.layer_norm.default, ([4, 6],), {}, {"layer_norm.default": 1}),
    ],
)
def test_canonical_form(b: Build, target: Any, args: Any, kwargs: Any, expected: Any) -> None:
    x = b.input("x", 2, 3, 4, 6)
    if target in (aten.squeeze.default, aten.squeeze.dim):
        x = b.input("y", 1, 3, 1)
    result = b.call(target, x, *args, **kwargs)
    assert b.after(canonicalize, result) == expected


def test_dropout_in_training_is_kept(b: Build) -> None:
    b.graph.output(b.call(aten.dropout.default, b.input("x", 2, 3), 0.5, True))
    canonicalize(b.graph)
    assert b.count() == {"dropout.default": 1}


def test_division_that_changes_the_dtype_is_kept(b: Build) -> None:
    x = b.input("x", 2, 3, dtype=torch.int64)
    assert b.after(canonicalize, b.call(aten.div.Tensor, x, 1)) == {"div.Tensor": 1}


def test_binary_operators(b: Build) -> None:
    x, y = b.input("x", 2, 3, 4), b.input("y", 3, 1)
    b.call(aten.add.Tensor, x, y)
    b.call(aten.mul.Tensor, y, x)
    assert b.after(canonicalize) == {"add": 1, "mul": 1}


def test_scaled_and_promoting_adds_stay(b: Build) -> None:
    x, half = b.input("x", 2, 3), b.input("half", 2, 3, dtype=torch.float16)
    b.call(aten.add.Tensor, x, x, alpha=2)
    b.call(aten.add.Tensor, x, half)
    b.call(aten.mul.Tensor, half, x)
    assert b.after(canonicalize) == {"add.Tensor": 2, "mul.Tensor": 1}


@pytest.mark.parametrize(
    ("target", "args", "kwargs"),
    [
        (aten.chunk.default, (3, -1), {}),  # 7 columns: 3, 3, 1
        (aten.chunk.default, (2,), {"dim": 1}),
        (aten.split.Tensor, (2, 1), {}),
        (aten.split_with_sizes.default, ([1, 4], 1), {}),
    ],
)
def test_partitions_become_slices(b: Build, target: Any, args: Any, kwargs: Any) -> None:
    parts = b.call(target, b.input("x", 2, 5, 7), *args, **kwargs)
    count = len(parts.meta["shapes"])
    picked = [b.call(operator.getitem, parts, index) for index in (*range(count), -1)]
    assert b.after(canonicalize, *picked) == {"slice_dim": count + 1}


@pytest.mark.parametrize(("dim", "permutes"), [(-1, 0), (3, 0), (1, 3), (0, 3), (-2, 3)])
@pytest.mark.parametrize("target", [aten.cat.default, aten.concat.default])
def test_concatenation(b: Build, target: Any, dim: int, permutes: int) -> None:
    shape = [2, 3, 4, 5]
    x = b.input("x", *shape)
    shape[dim] = 7
    joined = b.call(target, [x, b.input("y", *shape)], dim)
    found = b.after(canonicalize, joined)
    assert (found["concat"], found["permute"], found.total()) == (1, permutes, 1 + permutes)


def test_concatenation_of_two_dtypes_stays(b: Build) -> None:
    x, y = b.input("x", 2, 3), b.input("y", 2, 3, dtype=torch.float16)
    assert b.after(canonicalize, b.call(aten.cat.default, [x, y])) == {"cat.default": 1}


def test_linear(b: Build) -> None:
    x, weight, bias = b.input("x", 2, 5, 3), b.constant("w", 4, 3), b.constant("c", 4)
    b.call(aten.linear.default, x, weight)
    b.call(aten.linear.default, x, weight, bias)
    assert b.after(canonicalize) == {"linear": 2}


def test_a_product_with_a_vector_stays(b: Build) -> None:
    b.call(aten.linear.default, b.input("x", 2, 3), b.constant("w", 3))
    assert b.after(canonicalize) == {"linear.default": 1}


def test_markers(b: Build) -> None:
    x = b.input("x", 2, 4, 5, 6)
    residual = torch.ops.switchyard.residual.default
    marked = [b.graph.call_function(residual, (x, name)) for name in ("residual_1", "adapter_0")]
    for node in marked:
        node.meta.update(x.meta)
    q, k = b.input("q", 2, 9, 12), b.input("k", 2, 5, 12)
    attended = b.graph.call_function(torch.ops.switchyard.attention.default, (q, k, k, 3))
    attended.meta.update(q.meta)
    b.graph.output((*marked, attended))
    canonicalize(b.graph)
    b.graph.lint()
    entries = {n.name: n.meta["input"] for n in b.graph.nodes if n.op == "placeholder"}
    assert entries["adapter_0"].optional and not entries["x"].optional
    (call,) = ir.calls(b.graph, ops.attention)
    assert call.kwargs == {"heads": 3, "scale": 0.5}
    with_residual = {**b.values, "residual_1": torch.ones(2, 4, 5, 6)}
    first, second, _ = ir.interpret(b.graph, {}, with_residual)
    assert torch.equal(first, b.values["x"] + 1) and torch.equal(second, b.values["x"])


def test_sizes_that_the_exporter_computes_are_left_alone(b: Build) -> None:
    x = b.input("x", 2, 3)
    size = b.graph.call_function(aten.sym_size.int, (x, 0))
    scaled = b.graph.call_function(aten.mul.Tensor, (x, size))
    scaled.meta.update(x.meta)
    b.graph.output(scaled)
    canonicalize(b.graph)
    fold_constants(b.graph)
    assert b.count() == {"sym_size.int": 1, "mul.Tensor": 1}


# fold_constants


def test_frequencies_are_folded(b: Build) -> None:
    table = b.call(aten.exp.default, b.call(aten.arange.start, 0, 8, dtype=torch.float32))
    result = b.call(ops.mul, b.input("x", 2, 8), table)
    assert b.after(fold_constants, result) == {"mul": 1}
    (literal,) = (n for n in b.graph.nodes if ir.is_constant(n))
    values = torch.tensor(literal.meta["recipe"].values)
    assert torch.equal(values, torch.exp(torch.arange(8.0)))


def test_what_depends_on_inputs_or_the_compute_dtype_is_not_folded(b: Build) -> None:
    half = b.call(aten.arange.start, 0, 8, dtype=torch.float16)
    from_half = b.call(ops.cast, half, dtype=torch.float32)
    size = sympy.Symbol("height", integer=True, positive=True)
    symbolic = b.graph.call_function(aten.ones.default, ([3],))
    symbolic.meta.update(shape=(size,), dtype=torch.float32)
    large = b.call(aten.zeros.default, [LIMIT + 1])
    integers = b.call(aten.arange.start, 0, 8)
    parameter = b.call(aten.exp.default, b.constant("w", 3))
    b.graph.output((from_half, symbolic, large, integers, parameter))
    before = b.count()
    fold_constants(b.graph)
    assert b.count() == before


def test_folding_does_not_depend_on_the_default_device(b: Build) -> None:
    table = b.call(aten.arange.start, 0, 8, dtype=torch.float32)
    b.graph.output(b.call(ops.mul, b.input("x", 2, 8), table))
    with torch.device("meta"):
        fold_constants(b.graph)
    assert b.count() == {"mul": 1}


# deduplicate


def test_equal_calls_are_one(b: Build) -> None:
    x = b.input("x", 2, 3)
    silus = [b.call(ops.silu, x) for _ in range(3)]
    for silu in silus:
        b.call(ops.reshape, b.call(ops.add, silu, x), shape=(6,))
    outputs = [node for node in b.graph.nodes if node.target is ops.reshape]
    assert b.after(deduplicate, *outputs) == {"silu": 1, "add": 1, "reshape": 1}


def test_calls_that_differ_are_not_one(b: Build) -> None:
    x, y = b.input("x", 2, 6), b.input("y", 2, 6)
    b.call(ops.add, x, y), b.call(ops.add, y, x), b.call(ops.mul, x, y)
    b.call(ops.gelu, x), b.call(ops.gelu, x, approximate="tanh")
    b.slice(x, 1, 0, 3), b.slice(x, 1, 3, 3), b.slice(x, 0, 0, 1)
    b.call(ops.cast, x, dtype=torch.float16), b.call(ops.cast, x, dtype=torch.bfloat16)
    b.call(aten.mul.Tensor, x, 2), b.call(aten.mul.Tensor, x, 2.0), b.call(aten.mul.Tensor, x, True)
    assert b.after(deduplicate).total() == 13


# to_channels_last


def channels_first(b: Build, target: Any, *args: Any, **kwargs: Any) -> Counter[str]:
    b.call(target, *args, **kwargs)
    return b.after(to_channels_last)


@pytest.mark.parametrize(
    "arguments",
    [(), ([2, 2], [1, 1]), ([2], [1]), ([1, 1], [0, 2], [2, 1]), ([1, 1], [0, 0], [1, 1], 2)],
    ids=str,
)
def test_convolutions(b: Build, arguments: Any) -> None:
    groups = arguments[3] if len(arguments) > 3 else 1
    x, weight = b.input("x", 2, 4, 9, 7), b.constant("w", 6, 4 // groups, 3, 3)
    found = channels_first(b, aten.conv2d.default, x, weight, b.constant("c", 6), *arguments)
    assert found == {"conv2d": 1, "permute": 2}


def test_pointwise_convolution_is_a_matrix_product(b: Build) -> None:
    x, weight = b.input("x", 2, 4, 5, 7), b.constant("w", 6, 4, 1, 1)
    assert channels_first(b, aten.conv2d.default, x, weight) == {"linear": 1, "permute": 2}


@pytest.mark.parametrize("arguments", [([2, 2],), ([1, 1], [1, 1]), ([1, 1], [0, 0], [1, 1], 2)])
def test_other_convolutions_of_one_pixel_are_not(b: Build, arguments: Any) -> None:
    groups = arguments[3] if len(arguments) > 3 else 1
    x, weight = b.input("x", 2, 4, 5, 7), b.constant("w", 6, 4 // groups, 1, 1)
    found = channels_first(b, aten.conv2d.default, x, weight, None, *arguments)
    assert found == {"conv2d": 1, "permute": 2}


def test_convolution_with_a_computed_filter_stays(b: Build) -> None:
    x, weight = b.input("x", 2, 4, 5, 7), b.call(ops.silu, b.constant("w", 6, 4, 3, 3))
    found = channels_first(b, aten.conv2d.default, x, weight)
    assert found["conv2d.default"] == 1 and not found["conv2d"]


@pytest.mark.parametrize("affine", [True, False])
def test_group_norm(b: Build, affine: bool) -> None:
    x = b.input("x", 2, 4, 5, 7)
    rest = [b.constant("w", 4), b.constant("c", 4), 1e-3] if affine else []
    assert channels_first(b, aten.group_norm.default, x, 2, *rest) == {
        "group_norm": 1,
        "permute": 2,
    }


def test_group_norm_of_tokens_stays(b: Build) -> None:
    found = channels_first(b, aten.group_norm.default, b.input("x", 2, 4, 5), 2)
    assert found == {"group_norm.default": 1}


@pytest.mark.parametrize(
    "arguments", [([10, 14], None), ([9, 13], None), (None, [2.0, 2.0]), (None, [3.0, 1.0])]
)
def test_upsampling(b: Build, arguments: Any) -> None:
    found = channels_first(b, aten.upsample_nearest2d.vec, b.input("x", 2, 3, 5, 7), *arguments)
    assert found == {"upsample_nearest": 1, "permute": 2}


def test_upsampling_by_a_fraction_stays(b: Build) -> None:
    """7 * 1.6 is 11.2: pixel 9 of 11 is pixel 5 by the scale, 5.7 by the sizes."""
    found = channels_first(
        b, aten.upsample_nearest2d.vec, b.input("x", 2, 3, 5, 7), None, [1.6, 1.6]
    )
    assert found["upsample_nearest2d.vec"] == 1 and not found["upsample_nearest"]


@pytest.mark.parametrize(
    "shape", [(2, 4, 5, 7), (2, 4, 1, 1), (1, 1, 5, 7), (4, 1, 1), (5, 7), (7,), ()]
)
def test_pointwise_operators_follow(b: Build, shape: Sequence[int]) -> None:
    norm = b.call(aten.group_norm.default, b.input("x", 2, 4, 5, 7), 2)
    other = b.input("y", *shape)
    result = b.call(ops.silu, b.call(ops.add, other, norm))
    result = b.call(aten.group_norm.default, result, 2)
    found = b.after(lambda graph: (to_channels_last(graph), simplify_views(graph)), result)
    assert found["group_norm"] == 2 and found["add"] == found["silu"] == 1
    (silu,) = ir.calls(b.graph, ops.silu)
    assert ir.shape(silu) == (2, 5, 7, 4)


def test_operators_away_from_images_do_not_follow(b: Build) -> None:
    found = channels_first(b, ops.add, b.input("x", 2, 4, 5, 7), b.input("y", 2, 4, 5, 7))
    assert found == {"add": 1}


# simplify_views


def test_permutations_compose_and_cancel(b: Build) -> None:
    x = b.input("x", 2, 3, 4, 5)
    there = b.call(ops.permute, x, dims=TO_LAST)
    back = b.call(ops.permute, there, dims=TO_FIRST)
    turned = b.call(ops.permute, there, dims=(1, 0, 3, 2))
    assert b.after(simplify_views, back, turned) == {"permute": 1}
    (call,) = ir.calls(b.graph, ops.permute)
    assert call.kwargs["dims"] == (2, 0, 1, 3) and ir.source(call).name == "x"


def test_a_permutation_of_ones_is_a_reshape(b: Build) -> None:
    x = b.call(ops.reshape, b.input("x", 2, 8), shape=(2, 8, 1, 1))
    turned = b.call(ops.permute, x, dims=TO_LAST)
    found = b.after(simplify_views, turned)
    assert found == {"reshape": 1}
    moved = Build()
    x = moved.input("x", 1, 3, 4, 1)
    assert moved.after(simplify_views, moved.call(ops.permute, x, dims=(0, 2, 1, 3))) == {
        "permute": 1
    }


def test_reshapes_collapse(b: Build) -> None:
    x = b.input("x", 2, 3, 4)
    once = b.call(ops.reshape, x, shape=(6, 4))
    b.call(ops.silu, b.call(ops.reshape, once, shape=(24,)))
    b.call(ops.silu, b.call(ops.reshape, once, shape=(2, 3, 4)))
    assert b.after(simplify_views) == {"reshape": 1, "silu": 2}


def test_a_reshape_across_a_permutation_stays(b: Build) -> None:
    x = b.call(ops.permute, b.input("x", 2, 3, 4), dims=(0, 2, 1))
    assert b.after(simplify_views, b.call(ops.reshape, x, shape=(2, 12)))["permute"] == 1


def parts(b: Build, cuts: Sequence[tuple[int, int]], dim: int = 1) -> list[Node | None]:
    x = b.input("x", 6, 6)
    pairs: list[Node | None] = []
    for start, length in cuts:
        pairs += [b.slice(x, dim, start, length), None]
    return pairs


def test_what_is_cut_and_joined_again_is_whole(b: Build) -> None:
    joined = b.call(ops.concat, *parts(b, [(0, 2), (2, 1), (3, 3)]))
    assert b.after(simplify_views, b.call(ops.silu, joined)) == {"silu": 1}


@pytest.mark.parametrize(
    ("cuts", "dim"),
    [
        ([(2, 4), (0, 2)], 1),
        ([(0, 2), (2, 3)], 1),
        ([(1, 5)], 1),
        ([(0, 3), (0, 3)], 1),
        ([(0, 3), (3, 3)], 0),
    ],
)
def test_other_joins_stay(b: Build, cuts: Any, dim: int) -> None:
    assert b.after(simplify_views, b.call(ops.concat, *parts(b, cuts, dim)))["concat"] == 1


def test_a_join_with_a_residual_stays(b: Build) -> None:
    pairs = parts(b, [(0, 2), (2, 4)])
    pairs[3] = b.input("r", 6, 4)
    assert b.after(simplify_views, b.call(ops.concat, *pairs))["concat"] == 1


@pytest.mark.parametrize(
    ("start", "length", "joins"), [(0, 2, 0), (2, 5, 0), (7, 3, 1), (1, 3, 1), (0, 7, 1)]
)
def test_cuts_at_joins(b: Build, start: int, length: int, joins: int) -> None:
    """The third part brings a residual, so it is no bare part."""
    x, y, z = b.input("x", 4, 2), b.input("y", 4, 5), b.input("z", 4, 3)
    joined = b.call(ops.concat, x, None, y, None, z, b.input("r", 4, 3))
    cut = b.call(ops.silu, b.slice(joined, 1, start, length))
    assert b.after(simplify_views, cut)["concat"] == joins


def test_a_cut_along_another_dimension_stays(b: Build) -> None:
    x, y = b.input("x", 4, 2), b.input("y", 4, 5)
    joined = b.call(ops.concat, x, None, y, None)
    assert b.after(simplify_views, b.slice(joined, 0, 0, 2)) == {"concat": 1, "slice_dim": 1}


# fuse_attention


def heads(b: Build, x: Node, count: int, dims: tuple[int, ...] = (0, 2, 1, 3)) -> Node:
    batch, length, width = ir.shape(x)
    split = b.call(ops.reshape, x, shape=(batch, length, count, width // count))
    return b.call(ops.permute, split, dims=dims)


def attention(b: Build, tokens: int = 9, **kwargs: Any) -> tuple[Node, Node]:
    """(attention, its heads joined) of q [2, 9, 12] and k, v [2, tokens, 12], three heads."""
    q, k, v = b.input("q", 2, 9, 12), b.input("k", 2, tokens, 12), b.input("v", 2, tokens, 12)
    split = [heads(b, x, 3) for x in (q, k, v)]
    result = b.call(aten.scaled_dot_product_attention.default, *split, **kwargs)
    turned = b.call(ops.permute, result, dims=(0, 2, 1, 3))
    return result, b.call(ops.reshape, turned, shape=(2, 9, 12))


@pytest.mark.parametrize("tokens", [9, 5])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention_is_fused(b: Build, tokens: int, scale: float | None) -> None:
    _, joined = attention(b, tokens, scale=scale)
    assert b.after(fuse_attention, joined) == {"attention": 1}
    (call,) = ir.calls(b.graph, ops.attention)
    assert call.kwargs == {"heads": 3, "scale": 0.5 if scale is None else scale}


@pytest.mark.parametrize("reason", ["causal", "mask", "grouped"])
def test_other_attention_stays(b: Build, reason: str) -> None:
    if reason == "mask":
        _, joined = attention(b, attn_mask=b.input("mask", 9, 9))
    elif reason == "causal":
        _, joined = attention(b, is_causal=True)
    else:
        q = heads(b, b.input("q", 2, 9, 12), 3)
        kv = [heads(b, b.input(name, 2, 9, 4), 1) for name in ("k", "v")]
        result = b.call(aten.scaled_dot_product_attention.default, q, *kv, enable_gqa=True)
        turned = b.call(ops.permute, result, dims=(0, 2, 1, 3))
        joined = b.call(ops.reshape, turned, shape=(2, 9, 12))
    assert b.after(fuse_attention, joined)["scaled_dot_product_attention.default"] == 1


def test_attention_with_dropout_stays(b: Build) -> None:
    b.graph.output(attention(b, dropout_p=0.1)[1])
    fuse_attention(b.graph)
    assert not ir.calls(b.graph, ops.attention)


def test_attention_to_keys_of_one_batch_stays(b: Build) -> None:
    q = heads(b, b.input("q", 2, 9, 12), 3)
    kv = [heads(b, b.input(name, 1, 9, 12), 3) for name in ("k", "v")]
    result = b.call(aten.scaled_dot_product_attention.default, q, *kv)
    turned = b.call(ops.permute, result, dims=(0, 2, 1, 3))
    joined = b.call(ops.reshape, turned, shape=(2, 9, 12))
    assert not b.after(fuse_attention, joined)["attention"]


def test_attention_with_wider_values_stays(b: Build) -> None:
    q, k = (heads(b, b.input(name, 2, 9, 12), 3) for name in "qk")
    v = heads(b, b.input("v", 2, 9, 18), 3)
    result = b.call(aten.scaled_dot_product_attention.default, q, k, v)
    turned = b.call(ops.permute, result, dims=(0, 2, 1, 3))
    joined = b.call(ops.reshape, turned, shape=(2, 9, 18))
    assert not b.after(fuse_attention, joined)["attention"]


def test_attention_that_others_read_stays(b: Build) -> None:
    result, joined = attention(b)
    assert not b.after(fuse_attention, joined, b.call(ops.silu, result))["attention"]


def test_attention_over_other_dimensions_stays(b: Build) -> None:
    q, k, v = (heads(b, b.input(name, 2, 3, 12), 3, (0, 1, 2, 3)) for name in "qkv")
    result = b.call(aten.scaled_dot_product_attention.default, q, k, v)
    turned = b.call(ops.permute, result, dims=(0, 2, 1, 3))
    joined = b.call(ops.reshape, turned, shape=(2, 3, 12))
    assert not b.after(fuse_attention, joined)["attention"]


# fuse_geglu


def gated(
    b: Build, columns: int = 12, swap: bool = False, order: int = 1, **attrs: Any
) -> dict[str, Node]:
    projection = b.linear(b.input("x", 2, 9, 4), "proj", columns)
    halves = [b.slice(projection, 2, start, columns // 2) for start in (0, columns // 2)]
    hidden, gate = halves[::-1] if swap else halves
    activated = b.call(ops.gelu, gate, **{"approximate": "none", **attrs})
    product = b.call(ops.mul, *(hidden, activated)[::order])
    return {
        "projection": projection,
        "hidden": hidden,
        "gate": gate,
        "activated": activated,
        "product": product,
    }


@pytest.mark.parametrize("order", [1, -1])
def test_geglu_is_fused(b: Build, order: int) -> None:
    nodes = gated(b, order=order)
    assert b.after(fuse_geglu, nodes["product"]) == {"linear": 1}
    (call,) = ir.calls(b.graph, ops.linear)
    assert call.kwargs == {"activation": "geglu"}


@pytest.mark.parametrize("reader", ["projection", "hidden", "gate", "activated"])
def test_geglu_that_others_read_stays(b: Build, reader: str) -> None:
    nodes = gated(b)
    found = b.after(fuse_geglu, nodes["product"], b.call(ops.silu, nodes[reader]))
    assert found["gelu"] == found["mul"] == 1


@pytest.mark.parametrize(
    "changes", [{"approximate": "tanh"}, {"swap": True}, {"columns": 13}], ids=str
)
def test_other_gates_stay(b: Build, changes: Any) -> None:
    assert b.after(fuse_geglu, gated(b, **changes)["product"])["gelu"] == 1


def test_a_gate_by_silu_stays(b: Build) -> None:
    projection = b.linear(b.input("x", 2, 9, 4), "proj", 12)
    hidden, gate = (b.slice(projection, 2, start, 6) for start in (0, 6))
    assert b.after(fuse_geglu, b.call(ops.mul, hidden, b.call(ops.silu, gate)))["mul"] == 1


def test_a_gate_from_another_projection_stays(b: Build) -> None:
    x = b.input("x", 2, 9, 4)
    one, two = b.linear(x, "one", 12), b.linear(x, "two", 12)
    hidden, gate = b.slice(one, 2, 0, 6), b.slice(two, 2, 6, 6)
    gelu = b.call(ops.gelu, gate, approximate="none")
    assert b.after(fuse_geglu, b.call(ops.mul, hidden, gelu))["mul"] == 1


def test_halves_of_rows_stay(b: Build) -> None:
    projection = b.linear(b.input("x", 2, 12, 4), "proj", 12)
    hidden, gate = (b.slice(projection, 1, start, 6) for start in (0, 6))
    gelu = b.call(ops.gelu, gate, approximate="none")
    assert b.after(fuse_geglu, b.call(ops.mul, hidden, gelu))["mul"] == 1


# fuse_norm_activation


def norm(b: Build) -> Node:
    x = b.input("x", 2, 5, 7, 4)
    return b.call(ops.group_norm, x, b.constant("w", 4), b.constant("c", 4), **NORM)


def test_norm_and_silu_are_fused(b: Build) -> None:
    assert b.after(fuse_norm_activation, b.call(ops.silu, norm(b))) == {"group_norm": 1}


def test_a_norm_that_others_read_stays(b: Build) -> None:
    node = norm(b)
    assert b.after(fuse_norm_activation, b.call(ops.silu, node), node)["silu"] == 1


def test_norm_and_gelu_stay(b: Build) -> None:
    assert b.after(fuse_norm_activation, b.call(ops.gelu, norm(b)))["gelu"] == 1


def test_a_second_silu_stays(b: Build) -> None:
    twice = b.call(ops.silu, b.call(ops.silu, norm(b)))
    assert b.after(lambda g: (fuse_norm_activation(g), fuse_norm_activation(g)), twice)["silu"] == 1


# fuse_epilogues


def test_embedding_and_residual_join_the_convolution(b: Build) -> None:
    x, embedding = b.input("x", 2, 5, 7, 4), b.input("e", 2, 4)
    column = b.call(ops.reshape, embedding, shape=(2, 1, 1, 4))
    result = b.call(ops.add, b.call(ops.add, b.conv(x, "a", 4), column), x)
    assert b.after(fuse_epilogues, result) == {"conv2d": 1}
    (call,) = ir.calls(b.graph, ops.conv2d)
    assert [n.name for n in ir.tensors(call)[3:] if n] == ["e", "x"]


def test_an_embedding_that_is_no_vector_is_made_one(b: Build) -> None:
    x, column = b.input("x", 2, 5, 7, 4), b.input("e", 2, 1, 1, 4)
    result = b.call(ops.add, column, b.conv(x, "a", 4))
    assert b.after(fuse_epilogues, result) == {"conv2d": 1, "reshape": 1}


def test_of_two_products_the_later_takes_the_other(b: Build) -> None:
    x = b.input("x", 2, 9, 4)
    one, two = b.linear(x, "one", 4), b.linear(x, "two", 4)
    assert b.after(fuse_epilogues, b.call(ops.add, one, two)) == {"linear": 2}
    first, second = ir.calls(b.graph, ops.linear)
    assert ir.tensors(second)[3] is first


def test_a_residual_made_after_the_product(b: Build) -> None:
    x = b.input("x", 2, 9, 4)
    product = b.linear(x, "one", 4)
    late = b.call(ops.silu, b.call(ops.gelu, x))
    assert b.after(fuse_epilogues, b.call(ops.add, product, late)) == {
        "linear": 1,
        "gelu": 1,
        "silu": 1,
    }


def test_tokens_on_their_way_back_to_an_image(b: Build) -> None:
    image = b.input("x", 2, 3, 5, 4)
    product = b.linear(b.call(ops.reshape, image, shape=(2, 15, 4)), "out", 4)
    result = b.call(ops.add, b.call(ops.reshape, product, shape=(2, 3, 5, 4)), image)
    found = b.after(lambda g: (fuse_epilogues(g), simplify_views(g)), result)
    assert found == {"linear": 1, "reshape": 3}  # tokens, residual as tokens, and back


def test_a_gated_product_takes_a_residual(b: Build) -> None:
    x, weight = b.input("x", 2, 9, 4), b.constant("w", 8, 4)
    product = b.call(ops.linear, x, weight, None, None, activation="geglu")
    assert b.after(fuse_epilogues, b.call(ops.add, x, product)) == {"linear": 1}


@pytest.mark.parametrize(
    "shape",
    [(1, 5, 7, 4), (2, 1, 1, 1), (2, 1, 7, 4), (1, 1, 1, 4), (4,), (3, 2, 5, 7, 4)],
    ids=str,
)
def test_other_shapes_do_not_join_a_convolution(b: Build, shape: Sequence[int]) -> None:
    result = b.call(ops.add, b.conv(b.input("x", 2, 5, 7, 4), "a", 4), b.input("r", *shape))
    assert b.after(fuse_epilogues, result) == {"conv2d": 1, "add": 1}


@pytest.mark.parametrize("shape", [(1, 9, 4), (2, 1, 4), (2, 9, 1), (4,), (5, 2, 9, 4)], ids=str)
def test_other_shapes_do_not_join_a_product(b: Build, shape: Sequence[int]) -> None:
    result = b.call(ops.add, b.linear(b.input("x", 2, 9, 4), "a", 4), b.input("r", *shape))
    assert b.after(fuse_epilogues, result) == {"linear": 1, "add": 1}


def test_a_product_that_others_read_stays(b: Build) -> None:
    x = b.input("x", 2, 9, 4)
    product = b.linear(x, "a", 4)
    assert b.after(fuse_epilogues, b.call(ops.add, product, x), product)["add"] == 1


def test_a_reshaped_product_that_others_read_stays(b: Build) -> None:
    image = b.input("x", 2, 3, 5, 4)
    product = b.linear(b.call(ops.reshape, image, shape=(2, 15, 4)), "out", 4)
    result = b.call(ops.add, b.call(ops.reshape, product, shape=(2, 3, 5, 4)), image)
    assert b.after(fuse_epilogues, result, product)["add"] == 1


def test_a_product_added_to_itself_stays(b: Build) -> None:
    product = b.linear(b.input("x", 2, 9, 4), "a", 4)
    assert b.after(fuse_epilogues, b.call(ops.add, product, product))["add"] == 1


@pytest.mark.parametrize("kind", ["conv2d", "linear"])
def test_an_optional_residual_takes_the_place_that_is_free(b: Build, kind: str) -> None:
    x, r = b.input("x", 2, 5, 7, 4), b.input("r", 2, 5, 7, 4)
    product = b.conv(x, "a", 4) if kind == "conv2d" else b.linear(x, "a", 4)
    plain = b.call(ops.silu, product)
    b.graph.output((plain,))
    (expected,) = b.run()
    b.graph.erase_node(next(reversed(b.graph.nodes)))
    b.graph.erase_node(plain)
    result = b.call(ops.silu, b.call(ops.residual_add, product, r))
    assert b.after(fuse_epilogues, result) == {kind: 1, "silu": 1}
    del b.values["r"]  # not given: as if it had never been there
    assert torch.equal(b.run()[0], expected)


@pytest.mark.parametrize("reason", ["residual", "reader", "reshape", "other"])
def test_other_optional_residuals_stay(b: Build, reason: str) -> None:
    x, r = b.input("x", 2, 9, 4), b.input("r", 2, 9, 4)
    product = b.call(ops.silu, x) if reason == "other" else b.linear(x, "a", 4)
    outputs = [product] if reason == "reader" else []
    if reason == "residual":
        product = b.call(ops.add, product, x)
    if reason == "reshape":
        r = b.input("image", 2, 3, 3, 4)
        product = b.call(ops.reshape, product, shape=(2, 3, 3, 4))
    result = b.call(ops.residual_add, product, r)
    found = b.after(fuse_epilogues, result, *outputs)
    assert found["residual_add"] == 1 and found["add"] == 0


def test_a_second_residual_stays(b: Build) -> None:
    x, y = b.input("x", 2, 9, 4), b.input("y", 2, 9, 4)
    result = b.call(ops.add, b.call(ops.add, b.linear(x, "a", 4), x), y)
    assert b.after(fuse_epilogues, result) == {"linear": 1, "add": 1}


def test_an_embedding_after_a_residual_stays(b: Build) -> None:
    x, column = b.input("x", 2, 5, 7, 4), b.input("e", 2, 1, 1, 4)
    result = b.call(ops.add, b.call(ops.add, b.conv(x, "a", 4), x), column)
    assert b.after(fuse_epilogues, result) == {"conv2d": 1, "add": 1}


# merge_linears


def test_query_key_and_value_are_one_product(b: Build) -> None:
    x = b.input("x", 2, 9, 4)
    outputs = [
        b.linear(x, name, columns, bias=False)
        for name, columns in zip("qkv", (4, 6, 8), strict=True)
    ]
    assert b.after(merge_linears, *outputs) == {"linear": 1, "slice_dim": 3}
    (call,) = ir.calls(b.graph, ops.linear)
    assert ir.shape(call) == (2, 9, 18)


def test_biases_are_stacked_like_weights(b: Build) -> None:
    x = b.input("x", 2, 4)
    outputs = [b.linear(x, name, 3) for name in "ab"]
    assert b.after(merge_linears, *outputs) == {"linear": 1, "slice_dim": 2}


def test_products_with_and_without_bias_are_two_groups(b: Build) -> None:
    x = b.input("x", 2, 4)
    outputs = [b.linear(x, name, 3, bias=name in "ab") for name in "abcd"]
    assert b.after(merge_linears, *outputs) == {"linear": 2, "slice_dim": 4}


def test_products_far_apart_are_merged_where_the_first_stands(b: Build) -> None:
    x = b.input("x", 2, 4)
    first = b.linear(x, "a", 4)
    second = b.call(ops.add, b.linear(x, "b", 4), b.call(ops.silu, first))
    assert b.after(merge_linears, second)["linear"] == 1


@pytest.mark.parametrize("reason", ["input", "residual", "activation", "weight", "bias"])
def test_other_products_are_not_merged(b: Build, reason: str) -> None:
    x, y = b.input("x", 2, 8), b.input("y", 2, 8)
    weight, bias = b.constant("w", 8, 8), b.constant("c", 8)
    plain = b.linear(x, "a", 8)
    tensors: list[Node | None] = [x, weight, bias, None]
    attrs = PLAIN
    if reason == "input":
        tensors[0] = y
    elif reason == "residual":
        tensors[3] = y
    elif reason == "activation":
        attrs = {"activation": "geglu"}
    elif reason == "weight":
        tensors[1] = b.call(ops.silu, weight)
    elif reason == "bias":
        tensors[2] = b.call(ops.silu, bias)
    other = b.call(ops.linear, *tensors, **attrs)
    assert b.after(merge_linears, plain, other)["linear"] == 2


def test_constants_of_two_dtypes_are_not_stacked(b: Build) -> None:
    x, wide = b.input("x", 2, 8), b.constant("w", 8, 8)
    b.graph.output(
        (b.linear(x, "a", 8, bias=False), b.call(ops.linear, x, wide, None, None, **PLAIN))
    )
    wide.meta["dtype"] = torch.float64
    merge_linears(b.graph)
    assert b.count() == {"linear": 2}


# fold_controlnet


def test_residuals_are_added_by_the_concatenation(b: Build) -> None:
    """The next block reads the skip without its residual."""
    x, skip, residual = b.input("x", 2, 3), b.input("skip", 2, 4), b.input("r", 2, 4)
    deeper = b.call(ops.silu, skip)
    added = b.call(ops.residual_add, skip, residual)
    joined = b.call(ops.concat, x, None, added, None)
    assert b.after(fold_controlnet, joined, deeper) == {"concat": 1, "silu": 1}
    (call,) = ir.calls(b.graph, ops.concat)
    assert [n and n.name for n in call.args] == ["x", None, "skip", "r"]


def test_both_parts_may_bring_one(b: Build) -> None:
    x, y, r, s = (b.input(name, 2, 3) for name in "xyrs")
    sums = [b.call(ops.residual_add, *pair) for pair in ((x, r), (y, s))]
    joined = b.call(ops.concat, sums[0], None, sums[1], None)
    assert b.after(fold_controlnet, joined) == {"concat": 1}


@pytest.mark.parametrize("reason", ["reader", "twice", "pair", "plain"])
def test_other_sums_are_not_folded(b: Build, reason: str) -> None:
    x, y, r = (b.input(name, 2, 3) for name in "xyr")
    added = b.call(ops.add if reason == "plain" else ops.residual_add, y, r)
    pairs: list[Node | None] = [x, None, added, None]
    if reason == "twice":
        pairs[:2] = [added, None]
    if reason == "pair":
        pairs[3] = x
    outputs = [b.call(ops.concat, *pairs)]
    if reason == "reader":
        outputs.append(b.call(ops.silu, added))
    found = b.after(fold_controlnet, *outputs)
    assert found["add"] + found["residual_add"] == 1


# the rest


def test_dead_code_goes_and_inputs_stay(b: Build) -> None:
    x, unread, weight = b.input("x", 2, 3), b.input("unread", 2), b.constant("w", 3)
    b.call(ops.silu, b.call(ops.mul, x, weight))
    assert b.after(remove_dead_code, b.call(ops.gelu, x)) == {"gelu": 1}
    names = [node.name for node in b.graph.nodes if node.op == "placeholder"]
    assert names == ["x", "unread"] and not unread.users


def test_phases_follow_inputs(b: Build) -> None:
    prompt, time = b.input("p", 2, 3, phase="prompt"), b.input("t", 2, 3, phase="timestep")
    latent, weight = b.input("x", 2, 3), b.constant("w", 2, 3)
    calls = {
        "static": b.call(ops.silu, weight),
        "prompt": b.call(ops.mul, prompt, weight),
        "timestep": b.call(ops.silu, time),
    }
    calls["prompt+timestep"] = b.call(ops.add, calls["prompt"], calls["timestep"])
    calls["step"] = b.call(ops.add, calls["prompt+timestep"], latent)
    b.after(partition_phases, *calls.values())
    assert {name: node.meta["phase"] for name, node in calls.items()} == {n: n for n in calls}


def test_a_residual_block_from_export_to_plan_form(b: Build) -> None:
    """group norm, SiLU, 3x3, time embedding, shortcut: all passes together."""
    x, time = b.input("x", 2, 4, 5, 7), b.input("t", 2, 6, phase="timestep")
    h = b.call(
        aten.silu.default,
        b.call(aten.group_norm.default, x, 2, b.constant("g", 4), b.constant("s", 4)),
    )
    h = b.call(
        aten.conv2d.default, h, b.constant("w", 8, 4, 3, 3), b.constant("c", 8), [1, 1], [1, 1]
    )
    silu = b.call(aten.silu.default, time)
    e = b.call(aten.linear.default, silu, b.constant("ew", 8, 6), b.constant("ec", 8))
    column = b.call(aten.unsqueeze.default, b.call(aten.unsqueeze.default, e, -1), -1)
    h = b.call(aten.dropout.default, b.call(aten.add.Tensor, h, column), 0.0, False)
    shortcut = b.call(aten.conv2d.default, x, b.constant("sw", 8, 4, 1, 1), b.constant("sc", 8))
    result = b.call(aten.div.Tensor, b.call(aten.add.Tensor, shortcut, h), 1.0)
    seen: list[str] = []
    found = b.after(lambda graph: run_passes(graph, seen.append), result)
    assert found == {"group_norm": 1, "conv2d": 1, "linear": 2, "silu": 1, "permute": 2}
    assert seen == [rewrite.__name__ for rewrite in PASSES]


def test_only_one_reader_counts_as_the_only_one(b: Build) -> None:
    x = b.input("x", 2, 3)
    assert ir.only_user(x) is None
    twice = b.call(ops.add, x, x)
    assert ir.only_user(x) is None
    assert ir.only_user(b.call(ops.silu, twice)) is None
    assert ir.only_user(twice) is not None


# fuse_norm_shift


def shifted(b: Build, bias: bool = True, embedding: bool = True, **changes: Node) -> Node:
    """A group norm of a convolution that adds a slice of all time embeddings, and its bias."""
    x, weight = b.input("x", 2, 5, 7, 4), b.constant("w", 4, 3, 3, 4)
    shift = b.slice(b.input("e", 2, 12), 1, 4, 4) if embedding else None
    offset = b.constant("c", 4) if bias else None
    y = b.call(ops.conv2d, x, weight, offset, shift, changes.get("residual"), **CONV)
    return b.call(ops.group_norm, y, b.constant("g", 4), b.constant("s", 4), **NORM)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("embedding", [True, False])
def test_what_every_pixel_gets_is_added_by_the_norm(b: Build, bias: bool, embedding: bool) -> None:
    norm = shifted(b, bias, embedding)
    found = b.after(lambda g: (fuse_norm_shift(g), fuse_norm_activation(g)), b.call(ops.silu, norm))
    assert found == {"conv2d": 1, "group_norm": 1} | ({"slice_dim": 1} if embedding else {})
    (conv,), (norm,) = ir.calls(b.graph, ops.conv2d), ir.calls(b.graph, ops.group_norm)
    assert ir.tensors(conv)[2:] == (None, None, None)
    _, _, _, *addends = [n and n.name for n in ir.tensors(norm)]
    moved = ["slice_dim" if embedding else None, "c" if bias else None]
    assert addends == (moved if bias or embedding else [])


@pytest.mark.parametrize("reason", ["residual", "reader", "reshape", "linear", "twice"])
def test_what_others_need_stays_in_the_convolution(b: Build, reason: str) -> None:
    outputs: list[Node] = []
    if reason == "residual":
        outputs.append(shifted(b, residual=b.input("r", 2, 5, 7, 4)))
    elif reason == "linear":
        y = b.linear(b.input("x", 2, 5, 7, 4), "a", 4)
        outputs.append(b.call(ops.group_norm, y, b.constant("g", 4), b.constant("s", 4), **NORM))
    else:
        norm = shifted(b)
        y, *weights = ir.tensors(norm)
        outputs.append(norm)
        assert y is not None
        if reason == "reader":
            outputs.append(b.call(ops.gelu, y))
        elif reason == "twice":
            outputs.append(b.call(ops.group_norm, y, *weights, **NORM))
        elif reason == "reshape":
            tokens = b.call(ops.reshape, y, shape=(2, 35, 4))
            outputs = [b.call(ops.group_norm, tokens, *weights, **NORM)]
            b.graph.erase_node(norm)
    b.after(fuse_norm_shift, *outputs)
    assert all(len(ir.tensors(norm)) == 3 for norm in ir.calls(b.graph, ops.group_norm))
    assert all(ir.tensors(conv)[2] for conv in ir.calls(b.graph, ops.conv2d))


def test_a_norm_that_adds_already_stays(b: Build) -> None:
    norm = shifted(b)
    norm.args = (*norm.args, None, b.constant("o", 4))
    b.after(fuse_norm_shift, norm)
    (conv,) = ir.calls(b.graph, ops.conv2d)
    assert ir.tensors(conv)[2] is not None


# fuse_pointwise


def literal(b: Build, name: str, *shape: int) -> Node:
    node = b.constant(name, *shape)
    values = tuple(b.values[name].flatten().tolist())
    node.meta["recipe"] = Literal(values, shape)
    return node


def sinusoid(b: Build, **changes: Any) -> Node:
    """The timestep's embedding, as networks compute it."""
    time = b.call(ops.reshape, b.input("t", 2, phase="timestep"), shape=(2, 1))
    table = changes.get("table") or literal(b, "table", 1, 6)
    angles = b.call(ops.mul, time, table)
    sines, cosines = (b.call(f.default, angles) for f in (aten.sin, aten.cos))
    joined = b.call(ops.concat, cosines, changes.get("residual"), sines, None)
    return b.call(ops.cast, joined, dtype=torch.float16)


def test_a_chain_is_one_call(b: Build) -> None:
    x, y, scale = b.input("x", 2, 5, 7, 4), b.input("y", 2, 5, 7, 4), b.constant("w", 4)
    chain = b.call(aten.mul.Tensor, b.call(ops.silu, b.call(ops.add, x, y)), 0.5)
    chain = b.call(ops.mul, b.call(ops.gelu, chain, approximate="tanh"), scale)
    chain = b.call(aten.add.Tensor, b.call(aten.div.Tensor, chain, 4), 1)
    assert b.after(fuse_pointwise, b.call(aten.exp.default, chain)) == {"pointwise": 1}
    (call,) = ir.calls(b.graph, ops.pointwise)
    assert [n.name for n in call.all_input_nodes] == ["x", "y", "w"]
    assert all(isinstance(number, (int, float)) for number in ir.attribute(call, "program"))


def test_the_embedding_of_the_timestep_is_one_call(b: Build) -> None:
    result = sinusoid(b)
    assert b.after(fuse_pointwise, result) == {"reshape": 1, "pointwise": 1}
    (call,) = ir.calls(b.graph, ops.pointwise)
    (_, table) = ir.tensors(call)
    assert table is not None and ir.shape(table) == (12,)
    assert len(ir.attribute(call, "program")) == 4 * 4  # one product for sines and cosines


def test_three_parts_lie_side_by_side(b: Build) -> None:
    """Parts of different width, the constants of each its own."""
    column = b.input("x", 3, 5, 1)
    parts = [
        b.call(target, b.call(ops.mul, column, literal(b, f"table_{width}", width)))
        for target, width in ((ops.silu, 2), (aten.sin.default, 4), (aten.exp.default, 1))
    ]
    joined = b.call(ops.concat, parts[0], None, parts[1], None, parts[2], None)
    assert b.after(fuse_pointwise, joined) == {"pointwise": 1}


def test_a_value_used_twice_is_computed_once(b: Build) -> None:
    x = b.input("x", 2, 9, 4)
    for _ in range(20):
        x = b.call(ops.add, b.call(ops.silu, x), x)
    assert b.after(fuse_pointwise, b.call(ops.mul, x, x)) == {"pointwise": 2, "silu": 1}
    programs = [ir.attribute(n, "program") for n in ir.calls(b.graph, ops.pointwise)]
    assert [len(program) // 4 for program in programs] == [40 - INSTRUCTIONS, INSTRUCTIONS]


def test_nothing_is_rounded_on_the_way(b: Build) -> None:
    x = b.input("x", 2, 3)
    half = b.call(ops.cast, b.call(ops.silu, x), dtype=torch.float16)
    b.graph.output((b.call(ops.mul, b.call(ops.cast, half, dtype=torch.float32), x),))
    fuse_pointwise(b.graph)
    assert b.count() == {"pointwise": 1}
    expected = torch.nn.functional.silu(b.values["x"]) * b.values["x"]
    torch.testing.assert_close(b.run()[0], expected)


def test_a_reshape_of_ones_does_not_part_a_chain(b: Build) -> None:
    x, e, f = b.input("x", 2, 5, 7, 4), b.input("e", 2, 4), b.input("f", 2, 4)
    squares = b.call(ops.mul, *[b.call(ops.add, e, f)] * 2)
    column = b.call(ops.reshape, squares, shape=(2, 1, 1, 4))
    assert b.after(fuse_pointwise, b.call(ops.silu, b.call(ops.add, x, column))) == {
        "reshape": 2,
        "pointwise": 1,
    }


def test_other_reshapes_part_it(b: Build) -> None:
    x = b.call(ops.silu, b.input("x", 2, 35, 4))
    image = b.call(ops.reshape, x, shape=(2, 5, 7, 4))
    row = b.call(ops.mul, b.input("r", 2, 4), b.input("s", 4))  # would need two reshapes in one
    column = b.call(ops.reshape, row, shape=(2, 1, 1, 4))
    found = b.after(fuse_pointwise, b.call(ops.mul, image, column))
    assert found == {"silu": 1, "mul": 2, "reshape": 2}


@pytest.mark.parametrize("phase", ["prompt", "timestep"])
def test_what_is_kept_from_step_to_step_is_not_computed_in_each(b: Build, phase: str) -> None:
    x, kept = b.input("x", 2, 3), b.input("kept", 2, 3, phase=phase)
    early = b.call(ops.silu, b.call(ops.mul, kept, kept))
    assert b.after(fuse_pointwise, b.call(ops.mul, b.call(ops.gelu, x, approximate="none"), early))[
        "pointwise"
    ] == (2 if phase == "prompt" else 1)


@pytest.mark.parametrize(
    "reason",
    ["alone", "reader", "dear", "integers", "double", "broadcast", "permuted", "alpha", "zero"],
)
def test_other_calls_are_not_fused(b: Build, reason: str) -> None:
    x, y = b.input("x", 2, 5, 7, 4), b.input("y", 2, 5, 7, 4)
    first = b.call(ops.mul, x, y)
    outputs: list[Node] = []
    if reason == "reader":
        outputs.append(first)
    elif reason == "dear":  # once for every image, not for every pixel
        first = b.call(ops.silu, b.input("e", 2, 1, 1, 4))
    elif reason == "integers":
        first = b.call(ops.cast, b.input("i", 2, 5, 7, 4, dtype=torch.int64), dtype=torch.float32)
    elif reason == "double":
        first = b.call(ops.cast, b.input("d", 2, 5, 7, 4, dtype=torch.float64), dtype=torch.float32)
    elif reason == "broadcast":  # what no kernel reads
        first = b.call(ops.mul, x, b.input("r", 1, 5, 7, 4))
    elif reason == "permuted":
        first = b.call(ops.mul, x, b.call(ops.permute, b.input("p", 2, 4, 5, 7), dims=(0, 2, 3, 1)))
    elif reason == "alpha":
        first = b.call(aten.add.Tensor, x, y, alpha=2)
    elif reason == "zero":
        first = b.call(aten.div.Tensor, x, 0.0)
        b.values["x"].abs_()
    result = first if reason == "alone" else b.call(ops.add, first, y)
    assert b.after(fuse_pointwise, result, *outputs)["pointwise"] == 0


def test_a_concatenation_that_others_read_is_one_call_without_what_follows(b: Build) -> None:
    result = sinusoid(b)
    found = b.after(fuse_pointwise, result, *result.all_input_nodes)
    assert found == {"reshape": 1, "pointwise": 1, "cast": 1}


@pytest.mark.parametrize("reason", ["parameter", "residual", "wide", "narrow", "nested"])
def test_other_concatenations_stay(b: Build, reason: str) -> None:
    column = b.input("x", 2, 1)
    if reason in ("parameter", "residual"):
        table = b.constant("table", 6) if reason == "parameter" else None
        residual = b.input("r", 2, 6) if reason == "residual" else None
        result = sinusoid(b, table=table, residual=residual)
    else:
        first = b.call(ops.silu, b.input("y", 2, 6) if reason == "wide" else column)
        if reason == "nested":
            first = ir.source(sinusoid(b))
        joined = b.call(ops.concat, first, None, b.call(aten.sin.default, column), None)
        result = b.call(ops.gelu, joined, approximate="none")
    found = b.after(fuse_pointwise, result)
    assert found["concat"] == 1 and found["pointwise"] == (reason == "nested")


def test_a_program_reads_no_more_than_a_kernel_has_place_for(b: Build) -> None:
    total = b.input("x0", 2, 3)
    for k in range(1, 9):
        total = b.call(ops.add, total, b.input(f"x{k}", 2, 3))
    found = b.after(fuse_pointwise, b.call(ops.silu, total))
    assert found == {"pointwise": 2}
    assert max(len(n.args) for n in ir.calls(b.graph, ops.pointwise)) == OPERANDS


# up-sampling


def upsampled(b: Build, x: Node, *size: int) -> Node:
    return b.call(ops.upsample_nearest, x, size=size)


def test_a_convolution_reads_the_small_image(b: Build) -> None:
    large = upsampled(b, b.input("x", 2, 3, 4, 5), 6, 7)
    convolution = b.conv(large, "c", 8)
    assert b.after(fold_upsample, convolution) == {"conv2d": 1}
    assert convolution.kwargs == {**CONV, "upsample": (6, 7)}
    assert ir.source(convolution).name == "x" and ir.shape(convolution) == (2, 6, 7, 8)


def test_symbolic_sizes_are_folded_as_they_are() -> None:
    graph, (batch, height, width) = Graph(), sympy.symbols("batch height width")
    x, weight = graph.placeholder("x"), graph.placeholder("w")
    x.meta.update(shape=(batch, height, width, 4), dtype=torch.float32)
    weight.meta.update(shape=(8, 3, 3, 4), dtype=torch.float32)
    size = (2 * height, 2 * width - 1)
    large = ir.emit(graph, ops.upsample_nearest, [x], {"size": size})
    convolution = ir.emit(graph, ops.conv2d, [large, weight, None, None, None], CONV)
    graph.output(convolution)
    before = ir.shape(convolution)
    fold_upsample(graph)
    assert ir.attribute(convolution, "upsample") == size and ir.source(convolution) is x
    assert ir.shape(convolution) == before and not ir.calls(graph, ops.upsample_nearest)
    values = {"x": torch.randn(1, 3, 4, 4), "w": torch.randn(8, 3, 3, 4)}
    result = ir.interpret(graph, {"batch": 1, "height": 3, "width": 4}, values)
    assert result.shape == (1, 6, 7, 8)


@pytest.mark.parametrize("reason", ["reader", "twice", "residual", "other"])
def test_other_up_sampling_stays(b: Build, reason: str) -> None:
    x = b.input("x", 2, 3, 4, 4)
    large = upsampled(b, x, 3, 4) if reason == "twice" else upsampled(b, x, 6, 8)
    outputs = []
    if reason == "twice":  # the convolution up-samples what it reads already
        weight = b.constant("w", 4, 3, 3, 4)
        outputs = [b.call(ops.conv2d, large, weight, None, None, None, **CONV, upsample=(6, 8))]
    elif reason == "residual":
        weight, y = b.constant("w", 4, 3, 3, 4), b.input("y", 2, 6, 8, 4)
        outputs = [b.call(ops.conv2d, y, weight, None, None, large, **CONV)]
    elif reason == "reader":
        outputs = [b.conv(large, "c", 4), b.call(ops.silu, large)]
    else:
        outputs = [b.call(ops.silu, large)]
    assert b.after(fold_upsample, *outputs)["upsample_nearest"] == 1
