"""Profiles: what was measured on one GPU, by call.

A profile that comes with the pack (`tuning_profiles/<gpu>.json`) is read first; over it lies the
user's own, in the disk cache. Both hold the same JSON:
`{"meta": {...}, "entries": {call: {"kernel": name, "config": {...}, "us": microseconds}}}`.
An entry may also have `"others": [[name, {...}, microseconds], ...]`, the next best, and the file
`"fit"`, the constants of the performance model (`cost.Fit`). What cannot be understood is left out
with a warning.
"""

from __future__ import annotations

import json
import logging
import math
import re
import string
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from ..cache import DiskCache
from ..hardware import Hardware
from ..kernels.registry import Config
from ..settings import settings

logger = logging.getLogger(__name__)

PROFILE_VERSION = 2
KIND = "profile"
NEAR = 1.5
"""How many times as many rows a measured call may have and still speak for another."""

OTHERS = 4
"""Candidates beside the fastest that an entry keeps, for the performance model."""

SHIPPED = Path(__file__).resolve().parents[2] / "tuning_profiles"


@dataclass(frozen=True)
class Entry:
    """The fastest that was measured for one call: microseconds of one run."""

    kernel: str
    config: Config
    us: float
    others: tuple[tuple[str, Config, float], ...] = ()
    """The next best, which the performance model learns from too: at most `OTHERS`."""

    def to_json(self) -> dict[str, Any]:
        """The entry as `json.dumps` takes it."""
        made = {"kernel": self.kernel, "config": dict(self.config), "us": round(self.us, 3)}
        if self.others:
            made["others"] = [[name, dict(c), round(us, 3)] for name, c, us in self.others]
        return made


class Profile:
    """Measured entries of one GPU with one set of library versions, kept in the disk cache."""

    def __init__(self, hardware: Hardware, cache: DiskCache | None) -> None:
        self._meta = identity(hardware)
        self._cache = cache
        self._key = xxhash.xxh3_64_hexdigest(json.dumps(self._meta, sort_keys=True).encode())
        document, name = _shipped_document(hardware)
        self._entries = _entries(document, name)
        self.fit: Mapping[str, Any] | None = _mapping(document.get("fit"))
        """Constants of the performance model, as `cost.Fit.to_json` wrote them."""
        self._own_fit: Mapping[str, Any] | None = None
        self._measured: dict[str, Entry] = {}
        if cache is not None:
            own = cache.get(self._key, KIND) or {}
            self._measured = _entries(own, "the cached profile")
            self._own_fit = _mapping(own.get("fit"))
            self.fit = self._own_fit or self.fit
        self._families: dict[str, dict[int, str]] = {}
        self._learn(self._entries | self._measured)

    def _learn(self, entries: Mapping[str, Entry]) -> None:
        self._entries |= entries
        for call in entries:
            family, rows = family_of(call)
            self._families.setdefault(family, {})[rows] = call

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, call: str) -> Entry | None:
        """What is known of a call, by its key."""
        return self._entries.get(call)

    def items(self) -> Iterable[tuple[str, Entry]]:
        """All entries, by the keys of their calls."""
        return self._entries.items()

    def keep_fit(self, fit: Mapping[str, Any]) -> None:
        """Remember constants of the performance model, here and on disk, with what is measured."""
        self.fit = self._own_fit = fit
        self.add({})

    def near(self, call: str) -> tuple[str, Entry] | None:
        """The measured call that differs from `call` in image size alone and is nearest to it."""
        family, rows = family_of(call)
        known = self._families.get(family, {})
        if not known:
            return None
        nearest = min(known, key=lambda other: abs(math.log(other / rows)))
        if max(nearest / rows, rows / nearest) > NEAR:
            return None
        return known[nearest], self._entries[known[nearest]]

    def add(self, measured: Mapping[str, Entry]) -> None:
        """Remember measurements, here and on disk, beside those that another process made."""
        self._learn(measured)
        self._measured |= measured
        if self._cache is None:
            return
        other = self._cache.get(self._key, KIND) or {}
        self._measured = {**_entries(other, "the cached profile"), **self._measured}
        self._own_fit = self._own_fit or _mapping(other.get("fit"))
        self._cache.put(self._key, KIND, self.to_json())

    def to_json(self) -> dict[str, Any]:
        """The measurements of this machine, as a file under `tuning_profiles/` holds them."""
        entries = {call: entry.to_json() for call, entry in sorted(self._measured.items())}
        made = {"version": PROFILE_VERSION, "meta": self._meta, "entries": entries}
        return made if self._own_fit is None else {**made, "fit": dict(self._own_fit)}


