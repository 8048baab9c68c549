"""The disk cache: JSON objects by kind and key, safe against crashes, damage and other processes.

One file holds one entry: `<root>/switchyard-<version>/<kind>/<key>.json`. It is written beside its
final name and moved there whole, and carries a checksum, so a reader sees all of it or none. What
cannot be read is removed with a warning and built again. A cache that cannot be written never
stops the caller: it is said once, and nothing is kept.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import psutil
import xxhash

from .errors import CacheUnavailable, InvalidFile
from .settings import settings

logger = logging.getLogger(__name__)

FORMAT = 1  # of the envelope; what `version` means is the caller's business
FOLDER_PREFIX = "switchyard-"  # only such folders are ever listed, cleaned or pruned
LOCK_FOLDER = ".locks"
# A temporary file this old is a left-over, even if some process bears its writer's id.
STALE_SECONDS = 600.0
LOCK_TIMEOUT_SECONDS = 900.0
LOCK_POLL_SECONDS = 0.1

_NAME = re.compile(r"[a-z0-9_-]+")
_VERSION = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._+-]*")
_BODY = b',"body":'

# One per lock file, for the threads of this process: a lock of the system belongs to the process.
_thread_locks: dict[Path, threading.Lock] = {}
_thread_locks_guard = threading.Lock()


@dataclass(frozen=True)
class Entry:
    """One stored object. `used` is the time of the last write or read, in seconds since 1970."""

    version: str
    kind: str
    key: str
    bytes: int
    used: float
    path: Path


class DiskCache:
    """JSON objects on disk, least recently used first out when they outgrow `limit_bytes`.

    `None` for `root` or `limit_bytes` means the user's setting. Entries of another `version` are
    never read, but count for the limit and are evicted as all others. Keys and kinds consist of
    `a-z 0-9 _ -`; anything else raises ValueError. Threads and processes may share a folder.
    """

    def __init__(self, root: Path | None, limit_bytes: int | None, version: str) -> None:
        if not _VERSION.fullmatch(version):
            raise ValueError(f"{version!r} cannot be a cache version")
        self.root = settings().cache_dir if root is None else Path(root)
        self.limit_bytes = settings().cache_bytes if limit_bytes is None else limit_bytes
        self.version = version
        self.folder = self.root / f"{FOLDER_PREFIX}{version}"
        self._problem: str | None = None
        self._remove_leftovers()

    @property
    def problem(self) -> str | None:
        """Why the last write failed, in one line; None while the cache works."""
        return self._problem

    def get(self, key: str, kind: str) -> dict[str, Any] | None:
        """The stored object, marked as used now; None if there is none or it is damaged."""
        path = self._path(key, kind)
        try:
            content = path.read_bytes()
        except OSError:  # missing, or a folder that cannot be read: both mean "build it"
            return None
        try:
            payload = _unpack(content, self._header(key, kind))
        except InvalidFile as error:
            logger.warning("ignoring %s and building it again: it %s", path, error)
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        _touch(path)
        return payload

    def put(self, key: str, kind: str, payload: dict[str, Any]) -> bool:
        """Store a JSON object, replacing the old one as a whole. False if it could not be kept.

        Raises TypeError or ValueError for what JSON cannot hold (NaN included).
        """
        path = self._path(key, kind)
        content = _pack(payload, self._header(key, kind))
        try:
            if len(content) > self.limit_bytes:
                raise CacheUnavailable(
                    f"{kind} {key} ({len(content)} bytes) is larger than the whole cache may be "
                    f"({self.limit_bytes} bytes): raise SWITCHYARD_CACHE_GIB to keep it"
                )
            self._write(path, content)
        except CacheUnavailable as error:
            self._report(error)
            return False
        self._problem = None
        self.prune(self.limit_bytes)
        return True

    def get_or_build(
        self, key: str, kind: str, build: Callable[[], dict[str, Any]]
    ) -> tuple[dict[str, Any], bool]:
        """The stored object and True, or what `build` returns, now stored, and False.

        Of several threads and processes that ask at once, one builds and the others wait for it.
        Where nothing can be stored, they build one after another. `build` must not ask for the
        same key and kind itself; what it raises passes through, and the next in line builds.
        """
        payload = self.get(key, kind)
        if payload is not None:
            return payload, True
        with self.lock(key, kind):
            payload = self.get(key, kind)
            if payload is not None:
                return payload, True
            payload = build()
            self.put(key, kind, payload)
            return payload, False

    @contextlib.contextmanager
    def lock(
        self, key: str, kind: str, timeout_seconds: float = LOCK_TIMEOUT_SECONDS
    ) -> Iterator[None]:
        """Hold the right to build one entry, against other threads and processes; not reentrant.

        The system frees it when its holder dies. After `timeout_seconds` the block runs without it:
        building twice costs time, waiting for ever costs the picture. Where no lock file can be
        made, only the threads of this process exclude each other.
        """
        path = self._path(key, kind)  # validates both
        path = self.folder / LOCK_FOLDER / kind / f"{key}.lock"
        what = f"{kind} {key}"
        deadline = time.monotonic() + timeout_seconds
        with _thread_locks_guard:
            thread_lock = _thread_locks.setdefault(path, threading.Lock())
        if not thread_lock.acquire(blocking=False):
            logger.warning("waiting for another thread that is building %s", what)
            if not thread_lock.acquire(timeout=max(0.0, timeout_seconds)):
                logger.warning("%s is still being built elsewhere: building it here too", what)
                yield
                return
        try:
            file_lock = self._acquire_file_lock(path, what, deadline)
            try:
                yield
            finally:
                if file_lock is not None:
                    file_lock.release()
        finally:
            thread_lock.release()

    def entries(self) -> list[Entry]:
        """All entries, of all versions, the least recently used first."""
        found = []
        for path in self.root.glob(f"{FOLDER_PREFIX}*/*/*.json"):
            kind, version = path.parent.name, path.parent.parent.name[len(FOLDER_PREFIX) :]
            if not (_NAME.fullmatch(kind) and _NAME.fullmatch(path.stem)):
                continue
            with contextlib.suppress(OSError):  # removed by another process meanwhile
                status = path.stat()
                found.append(
                    Entry(
                        version=version,
                        kind=kind,
                        key=path.stem,
                        bytes=status.st_size,
                        used=status.st_mtime_ns / 1e9,
                        path=path,
                    )
                )
        return sorted(found, key=lambda entry: (entry.used, entry.path))

    def prune(self, limit_bytes: int = 0) -> list[Entry]:
        """Remove the least recently used entries until at most `limit_bytes` are left.

        Returns what was removed: with the default, everything that could be.
        """
        entries = self.entries()
        total = sum(entry.bytes for entry in entries)
        removed = []
        for entry in entries:
            if total <= limit_bytes:
                break
            if _unlink(entry.path):
                total -= entry.bytes
                removed.append(entry)
        return removed

    def remove(self, key: str) -> list[Entry]:
        """Remove the entries with this key, of all kinds and versions. Returns them."""
        self._path(key, "any")  # validates
        return [entry for entry in self.entries() if entry.key == key and _unlink(entry.path)]

    def _path(self, key: str, kind: str) -> Path:
        for name in (key, kind):
            if not _NAME.fullmatch(name):
                raise ValueError(f"{name!r} cannot be a cache key: only a-z, 0-9, _ and - can")
        return self.folder / kind / f"{key}.json"

    def _header(self, key: str, kind: str) -> dict[str, Any]:
        return {"format": FORMAT, "version": self.version, "kind": kind, "key": key}

    def _write(self, path: Path, content: bytes) -> None:
        """Make `path` hold `content`, in one step. Raises CacheUnavailable."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, content)
        except OSError as error:
            raise _unavailable(self.root, error) from error
        _touch(path)

    def _acquire_file_lock(
        self, path: Path, what: str, deadline: float
    ) -> filelock.BaseFileLock | None:
        """The held lock, or None where there can be none or its holder takes too long."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(path)
            try:
                lock.acquire(timeout=0)
            except filelock.Timeout:
                logger.warning("waiting for another process that is building %s", what)
                remaining = max(0.0, deadline - time.monotonic())
                lock.acquire(timeout=remaining, poll_interval=LOCK_POLL_SECONDS)
        except filelock.Timeout:
            logger.warning("%s is still being built elsewhere: building it here too", what)
            return None
        except OSError as error:
            self._report(_unavailable(self.root, error))
            return None
        except NotImplementedError:  # file systems without locks: some network shares
            return None
        return lock

    def _report(self, error: CacheUnavailable) -> None:
        """Keep the problem, and warn of it the first time."""
        if str(error) != self._problem:
            self._problem = str(error)
            logger.warning("%s", error)

    def _remove_leftovers(self) -> None:
        """Remove temporary files whose writer is dead; live writers' are left alone."""
        for path in self.root.glob(f"{FOLDER_PREFIX}*/*/.*.tmp"):
            parts = path.name.split(".")  # "", key, process id, random, "tmp"
            if len(parts) != 5 or not parts[2].isdigit():
                continue
            with contextlib.suppress(OSError):
                age = time.time() - path.stat().st_mtime
                if age > STALE_SECONDS or not psutil.pid_exists(int(parts[2])):
                    path.unlink()


