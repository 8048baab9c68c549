"""Capture: a host's network as an ATen graph with symbolic sizes, from a twin without weights.

One export serves every batch, image size and prompt length, with ControlNet or without. The live
module is never traced: a twin of the same structure on the `meta` device is, so no weight is read
or copied.

What ControlNets and T2I-Adapters add is no input of the export. A `ResidualMarker` stands in for
each; adding it to a tensor leaves one `switchyard::residual` call in the graph, whose shape is the
tensor's own. So residuals bring no sizes of their own to be proved equal, and being optional costs
nothing.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch.fx import Graph, Node

from . import ops
from .errors import UnsupportedModel
from .models.twin import Twin, TwinInput
from .plan.lower import CAPTURE_DTYPE
from .plan.recipe import Param
from .plan.schema import Input

Progress = Callable[[float, str], None]
"""Called with the fraction done, 0 to 1, and what is being done."""

_library = torch.library.Library("switchyard", "DEF")
_library.define("residual(Tensor x, str name) -> Tensor")
_library.define("attention(Tensor query, Tensor key, Tensor value, int heads) -> Tensor")


@torch.library.register_fake("switchyard::residual")
def _fake_residual(x: torch.Tensor, name: str) -> torch.Tensor:
    return torch.empty_like(x)


@torch.library.register_fake("switchyard::attention")
def _fake_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int
) -> torch.Tensor:
    return query.new_empty(query.shape)


class ResidualMarker:
    """Stands for the optional input `name` while a twin is traced."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __radd__(self, x: torch.Tensor) -> torch.Tensor:
        marked: torch.Tensor = torch.ops.switchyard.residual(x, self.name)
        return marked


def capture(twin: Twin, progress: Progress | None = None) -> Graph:
    """The twin's ATen graph, with `meta["shape"]` and `meta["dtype"]` on each node (`passes.ir`).

    Raises `UnsupportedModel` when the network cannot be traced, or only for a fixed size.
    """
    examples = tuple(_example(entry, twin.example) for entry in twin.inputs)
    dynamic = tuple(
        {i: torch.export.Dim.AUTO for i, size in enumerate(entry.shape) if isinstance(size, str)}
        for entry in twin.inputs
    )
    with _neutral(), _watched(twin.module, progress):
        try:
            exported = torch.export.export(
                twin.module, examples, strict=False, dynamic_shapes=(dynamic,)
            )
        except Exception as error:  # torch.export raises many kinds; each means the same to a host
            reason = str(error).strip().splitlines()
            raise UnsupportedModel(
                f"the network cannot be captured: {type(error).__name__}: "
                f"{reason[0] if reason else 'no reason given'}"
            ) from error
    return _import(exported, twin)


def _example(entry: TwinInput, sizes: Mapping[str, int]) -> torch.Tensor:
    shape = [
        size if isinstance(size, int) else _factor(size)[0] * sizes[_factor(size)[1]]
        for size in entry.shape
    ]
    dtype = torch.float32 if entry.dtype == "float32" else CAPTURE_DTYPE
    return torch.empty(shape, dtype=dtype, device="meta")


def _factor(size: str) -> tuple[int, str]:
    """(8, "height") of "8*height", (1, "height") of "height"."""
    factor, _, name = size.rpartition("*")
    return int(factor or 1), name


def _import(exported: torch.export.ExportedProgram, twin: Twin) -> Graph:
    """Exported graph to pass graph: placeholders become constants and inputs, symbols get names."""
    graph = exported.graph_module.graph
    signature = exported.graph_signature
    if signature.lifted_tensor_constants:
        name = signature.lifted_tensor_constants[0]
        raise UnsupportedModel(f"the network holds a tensor outside its parameters, {name}")
    stored = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    entries = iter(twin.inputs)
    inputs: dict[Node, TwinInput] = {}
    symbols: dict[sympy.Symbol, sympy.Expr] = {}
    for node in graph.nodes:
        if node.op == "placeholder" and node.name not in stored:
            inputs[node] = next(entries)
            _bind(node, inputs[node], symbols)
    _make_pure(graph)
    for node in graph.nodes:
        _annotate(node, symbols)
    for node in list(graph.nodes):
        if node in inputs:
            entry = inputs[node]
            dtype = "" if entry.dtype == "compute" else entry.dtype
            node.meta["input"] = Input(entry.name, (), dtype, entry.phase)
        elif node.op == "placeholder":
            own = stored[node.name]
            if own in twin.names:
                node.meta["recipe"] = Param(twin.names[own], tuple(node.meta["shape"]))
            elif node.users:
                raise UnsupportedModel(f"the network has a parameter more than its family, {own}")
            else:
                graph.erase_node(node)
    return graph


