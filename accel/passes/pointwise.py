"""Chains of pointwise operators, left over between the large ones, as one operator each.

A chain is written as a program of numbers (`ops.pointwise`) that one kernel runs in a single pass:
nothing between its operators goes through memory, and nothing is rounded before the end. The
sinusoidal embedding of the timestep is such a chain too: its cosines and sines lie side by side.
"""

from __future__ import annotations

from itertools import accumulate
from math import isfinite
from typing import Any

import torch
from torch.fx import Graph, Node

from .. import ops
from ..ops.pointwise import (
    ADD,
    COS,
    EXP,
    GELU,
    GELU_TANH,
    MUL,
    OFFSET,
    OPERANDS,
    SCALE,
    SILU,
    SIN,
    SPLIT,
)
from ..plan.recipe import Literal
from . import ir
from .phases import partition_phases

aten = torch.ops.aten

INSTRUCTIONS = 32
"""Instructions of one program: a kernel holds every intermediate value in registers."""

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_HOISTED = ("static", "prompt")

_UNARY: dict[Any, int] = {
    ops.silu: SILU,
    aten.sin.default: SIN,
    aten.cos.default: COS,
    aten.exp.default: EXP,
}
_BINARY: dict[Any, int] = {
    ops.add: ADD,
    ops.mul: MUL,
    aten.add.Tensor: ADD,
    aten.mul.Tensor: MUL,
}
_GELU = {"none": GELU, "tanh": GELU_TANH}

_COPY = -1
"""No instruction: a change of dtype, needless where all is float32."""

_CHEAP = (_COPY, ADD, MUL, SCALE, OFFSET)
"""What may as well be computed again for every row that its result is broadcast to."""

_Instruction = tuple[int, tuple[Node, ...], float]
"""Operator, the tensors that it reads, and its number."""


def fuse_pointwise(graph: Graph) -> None:
    """Fuse each pointwise call with those before it whose results go nowhere else.

    What is kept from step to step (`phases.py`) and what is not stay apart.
    """
    _move_reshapes(graph)
    partition_phases(graph)
    fused: set[Node] = set()
    for root in reversed(list(graph.nodes)):
        if root not in fused and (_instruction(root) or _parts(root)):
            fused.update(_fuse(graph, root))
    ir.erase_dead_calls(graph)


def _instruction(node: Node) -> _Instruction | None:
    """What a pointwise call computes, if programs have it."""
    if node.op != "call_function" or not ir.is_tensor(node):
        return None
    reads = tuple(value for value in node.args if isinstance(value, Node))
    if not all(ir.is_tensor(n) and ir.dtype(n) in _FLOATS for n in (node, *reads)):
        return None
    if node.target is ops.cast:
        return _COPY, reads, 0
    if node.target is ops.gelu:
        return _GELU[ir.attribute(node, "approximate")], reads, 0
    if node.target in _UNARY:
        return _UNARY[node.target], reads, 0
    if len(node.args) != 2 or node.kwargs:
        return None
    if len(reads) == 2:
        return (_BINARY[node.target], reads, 0) if node.target in _BINARY else None
    return _with_number(node.target, reads, node.args[1]) if reads else None


def _with_number(target: Any, reads: tuple[Node, ...], number: Any) -> _Instruction | None:
    """A tensor and a number."""
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not isfinite(number):
        return None
    if target is aten.add.Tensor:
        return OFFSET, reads, float(number)
    if target is aten.mul.Tensor:
        return SCALE, reads, float(number)
    if target is aten.div.Tensor and number != 0:
        return SCALE, reads, 1 / number
    return None


def _parts(node: Node) -> list[Node]:
    """What a plain concatenation joins; nothing if the node is none."""
    if not ir.is_call(node, ops.concat) or ir.dtype(node) not in _FLOATS:
        return []
    tensors = ir.tensors(node)
    parts = [part for part in tensors[::2] if part is not None]
    plain = not any(tensors[1::2]) and all(isinstance(ir.shape(p)[-1], int) for p in parts)
    return parts if plain else []