def profile_cache(root: Path | None = None) -> DiskCache:
    """Where the measurements of this machine are kept, by default in the user's cache folder."""
    return DiskCache(root, settings().cache_bytes, f"profile{PROFILE_VERSION}")


_TENSOR = re.compile(r"(\d+(?:x\d+)+)(:\w+\S*)")
_STRIDES = re.compile(r"@(?:\d+,)+(\d+,\d+)")
_SIZES = re.compile(r"(size|upsample)=\((\d+),(\d+)\)")


def family_of(call: str) -> tuple[str, int]:
    """A call's key with letters for the sizes that an image decides, and the rows of its result.

    Images are alike whatever their sides, and so are strides over all of an image. The sizes of the
    result get letters, equal ones the same, so that self- and cross-attention stay apart; others,
    such as a prompt's length, stay. The last dimension and the weights are the structure's own.
    """
    letters: dict[str, str] = {}
    rows = [1]
    own = _TENSOR.search(call.rpartition(" -> ")[2])
    sides = set() if own is None else set(own[1].split("x")[:-1])

    def letter(size: str) -> str:
        if size not in sides:  # a prompt's length
            return size
        return letters.setdefault(size, string.ascii_letters[len(letters) % 52])

    def tensor(match: re.Match[str]) -> str:
        *leading, width = match[1].split("x")
        if match[2].endswith("c"):
            return match[0]
        rows[0] = math.prod(map(int, leading))
        image = len(leading) >= 3  # or several results, stacked
        names = ["#"] * len(leading) if image else [letter(size) for size in leading]
        return "x".join([*names, width]) + _STRIDES.sub(r"@#,\1", match[2])

    def sizes(match: re.Match[str]) -> str:
        return f"{match[1]}=(#,#)"

    family = _SIZES.sub(sizes, _TENSOR.sub(tensor, call))
    return family, rows[0]


def identity(hardware: Hardware) -> dict[str, Any]:
    """What a measurement depends on beside the call."""
    return {
        "gpu": hardware.name,
        "capability": list(hardware.capability or ()),
        "multiprocessors": hardware.multiprocessors,
        "torch": hardware.torch,
        "cuda": hardware.cuda,
        "cudnn": hardware.cudnn,
        "triton": hardware.triton,
    }


def shipped(hardware: Hardware) -> dict[str, Entry]:
    """Entries of the profile that comes with the pack for this GPU; empty if there is none."""
    return _entries(*_shipped_document(hardware))


def _shipped_document(hardware: Hardware) -> tuple[Mapping[str, Any], str]:
    """The file that comes with the pack for this GPU, empty if there is none, and what it is."""
    for path in sorted(SHIPPED.glob("*.json")):
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            logger.warning("the profile %s is ignored: %s", path.name, error)
            continue
        meta = data.get("meta") if isinstance(data, dict) else None
        if isinstance(meta, dict) and meta.get("gpu") == hardware.name:
            return data, f"the profile {path.name}"
    return {}, "no profile"


def _mapping(value: Any) -> Mapping[str, Any] | None:
    return value if isinstance(value, Mapping) else None


def _entries(data: Mapping[str, Any], what: str) -> dict[str, Entry]:
    if not data:
        return {}
    if data.get("version") != PROFILE_VERSION or not isinstance(data.get("entries"), Mapping):
        logger.warning("%s is ignored: it has version %s", what, data.get("version"))
        return {}
    found = {}
    for call, fields in data["entries"].items():
        entry = _entry(fields)
        if entry is None:
            logger.warning("%s: the entry of %s is ignored: %s", what, call, str(fields)[:80])
        else:
            found[call] = entry
    return found


def _entry(fields: Any) -> Entry | None:
    if not isinstance(fields, Mapping):
        return None
    fastest = _timed(fields.get("kernel"), fields.get("config"), fields.get("us"))
    others = fields.get("others", ())
    if not isinstance(others, (list, tuple)):
        others = ()
    read = [
        _timed(*other) for other in others if isinstance(other, (list, tuple)) and len(other) == 3
    ]
    kept = [other for other in read if other is not None][:OTHERS]
    return None if fastest is None else Entry(*fastest, tuple(kept))


def _timed(kernel: Any, config: Any, us: Any) -> tuple[str, Config, float] | None:
    if not isinstance(kernel, str) or not isinstance(config, Mapping):
        return None
    if not all(isinstance(value, (int, str, bool)) for value in config.values()):
        return None
    if isinstance(us, bool) or not isinstance(us, (int, float)) or not 0 < us < math.inf:
        return None
    return kernel, dict(config), float(us)