def _pack(payload: dict[str, Any], header: dict[str, Any]) -> bytes:
    """The file of an entry: one JSON object whose last member is the payload."""
    body = json.dumps(payload, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    sealed = {**header, "xxh3_128": xxhash.xxh3_128_hexdigest(body)}
    return json.dumps(sealed, separators=(",", ":")).encode()[:-1] + _BODY + body + b"}\n"


def _unpack(content: bytes, header: dict[str, Any]) -> dict[str, Any]:
    """The payload of a file with this header. Raises InvalidFile with what is wrong with it."""
    head, _, rest = content.partition(_BODY)
    try:
        found = json.loads(head + b"}")
    except ValueError:
        raise InvalidFile("is damaged") from None
    if not isinstance(found, dict):
        raise InvalidFile("is damaged")
    checksum = found.pop("xxh3_128", None)
    if found != header:
        raise InvalidFile("was written for another entry or by another version")
    body = rest[: -len(b"}\n")]
    if rest[len(body) :] != b"}\n" or xxhash.xxh3_128_hexdigest(body) != checksum:
        raise InvalidFile("is damaged")
    payload: dict[str, Any] = json.loads(body)
    return payload


def _touch(path: Path) -> None:
    """Mark as used now, finer than the file system's own clock; a read-only folder may refuse."""
    now = time.time_ns()
    with contextlib.suppress(OSError):
        os.utime(path, ns=(now, now))


def _unlink(path: Path) -> bool:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("cannot remove %s: %s", path, error.strerror)
        return False
    return True


def write_whole(path: Path, content: bytes) -> None:
    """Have the file at `path` hold `content`, in one step: whoever reads sees all of it or none."""
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def _unavailable(root: Path, error: OSError) -> CacheUnavailable:
    """What an error of the file system means for the user."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        what = "the disk is full: make room"
    else:
        what = f"{error.strerror or error}: make it writable"
    return CacheUnavailable(
        f"the cache in {root} cannot be written ({what} or set SWITCHYARD_CACHE_DIR); "
        "engines work, but are built again next time"
    )