# Reshapes.


def _move_reshapes(graph: Graph) -> None:
    """Let pointwise calls read one another, not through a reshape that only adds or drops ones.

    The reshape goes before the call, which then works in the other shape.
    """
    reshapes = ir.calls(graph, ops.reshape)
    while reshapes:
        node = reshapes.pop()
        call = ir.source(node)
        found = _instruction(call)
        if found is None or ir.only_user(call) is not node:
            continue
        if not any(map(_instruction, node.users)):
            continue
        size, shape = ir.shape(call), ir.shape(node)
        if [n for n in size if n != 1] != [n for n in shape if n != 1]:
            continue
        if any(ir.shape(x) != size for x in found[1]):
            continue
        with graph.inserting_before(node):
            moved = {
                x: ir.emit(graph, ops.reshape, [x], {"shape": shape}, shape=shape)
                for x in dict.fromkeys(found[1])
            }
            args = tuple(moved[x] if isinstance(x, Node) else x for x in call.args)
            new = graph.call_function(call.target, args, dict(call.kwargs))  # type: ignore[arg-type]
        new.meta.update(shape=shape, dtype=ir.dtype(node))
        ir.replace(node, new)
        graph.erase_node(call)
        reshapes += moved.values()


# Fusion.


class _Misfit(Exception):
    """The program cannot be written with this member in it."""

    def __init__(self, member: Node) -> None:
        self.member = member


def _fuse(graph: Graph, root: Node) -> list[Node]:
    """Replace `root` and what it can take in by one call; returns the calls taken in."""
    left_out: set[Node] = set()
    while len(members := _members(root, left_out)) > 1:
        program = _Program(root, members)
        try:
            numbers = program.write()
        except _Misfit as misfit:
            if misfit.member is root:
                break
            left_out.add(misfit.member)
            continue
        with graph.inserting_before(root):
            attrs = {"program": numbers, "dtype": ir.dtype(root)}
            new = ir.emit(graph, ops.pointwise, program.operands(graph), attrs, like=root)
        new.meta["phase"] = root.meta["phase"]
        ir.replace(root, new)
        return members
    return []


def _members(root: Node, left_out: set[Node]) -> list[Node]:
    """`root` and all before it that only members read, in the order of joining."""
    members = [root]
    grown = True
    while grown:
        grown = False
        for reader in list(members):
            for node in reader.all_input_nodes:
                if node not in members and node not in left_out and _joins(node, members):
                    members.append(node)
                    grown = True
    return members


def _joins(node: Node, members: list[Node]) -> bool:
    found = _instruction(node)
    if found is None and not _parts(node):
        return False
    if any(user not in members for user in node.users):
        return False
    if (node.meta["phase"] in _HOISTED) != (members[0].meta["phase"] in _HOISTED):
        return False
    cheap = found is not None and found[0] in _CHEAP
    return cheap or all(_parts(user) or ir.shape(user) == ir.shape(node) for user in node.users)


