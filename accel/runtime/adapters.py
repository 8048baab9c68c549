"""LoRAs near the device: the tensors of those that were used last need not be fetched again.

A rank-32 LoRA of SDXL has some 1,500 tensors, 200 to 400 MB, which any change of its strength asks
for. What is kept is a copy of the adapter whose patches have their tensors on the device, or in
pinned RAM; what they compute is the same bit for bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..plan.memory import align
from ..tensorfile import TensorInfo
from .transfer import HostCopy, Transfer

if TYPE_CHECKING:
    from .weights import Adapter, Patch


class InRam:
    """Those of some tensors that are in RAM, each once, as a source.

    Those that are not in one piece are left out: products can depend on how factors lie.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        found: dict[int, Tensor] = {}
        for tensor in tensors:
            if tensor.device.type == "cpu" and tensor.is_contiguous():
                found[id(tensor)] = tensor
        self.tensors = {str(number): tensor for number, tensor in enumerate(found.values())}

    @property
    def bytes(self) -> int:
        """Bytes of a copy of them."""
        return sum(align(tensor.nbytes) for tensor in self.tensors.values())

    def brought(self, transfer: Transfer, copy: HostCopy | None = None) -> dict[int, Tensor]:
        """Copies on the device, by `id` of the tensors. Raises `torch.OutOfMemoryError`.

        copy: one of this source, which they are made of instead.
        """
        copies = transfer.bring(list(self.tensors), self if copy is None else copy)
        return {id(tensor): copies[name] for name, tensor in self.tensors.items()}

    def within(self, copy: HostCopy) -> dict[int, Tensor]:
        """What stands for them in a copy of this source, by `id` of the tensors."""
        return {id(tensor): copy.read(name) for name, tensor in self.tensors.items()}

    def read(self, name: str) -> Tensor:
        """The tensor itself."""
        return self.tensors[name]

    def stored(self, name: str) -> TensorInfo:
        """Its shape and dtype."""
        tensor = self.tensors[name]
        return TensorInfo(tuple(tensor.shape), tensor.dtype)

    def read_into(self, name: str, out: Tensor) -> None:
        """Copy it into `out`, of its shape and dtype."""
        out.copy_(self.tensors[name])


class Near:
    """An adapter with copies in place of tensors in RAM. It does not keep the adapter alive.

    moved: the copies by `id` of the tensors. kept: what they lie in, if that is RAM.
    """

    def __init__(
        self, adapter: Adapter, moved: Mapping[int, Tensor], kept: HostCopy | None = None
    ) -> None:
        self.name, self.kept = adapter.name, kept
        self.patches: Mapping[str, Patch] = {
            name: _moved(patch, moved) for name, patch in adapter.patches.items()
        }


def tensors_of(adapter: Adapter, order: Iterable[str] | None = None) -> Iterator[Tensor]:
    """All that its patches hold, in the order of the parameters that are given."""
    for name in adapter.patches if order is None else order:
        if name in adapter.patches:
            yield from _tensors(adapter.patches[name])


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors of a patch, or of a part of one."""
    if isinstance(value, Tensor):
        yield value
    for part in _parts(value).values():
        yield from _tensors(part)


def _moved(value: Any, moved: Mapping[int, Tensor]) -> Any:
    """A patch, or a part of one, with other tensors in place of those whose `id` is in `moved`."""
    if isinstance(value, Tensor):
        return moved.get(id(value), value)
    parts = {name: _moved(part, moved) for name, part in _parts(value).items()}
    if isinstance(value, tuple):
        return tuple(parts.values())
    return dataclasses.replace(value, **parts) if parts else value


def _parts(value: Any) -> Mapping[str, Any]:
    if isinstance(value, tuple):
        return {str(number): part for number, part in enumerate(value)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return {}
