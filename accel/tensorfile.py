"""Files of tensors, read lazily: the header at once, each tensor when it is asked for."""

from __future__ import annotations

import contextlib
import json
import math
import os
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch

from .errors import InvalidFile

# The format's own limit, which also keeps a damaged length from being believed.
_LONGEST_HEADER = 100_000_000
_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
_PICKLES = {".ckpt", ".pt", ".pth", ".bin", ".pkl"}


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Size of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


Fingerprint = tuple[str, int, int, int]


class TensorFile:
    """Read-only view of a .safetensors file.

    Opening reads and checks the header alone and keeps no handle; the file is mapped at the first
    `read`. Raises InvalidFile where the file is missing, truncated, damaged or of another kind.

    path:        as given.
    tensors:     name -> shape and dtype, in the file's order.
    metadata:    the file's own text entries.
    fingerprint: (resolved path, size in bytes, times of change in ns): equal for the same content.
                 The second time is that of the file's entry, which no program sets: a copy may have
                 been given the first. On Windows it is the time of creation.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.tensors: dict[str, TensorInfo] = {}
        self.metadata: dict[str, str] = {}
        self._starts: dict[str, int] = {}
        self._mapped: Any = None
        self._lock = threading.Lock()
        if self.path.is_dir():
            raise InvalidFile(f"{self.path} is a folder: give a .safetensors file inside it")
        if self.path.suffix.lower() in _PICKLES:
            raise InvalidFile(
                f"{self.path} is a {self.path.suffix} file, which can run code when it is opened: "
                "convert it to .safetensors first"
            )
        try:
            # Links may come to point elsewhere, and relative paths too.
            self._real = self.path.resolve()
            with self._real.open("rb") as file:
                stat = os.fstat(file.fileno())
                header, data_bytes = self._header(file.read(8), file.read, stat.st_size)
        except FileNotFoundError:
            raise InvalidFile(f"{self.path} does not exist: check the path") from None
        except OSError as error:
            raise InvalidFile(f"{self.path} cannot be read: {error.strerror or error}") from None
        self._parse(header, data_bytes)
        self._data = 8 + len(header)
        self.fingerprint = _fingerprint(self._real, stat)

    def read(self, name: str) -> torch.Tensor:
        """One tensor on the CPU, backed by the mapped file: a copy on write, no copy on read.

        Raises KeyError for an unknown name, InvalidFile where the file changed since its header
        was read.
        """
        info = self.tensors[name]
        with self._lock:
            if self._mapped is None:
                self._mapped = self._map()
            tensor: torch.Tensor = self._mapped.get_tensor(name)
        if tensor.data_ptr() % info.dtype.itemsize:
            # Headers of odd length are allowed; kernels that expect aligned data are many.
            tensor = tensor.clone()
        return tensor

    def read_into(self, name: str, out: torch.Tensor) -> None:
        """Read one tensor into `out`: on the CPU, contiguous, of the stored shape and dtype.

        The bytes come by a read of their own, not through the mapping, whose pages are brought in
        one by one: several threads may read at once, and none holds the interpreter meanwhile.
        Raises KeyError for an unknown name, InvalidFile where the file changed or ended early.
        """
        info = self.tensors[name]
        if (tuple(out.shape), out.dtype) != (info.shape, info.dtype) or not out.is_contiguous():
            raise ValueError(f"{name} is {info}, not {out.dtype} {tuple(out.shape)}")
        if not out.numel():
            return
        raw: Any = out.view(-1).view(torch.uint8).numpy()
        view = memoryview(raw)
        try:
            with self._opened() as file:
                file.seek(self.offset(name))
                self._fill(file, view, name)
        except OSError as error:
            raise InvalidFile(f"{self.path} cannot be read: {_line(error)}") from None

    @property
    def real(self) -> Path:
        """The path that was opened, links resolved."""
        return self._real

    def offset(self, name: str) -> int:
        """Where a tensor's bytes begin in the file."""
        return self._data + self._starts[name]

    def blocks(
        self, name: str, begin: int, end: int, size: int
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """The bytes from `begin` to `end` of a tensor, as [<= size] uint8 and where each begins.

        A block is valid until the next is asked for. Raises as `read_into` does.
        """
        with torch.inference_mode(False):
            room = torch.empty(min(size, end - begin), dtype=torch.uint8, device="cpu")
        view: Any = memoryview(room.numpy())  # type: ignore[arg-type]
        try:
            with self._opened() as file:
                file.seek(self.offset(name) + begin)
                for start in range(begin, end, size):
                    count = min(size, end - start)
                    self._fill(file, view[:count], name)
                    yield start, room[:count]
        except OSError as error:
            raise InvalidFile(f"{self.path} cannot be read: {_line(error)}") from None

    @contextlib.contextmanager
    def _opened(self) -> Iterator[Any]:
        """The file, which is as it was when its header was read."""
        with self._real.open("rb", buffering=0) as file:
            if _fingerprint(self._real, os.fstat(file.fileno())) != self.fingerprint:
                raise InvalidFile(f"{self.path} changed while it was in use: load it again")
            yield file

    def _fill(self, file: Any, view: memoryview, name: str) -> None:
        while view:
            count = file.readinto(view)
            if not count:
                raise InvalidFile(f"{self.path} ended in the midst of {name}")
            view = view[count:]

    def check_unchanged(self) -> None:
        """Raise InvalidFile where the file is no more what its header said when it was read."""
        try:
            now = _fingerprint(self._real, os.stat(self._real))
        except OSError as error:
            raise InvalidFile(f"{self.path} cannot be read: {_line(error)}") from None
        if now != self.fingerprint:
            raise InvalidFile(f"{self.path} changed while it was in use: load it again")

    def _map(self) -> Any:
        self.check_unchanged()
        try:
            return safetensors.safe_open(str(self._real), framework="pt", device="cpu")
        except (OSError, safetensors.SafetensorError) as error:
            raise InvalidFile(f"{self.path} cannot be read: {_line(error)}") from None

    def _header(self, prefix: bytes, read: Callable[[int], bytes], size: int) -> tuple[bytes, int]:
        """The header's bytes, and how many bytes of data follow it."""
        if size == 0:
            raise InvalidFile(f"{self.path} is empty: get the file again")
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        # A length that makes no sense means another kind of file rather than a missing end.
        if not 2 <= length <= _LONGEST_HEADER:
            raise InvalidFile(f"{self.path} is not a safetensors file")
        header = read(length)
        if header[:1] != b"{":
            raise InvalidFile(f"{self.path} is not a safetensors file")
        if len(header) < length:
            raise InvalidFile(
                f"{self.path} is truncated inside its header ({size} bytes): get the file again"
            )
        return header, size - 8 - length

    def _parse(self, header: bytes, data_bytes: int) -> None:
        try:
            entries: dict[str, Any] = json.loads(header)
            self.metadata = {str(k): str(v) for k, v in entries.pop("__metadata__", {}).items()}
            spans = []
            for name, entry in entries.items():
                dtype = _DTYPES.get(entry["dtype"])
                if dtype is None:
                    raise InvalidFile(
                        f"{self.path} keeps {name} as {entry['dtype']}, which is not supported"
                    )
                shape, (start, end) = tuple(entry["shape"]), entry["data_offsets"]
                if end - start != math.prod(shape) * dtype.itemsize or min(shape, default=0) < 0:
                    raise ValueError(name)
                spans.append((start, end))
                self._starts[name] = start
                self.tensors[name] = TensorInfo(shape, dtype)
        except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
            raise InvalidFile(
                f"{self.path} has a damaged header ({_line(error)}): get the file again"
            ) from None
        # Every byte belongs to exactly one tensor.
        position = 0
        for start, end in sorted(spans):
            if start != position:
                raise InvalidFile(f"{self.path} has a damaged header: get the file again")
            position = end
        if position > data_bytes:
            raise InvalidFile(
                f"{self.path} is truncated: {position - data_bytes} of {position} bytes of data "
                "are missing: get the file again"
            )
        if position < data_bytes:
            raise InvalidFile(
                f"{self.path} is damaged: {data_bytes - position} bytes follow its last tensor"
            )


def fingerprint_of(path: str | os.PathLike[str]) -> Fingerprint:
    """What `TensorFile(path).fingerprint` would be, without opening the file. Raises OSError."""
    real = Path(path).resolve()
    return _fingerprint(real, os.stat(real))


def _fingerprint(real: Path, stat: os.stat_result) -> Fingerprint:
    return (str(real), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def read_header(path: str | os.PathLike[str]) -> dict[str, TensorInfo]:
    """Names, shapes and dtypes of a .safetensors file; its tensors are not read.

    Raises InvalidFile as TensorFile does.
    """
    return TensorFile(path).tensors