class _Program:
    """The program of some members, of which the first gives the result.

    Under a concatenation, the literals of all parts (such as the same frequencies twice) are put
    side by side in one, so that every operand is as wide as the result, or one wide.
    """

    def __init__(self, root: Node, members: list[Node]) -> None:
        self._root, self._members = root, members
        self._joined: Node | None = None
        self._inputs: list[Node | int] = []  # a tensor, or which constants of all parts
        self._constants: list[list[Node]] = []  # of each part
        self._code: list[tuple[int, int, int, float]] = []
        self._values: dict[tuple[Node, int | None], int] = {}

    def write(self) -> tuple[int | float, ...]:
        """The numbers. Values are referred to as ~index of an input, or index of a result."""
        result = self._value(self._root, None)
        counts = {len(constants) for constants in self._constants}
        if self._joined is not None and (len(counts) > 1 or 0 in counts):
            raise _Misfit(self._joined)
        if len(self._inputs) > OPERANDS or not 0 < len(self._code) <= INSTRUCTIONS:
            raise _Misfit(self._members[-1])
        assert result == len(self._code) - 1, "the last instruction's result is the program's"

        def place(value: int) -> int:
            return ~value if value < 0 else value + len(self._inputs)

        return tuple(
            number for code, a, b, last in self._code for number in (code, place(a), place(b), last)
        )

    def operands(self, graph: Graph) -> list[Node]:
        """The tensors that the program reads."""
        return [self._stack(graph, x) if isinstance(x, int) else x for x in self._inputs]

    def _stack(self, graph: Graph, index: int) -> Node:
        columns = [constants[index] for constants in self._constants]
        values = tuple(v for node in columns for v in node.meta["recipe"].values)
        recipe = Literal(values, (len(values),))
        return ir.constant(graph, recipe, ir.dtype(columns[0]), f"{columns[0].name}_stacked")

    def _value(self, node: Node, part: int | None) -> int:
        """A member's result, where it is needed for that part of the concatenation."""
        if (node, part) not in self._values:
            self._values[node, part] = self._result(node, part)
        return self._values[node, part]

    def _result(self, node: Node, part: int | None) -> int:
        if parts := _parts(node):
            return self._join(node, parts, part)
        found = _instruction(node)
        assert found is not None
        code, reads, number = found
        values = [
            self._value(x, part) if x in self._members else self._input(x, node, part)
            for x in reads
        ]
        return values[0] if code == _COPY else self._emit(code, values[0], values[-1], number)

    def _emit(self, code: int, a: int, b: int, number: float) -> int:
        instruction = (code, a, b, number)
        if instruction not in self._code:
            self._code.append(instruction)
        return self._code.index(instruction)

    def _join(self, node: Node, parts: list[Node], part: int | None) -> int:
        if self._joined is not None or part is not None:
            raise _Misfit(node)
        self._joined, self._constants = node, [[] for _ in parts]
        values = [
            self._value(x, k) if x in self._members else self._input(x, node, k)
            for k, x in enumerate(parts)
        ]
        starts = list(accumulate(ir.shape(x)[-1] for x in parts))
        result = values.pop()
        for value, start in zip(reversed(values), reversed(starts[:-1]), strict=True):
            result = self._emit(SPLIT, value, result, start)
        return result

    def _input(self, node: Node, reader: Node, part: int | None) -> int:
        key: Node | int = node
        index = self._constant(node, part)
        if index is not None:
            key = index
        elif part is not None and ir.shape(node)[-1:] != (1,):
            assert self._joined is not None
            raise _Misfit(self._joined)
        elif not _lies_under(node, self._root):
            raise _Misfit(reader)
        if key not in self._inputs:
            self._inputs.append(key)
        return ~self._inputs.index(key)

    def _constant(self, node: Node, part: int | None) -> int | None:
        """Which of its part's constants a literal row is, if it is as wide as the part."""
        if part is None or not isinstance(node.meta.get("recipe"), Literal):
            return None
        assert self._joined is not None
        width = ir.shape(_parts(self._joined)[part])[-1]
        if ir.shape(node)[-1:] != (width,) or any(size != 1 for size in ir.shape(node)[:-1]):
            return None
        constants = self._constants[part]
        if node not in constants:
            constants.append(node)
        return constants.index(node)


def _lies_under(node: Node, root: Node) -> bool:
    """Whether the tensor is laid out and broadcast as the kernel can read it.

    Of the result's shape, or the same for every row, or for every row of an image; as wide or one
    wide.
    """
    if ir.is_call(node, ops.permute) or ir.is_call(node, ops.expand):
        return False
    rank = ir.rank(root)
    shape = (1,) * (rank - ir.rank(node)) + ir.shape(node)
    if not rank or shape[-1] not in (1, ir.shape(root)[-1]):
        return False
    lead, whole = shape[:-1], ir.shape(root)[:-1]
    per_image = lead[:1] == whole[:1] and all(size == 1 for size in lead[1:])
    return lead == whole or per_image or all(size == 1 for size in lead)
