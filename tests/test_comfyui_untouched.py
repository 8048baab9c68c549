"""Whether tensors are still their file's: mapped, copied and cast ones, whatever was written."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from accel.hosts.comfyui import untouched
from accel.hosts.comfyui.untouched import digest, equal, parts_to_compare
from accel.tensorfile import TensorFile

mapping = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells of pages")
Tensors = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def _as_hosts_do() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture
def file(tmp_path: Path) -> TensorFile:
    generator = torch.Generator().manual_seed(0)
    sizes = {"small": (3,), "large": (700, 500), "odd": (1001,), "even": (64, 64), "none": (0, 4)}
    values = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
    values["half"] = torch.randn(50, 999, generator=generator).half()
    save_file(values, tmp_path / "some name.safetensors")
    return TensorFile(tmp_path / "some name.safetensors")


@pytest.fixture
def mapped(file: TensorFile) -> Tensors:
    return {name: file.read(name) for name in file.tensors}


def is_the_files(file: TensorFile, values: Tensors) -> bool:
    return equal(file, parts_to_compare(file, values))


@mapping
def test_of_what_is_mapped_nothing_need_be_compared(file: TensorFile, mapped: Tensors) -> None:
    assert not [part for part in parts_to_compare(file, mapped) if part.end > part.begin]
    for value in mapped.values():
        value.double().sum()  # its pages come into memory
    assert not [part for part in parts_to_compare(file, mapped) if part.end > part.begin]


@mapping
@pytest.mark.parametrize("name", ["small", "large", "odd", "even", "half"])
@pytest.mark.parametrize("where", [0, 1, 0.371, 0.5, -1])
def test_a_number_that_was_written_is_seen_though_nothing_counts_writes(
    file: TensorFile, mapped: Tensors, name: str, where: float
) -> None:
    flat = mapped[name].data.view(-1)
    index = int(where * flat.numel()) if isinstance(where, float) else where
    before = flat[index].clone()
    flat[index] += 0.25
    parts = parts_to_compare(file, mapped)
    assert sum(part.end - part.begin for part in parts) < 4 * untouched.PAGESIZE
    assert not equal(file, parts)
    first = digest(file, parts)
    flat[index] += 0.25
    assert digest(file, parts_to_compare(file, mapped)) != first
    flat[index] = before
    parts = parts_to_compare(file, mapped)
    assert parts and equal(file, parts), "it was written to, and is the same again"


def test_copies_are_compared_whole(file: TensorFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(untouched, "BLOCK_BYTES", 1 << 12)
    copies = {name: file.read(name).clone() for name in file.tensors}
    assert is_the_files(file, copies)
    for name, value in copies.items():
        for index in {0, value.numel() // 3, value.numel() - 1} if value.numel() else ():
            kept = value.view(-1)[index].clone()
            value.data.view(-1)[index] += 0.25
            assert not is_the_files(file, copies), (name, index)
            value.view(-1)[index] = kept
    assert is_the_files(file, copies)


def test_what_was_cast_is_compared_with_the_files_cast(
    file: TensorFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(untouched, "BLOCK_BYTES", 1 << 12)
    cast = {name: file.read(name).half() for name in file.tensors}
    assert is_the_files(file, cast)
    first = digest(file, parts_to_compare(file, cast))
    cast["large"].view(-1)[123_456] += 0.25
    assert not is_the_files(file, cast)
    assert digest(file, parts_to_compare(file, cast)) != first
    wide = {name: file.read(name).double() for name in file.tensors}
    assert is_the_files(file, wide)
    wide["half"].view(-1)[-1] += 1e-9
    assert not is_the_files(file, wide)


@mapping
def test_tensors_that_changed_places_are_not_the_files(file: TensorFile, mapped: Tensors) -> None:
    flat = mapped["large"].view(-1)
    swapped = mapped | {"small": flat[:3], "even": flat[4096:8192].view(64, 64)}
    assert not is_the_files(file, swapped)


def test_another_file_in_its_place_is_another(file: TensorFile, mapped: Tensors) -> None:
    """The mapping is of the one that was there."""
    other = {name: torch.ones(info.shape, dtype=info.dtype) for name, info in file.tensors.items()}
    save_file(other, file.path.with_suffix(".part"))
    file.path.with_suffix(".part").replace(file.path)
    assert not is_the_files(file, mapped), "it is not read from any more"
    assert not is_the_files(TensorFile(file.path), mapped)


@mapping
def test_where_pages_are_not_told_of_all_is_compared(
    file: TensorFile, mapped: Tensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(untouched.os, "pread", lambda *given: b"")
    parts = parts_to_compare(file, mapped)
    assert sum(part.end - part.begin for part in parts) == sum(v.nbytes for v in mapped.values())
    assert equal(file, parts)
    mapped["large"].data[10, 10] += 1
    assert not is_the_files(file, mapped)