def _bind(node: Node, entry: TwinInput, symbols: dict[sympy.Symbol, sympy.Expr]) -> None:
    """Give the symbol of each named size of an input its name, or its multiple of one."""
    for size, name in zip(node.meta["val"].shape, entry.shape, strict=True):
        if isinstance(name, int):
            continue
        factor, base = _factor(name)
        named = factor * sympy.Symbol(base, integer=True, positive=True)
        expression = _expression(size)
        if expression.is_Symbol:
            symbols.setdefault(expression, named)
        found = expression.xreplace(symbols)
        if found != named:
            raise UnsupportedModel(f"the network works only where {name} is {found}")


def _make_pure(graph: Graph) -> None:
    """Turn `x.add_(y)` into `x = x + y`; refuse other writes, and what is random.

    The graph is not functional yet. A write is harmless to undo where it hits a whole fresh result
    of which nothing else is a view: then later readers of the old value read the new one.
    """
    for node in list(graph.nodes):
        target = node.target
        if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
            continue
        if torch.Tag.nondeterministic_seeded in target.tags and _is_random(target, node):
            raise UnsupportedModel(f"the network is random: it calls {target}")
        if not target._schema.is_mutable:
            continue
        functional = _functional(target)
        written = node.args[0]
        if functional is None or not isinstance(written, Node) or not _is_alone(written, node):
            raise UnsupportedModel(f"the network writes to a tensor in place: it calls {target}")
        node.target = functional
        for user in list(written.users):
            if user > node:
                user.replace_input_with(written, node)


def _is_random(target: torch._ops.OpOverload, node: Node) -> bool:
    """Whether a call of an operator that may be random is: dropout of nothing is not."""
    given = ops.aten_arguments(target, node.args, node.kwargs)
    return not (given.get("train") is False or given.get("dropout_p") == 0)


def _functional(target: torch._ops.OpOverload) -> torch._ops.OpOverload | None:
    """`aten.add.Tensor` for `aten.add_.Tensor`: same arguments, a fresh result."""
    namespace, _, name = target._schema.name.partition("::")
    packet = getattr(getattr(torch.ops, namespace), name.removesuffix("_"), None)
    functional = getattr(packet, target._overloadname, None)
    if not name.endswith("_") or functional is None or functional._schema.is_mutable:
        return None
    writes = [argument.alias_info is not None for argument in target._schema.arguments]
    return functional if writes == [True] + [False] * (len(writes) - 1) else None


def _is_alone(node: Node, write: Node) -> bool:
    """Whether no other value shares the memory of `node` when `write` writes to it."""

    def may_alias(call: Node) -> bool:
        target = call.target
        if call.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
            return True
        aliases = any(value.alias_info is not None for value in target._schema.returns)
        return aliases or torch.Tag.maybe_aliasing_or_mutating in target.tags

    return not may_alias(node) and not any(may_alias(user) for user in node.users if user < write)


def _annotate(node: Node, symbols: Mapping[sympy.Symbol, sympy.Expr]) -> None:
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        node.meta["shape"] = _shape(value, symbols)
        node.meta["dtype"] = value.dtype
    elif isinstance(value, (tuple, list)) and all(isinstance(v, torch.Tensor) for v in value):
        node.meta["shapes"] = [_shape(v, symbols) for v in value]


def _shape(
    value: torch.Tensor, symbols: Mapping[sympy.Symbol, sympy.Expr]
) -> tuple[int | sympy.Expr, ...]:
    sizes: list[int | sympy.Expr] = []
    for size in map(_expression, value.shape):
        unknown = size.free_symbols - symbols.keys()
        if unknown:
            raise UnsupportedModel(f"a size of the network depends on data ({size})")
        size = size.xreplace(symbols)
        sizes.append(int(size) if size.is_Integer else size)
    return tuple(sizes)


def _expression(size: int | torch.SymInt) -> sympy.Expr:
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


@contextlib.contextmanager
def _watched(module: torch.nn.Module, progress: Progress | None) -> Iterator[None]:
    """Report progress as the trace enters the twin's leaves, each of which runs about once."""
    if progress is None:
        yield
        return
    leaves: Sequence[torch.nn.Module] = [m for m in module.modules() if not any(m.children())]
    entered: set[int] = set()

    def enter(leaf: torch.nn.Module, arguments: Any) -> None:
        entered.add(id(leaf))
        progress(0.95 * len(entered) / len(leaves), "tracing the network")

    hooks = [leaf.register_forward_pre_hook(enter) for leaf in leaves]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def _neutral() -> Iterator[None]:
    """Leave the host's autocast and inference mode, and keep the exporter's chatter to itself."""
    logger = logging.getLogger("torch.export")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast("cuda", enabled=False),
            torch.autocast("cpu", enabled=False),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
