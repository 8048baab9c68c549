"""Capture: a host's network as an ATen graph with symbolic sizes, from a twin without weights.

One export serves every batch, image size and prompt length, with ControlNet or without. The live module is
never traced: a twin of the same structure on the `meta` device is, so no weight is read or copied.

ControlNet residuals are no inputs of the export. A `ResidualMarker` stands in for each; adding it to a
tensor leaves one `switchyard::residual` call in the graph, whose shape is the tensor's own. So residuals
bring no sizes of their own to be proved equal, and being optional costs nothing.
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

from .errors import UnsupportedModel
from .models.twin import Twin, TwinInput
from .plan.lower import CAPTURE_DTYPE
from .plan.recipe import Param
from .plan.schema import Input

Progress = Callable[[float, str], None]
"""Called with the fraction done, 0 to 1, and what is being done."""

_library = torch.library.Library("switchyard", "DEF")
_library.define("residual(Tensor x, int index) -> Tensor")
_library.define("attention(Tensor query, Tensor key, Tensor value, int heads) -> Tensor")


@torch.library.register_fake("switchyard::residual")
def _fake_residual(x: torch.Tensor, index: int) -> torch.Tensor:
    return torch.empty_like(x)


@torch.library.register_fake("switchyard::attention")
def _fake_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int
) -> torch.Tensor:
    return query.new_empty(query.shape)


class ResidualMarker:
    """Stands for the `index`-th ControlNet residual while a twin is traced."""

    def __init__(self, index: int) -> None:
        self.index = index

    def __radd__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.switchyard.residual(x, self.index)


def capture(twin: Twin, progress: Progress | None = None) -> Graph:
    """The twin's ATen graph, with `meta["shape"]` and `meta["dtype"]` on every node (see `passes.ir`).

    Raises `UnsupportedModel` when the network cannot be traced, or only for a fixed size.
    """
    examples = tuple(_example(entry, twin.example) for entry in twin.inputs)
    dynamic = tuple(
        {i: torch.export.Dim.AUTO for i, size in enumerate(entry.shape) if isinstance(size, str)}
        for entry in twin.inputs
    )
    with _quiet(), _watched(twin.module, progress), torch.inference_mode(False), torch.no_grad():
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
    shape = [sizes[size] if isinstance(size, str) else size for size in entry.shape]
    dtype = torch.float32 if entry.dtype == "float32" else CAPTURE_DTYPE
    return torch.empty(shape, dtype=dtype, device="meta")


def _import(exported: torch.export.ExportedProgram, twin: Twin) -> Graph:
    """Exported graph to pass graph: placeholders become constants and inputs, symbols get names."""
    graph = exported.graph_module.graph
    signature = exported.graph_signature
    stored = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    lifted = signature.inputs_to_lifted_tensor_constants
    user_inputs = iter(twin.inputs)
    symbols: dict[sympy.Symbol, sympy.Symbol] = {}
    inputs: list[tuple[Node, TwinInput]] = []
    for node in graph.nodes:
        if node.op != "placeholder":
            continue
        if node.name in lifted:
            raise UnsupportedModel(f"the network holds a constant tensor, {lifted[node.name]}")
        if node.name not in stored:
            entry = next(user_inputs)
            inputs.append((node, entry))
            _bind(node, entry, symbols)
    for node in graph.nodes:
        if node.op != "output":
            _annotate(node, symbols)
    for node in graph.nodes:
        if node.op == "placeholder" and node.name in stored:
            name = twin.names.get(stored[node.name], stored[node.name])
            node.meta["recipe"] = Param(name, tuple(node.meta["shape"]))
    for node, entry in inputs:
        dtype = "" if entry.dtype == "compute" else entry.dtype
        node.meta["input"] = Input(entry.name, (), dtype, entry.phase)
    return graph


def _bind(node: Node, entry: TwinInput, symbols: dict[sympy.Symbol, sympy.Symbol]) -> None:
    """Give the symbol of each named size of an input its name."""
    for size, name in zip(node.meta["val"].shape, entry.shape, strict=True):
        if not isinstance(name, str):
            continue
        if isinstance(size, int):
            raise UnsupportedModel(f"the network works for {name} = {size} only")
        expression = size.node.expr
        if expression.is_Symbol:
            symbols.setdefault(expression, sympy.Symbol(name, integer=True, positive=True))


def _annotate(node: Node, symbols: dict[sympy.Symbol, sympy.Symbol]) -> None:
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        node.meta["shape"] = _shape(value, symbols)
        node.meta["dtype"] = value.dtype
    elif isinstance(value, (tuple, list)) and all(isinstance(v, torch.Tensor) for v in value):
        node.meta["shapes"] = [_shape(v, symbols) for v in value]


def _shape(value: torch.Tensor, symbols: dict[sympy.Symbol, sympy.Symbol]) -> tuple[Any, ...]:
    sizes: list[Any] = []
    for size in value.shape:
        if isinstance(size, int):
            sizes.append(size)
            continue
        expression = size.node.expr
        unknown = expression.free_symbols - symbols.keys()
        if unknown:
            raise UnsupportedModel(f"a size of the network depends on data ({expression})")
        expression = expression.xreplace(symbols)
        sizes.append(int(expression) if expression.is_Integer else expression)
    return tuple(sizes)


@contextlib.contextmanager
def _watched(module: torch.nn.Module, progress: Progress | None) -> Iterator[None]:
    """Report progress as the trace enters the twin's leaf modules, each of which runs about once."""
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
def _quiet() -> Iterator[None]:
    """Keep the exporter's chatter, which tells a user nothing, out of the host's console."""
    logger = logging.getLogger("torch.export")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
