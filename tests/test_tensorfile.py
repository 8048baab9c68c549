"""Tensor files: what the header gives, lazy reading, and one clear line for each kind of damage."""

import json
import os
import struct

import pytest
import torch
from safetensors.torch import save_file

from accel.errors import InvalidFile
from accel.tensorfile import TensorFile, TensorInfo, read_header


@pytest.fixture
def tensors():
    return {
        "a.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
        "b": torch.linspace(-1, 1, 5, dtype=torch.bfloat16),
        "scalar": torch.tensor(3.5, dtype=torch.float16),
        "empty": torch.zeros(0, 4),
        "fp8": torch.ones(4).to(torch.float8_e4m3fn),
    }


@pytest.fixture
def path(tmp_path, tensors):
    save_file(tensors, tmp_path / "some.safetensors", metadata={"ss_base": "sd15"})
    return tmp_path / "some.safetensors"


def test_header_and_tensors(path, tensors):
    file = TensorFile(path)
    assert file.path == path
    assert file.metadata == {"ss_base": "sd15"}
    assert file.tensors["b"] == TensorInfo((5,), torch.bfloat16)
    assert file.tensors == {
        name: TensorInfo(tuple(value.shape), value.dtype) for name, value in tensors.items()
    }
    assert read_header(str(path)) == file.tensors
    for name, value in tensors.items():
        read = file.read(name)
        assert read.dtype == value.dtype and read.device.type == "cpu"
        assert torch.equal(read.float(), value.float())
    with pytest.raises(KeyError):
        file.read("absent")


def test_reading_into_a_tensor(path, tensors):
    """Past the mapping, whatever the header's length; and only what fits, of the file as it was."""
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = content[8 : 8 + length] + b" " * 3
    path.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length :])
    file = TensorFile(path)
    for name, value in tensors.items():
        out = torch.empty(value.shape, dtype=value.dtype)
        file.read_into(name, out)
        assert torch.equal(out.float(), value.float()), name
        assert file.tensors[name].bytes == value.numel() * value.element_size()
    for wrong in (torch.empty(6), torch.empty(2, 3).half(), torch.empty(3, 2).T):
        with pytest.raises(ValueError):
            file.read_into("a.weight", wrong)
    with pytest.raises(KeyError):
        file.read_into("absent", torch.empty(1))
    path.write_bytes(content)
    with pytest.raises(InvalidFile, match="changed"):
        file.read_into("a.weight", torch.empty(2, 3))
    path.unlink()
    with pytest.raises(InvalidFile, match="cannot be read"):
        file.read_into("a.weight", torch.empty(2, 3))


def test_writing_to_a_read_tensor_leaves_the_file_alone(path, tensors):
    before = path.read_bytes()
    TensorFile(path).read("a.weight").add_(1)
    assert path.read_bytes() == before
    assert torch.equal(TensorFile(path).read("a.weight"), tensors["a.weight"])


def test_header_of_odd_length(path, tensors):
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = content[8 : 8 + length] + b" " * 3
    path.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length :])
    read = TensorFile(path).read("a.weight")
    assert torch.equal(read, tensors["a.weight"])
    assert read.data_ptr() % 4 == 0


def test_fingerprint_follows_the_content(path, tmp_path, tensors):
    first = TensorFile(path)
    assert first.fingerprint == TensorFile(path).fingerprint
    link = tmp_path / "link.safetensors"
    link.symlink_to(path)
    assert TensorFile(link).fingerprint == first.fingerprint
    os.utime(path, ns=(1, 1))
    assert TensorFile(path).fingerprint != first.fingerprint
    with pytest.raises(InvalidFile, match="changed"):
        first.read("b")


def _with_header(entries):
    header = json.dumps(entries).encode()
    return struct.pack("<Q", len(header)) + header


DAMAGED = {
    "empty": (b"", "is empty"),
    "three bytes": (b"abc", "not a safetensors file"),
    "zip": (b"PK\x03\x04" + bytes(60), "not a safetensors file"),
    "web page": (b"<!DOCTYPE html><html><body>Not found</body></html>", "not a safetensors file"),
    "truncated header": (_with_header({"a": 1, "b": 2})[:12], "truncated inside its header"),
    "no json": (struct.pack("<Q", 8) + b"{nothing", "damaged header"),
    "bytes that are no text": (struct.pack("<Q", 8) + b'{"\xff\xfe":1}'[:8], "damaged header"),
    "list": (struct.pack("<Q", 2) + b"[]", "not a safetensors file"),
    "entry of another form": (_with_header({"a": 1}), "damaged header"),
    "missing field": (_with_header({"a": {"dtype": "F32", "shape": [1]}}), "damaged header"),
    "unknown dtype": (
        _with_header({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}) + bytes(1),
        "keeps a as F4",
    ),
    "size and shape disagree": (
        _with_header({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}) + bytes(8),
        "damaged header",
    ),
    "hole": (
        _with_header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}) + bytes(8),
        "damaged header",
    ),
    "truncated data": (
        _with_header({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}) + bytes(9),
        "truncated: 7 of 16 bytes of data are missing",
    ),
    "trailing data": (
        _with_header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}) + bytes(9),
        "5 bytes follow its last tensor",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files(tmp_path, case):
    content, message = DAMAGED[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(InvalidFile, match=message) as caught:
        TensorFile(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_of_another_kind(tmp_path):
    with pytest.raises(InvalidFile, match="does not exist"):
        TensorFile(tmp_path / "absent.safetensors")
    with pytest.raises(InvalidFile, match="is a folder"):
        TensorFile(tmp_path)
    for suffix in (".ckpt", ".pt", ".PTH", ".bin"):
        path = tmp_path / f"model{suffix}"
        path.write_bytes(b"anything")
        with pytest.raises(InvalidFile, match=f"is a {suffix} file.*convert it to .safetensors"):
            TensorFile(path)


@pytest.mark.skipif(os.name == "nt", reason="Windows tells the time of creation alone")
def test_a_file_that_takes_another_s_place_with_its_size_and_time(path, tmp_path, tensors):
    file, before = TensorFile(path), path.stat()
    other = tmp_path / "other.safetensors"
    save_file({name: -value.float() for name, value in tensors.items()}, other)
    other.write_bytes(path.read_bytes()[:-4] + b"new!")
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(other, path)
    now = path.stat()
    assert (now.st_size, now.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    for use in (file.check_unchanged, lambda: file.read_into("b", torch.empty(5).bfloat16())):
        with pytest.raises(InvalidFile, match="changed"):
            use()
    assert TensorFile(path).fingerprint != file.fingerprint


@pytest.mark.skipif(os.name == "nt", reason="links take a privilege there")
def test_what_a_link_pointed_to_stays_what_is_read(path, tmp_path, tensors, monkeypatch):
    link = tmp_path / "folder" / "current.safetensors"
    link.parent.mkdir()
    link.symlink_to(path)
    file = TensorFile(link)
    monkeypatch.chdir(tmp_path)
    relative = TensorFile("some.safetensors")
    monkeypatch.chdir(link.parent)
    link.unlink()
    save_file(tensors, link)
    for one in (file, relative):
        one.check_unchanged()
        out = torch.empty(2, 3)
        one.read_into("a.weight", out)
        assert torch.equal(out, tensors["a.weight"])
        assert torch.equal(one.read("b"), tensors["b"])


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="permissions do not bind this user"
)
def test_unreadable_file(path):
    path.chmod(0)
    with pytest.raises(InvalidFile, match="cannot be read"):
        TensorFile(path)
