"""Profiles: what was measured on one GPU, by call.

The user's own profile lies in the disk cache and goes before one that comes with the pack
(`tuning_profiles/*.json`): of this GPU, or of the most alike that has one. What was measured on
another GPU, or with other libraries, is known as such: its choices are used, and its times compare
ways to compute the same, but nothing counts as measured here. Own profiles and files hold the same
JSON (`profile_file.py`): entries, the next best beside each, and the performance model's constants.
"""

from __future__ import annotations

import json
import logging
import math
import re
import string
import threading
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import xxhash

from ..cache import DiskCache
from ..errors import InvalidFile
from ..hardware import Hardware
from ..kernels.registry import Config
from ..settings import settings
from . import chips, profile_file
from .profile_file import Content

logger = logging.getLogger(__name__)

PROFILE_VERSION = profile_file.VERSION
KIND = "profile"
NEAR = 1.5
"""How many times as many rows a measured call may have and still speak for another."""

OTHERS = 4
"""Candidates beside the fastest that an entry keeps, for the performance model."""

SHIPPED = Path(__file__).resolve().parents[2] / "tuning_profiles"

MEMORY = 1.15
"""How much more memory is another variant's: drivers keep more or less of it for themselves."""

VERSIONS = ("torch", "cuda", "cudnn", "triton")
"""Libraries on whose versions measurements depend."""


@dataclass(frozen=True)
class Entry:
    """The fastest that was measured for one call: microseconds of one run.

    others: the next best, which the performance model learns from too, at most `OTHERS`.
    elsewhere: the GPU, and the versions of libraries that are others here, if it was not measured
    on this machine's kind.
    """

    kernel: str
    config: Config
    us: float
    others: tuple[tuple[str, Config, float], ...] = ()
    elsewhere: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The entry as `json.dumps` takes it."""
        made = {"kernel": self.kernel, "config": dict(self.config), "us": round(self.us, 3)}
        if self.others:
            made["others"] = [[name, dict(c), round(us, 3)] for name, c, us in self.others]
        return made

    def times(self) -> list[tuple[str, Config, float]]:
        """Of all candidates that it keeps: kernel, configuration, microseconds."""
        return [(self.kernel, self.config, self.us), *self.others]


class _Known:
    """Entries by call, and which calls differ in image size alone."""

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self.entries: dict[str, Entry] = {}
        self._families: dict[str, dict[int, str]] = {}
        self.learn(entries)

    def learn(self, entries: Mapping[str, Entry]) -> None:
        self.entries |= entries
        for call in entries:
            family, rows = family_of(call)
            if rows:  # a damaged key may say that there are none
                self._families.setdefault(family, {})[rows] = call

    def near(self, call: str) -> tuple[str, Entry] | None:
        family, rows = family_of(call)
        known = self._families.get(family, {})
        if not known:
            return None
        measured = sorted(known)
        place = bisect_left(measured, rows)
        sides = measured[max(0, place - 1) : place + 1]
        nearest = min(sides, key=lambda other: abs(math.log(other / rows)))
        if max(nearest / rows, rows / nearest) > NEAR:
            return None
        return known[nearest], self.entries[known[nearest]]


class Profile:
    """Measured entries of one GPU with one set of library versions, kept in the disk cache.

    own_only: know nothing of what comes with the pack.
    """

    def __init__(self, hardware: Hardware, cache: DiskCache | None, own_only: bool = False) -> None:
        self._meta = identity(hardware)
        self._cache = cache
        self._key = xxhash.xxh3_64_hexdigest(json.dumps(self._meta, sort_keys=True).encode())
        self._measured, self._own_fit = self._kept()
        found = Shipped({}) if own_only else shipped(hardware)
        self.fit = self._own_fit or found.fit
        """Constants of the performance model, as `cost.Fit.to_json` wrote them."""
        self.model_made = self._own_fit is None and found.model_made
        """Whether these constants are from another kind of GPU, and nothing was ever timed here."""
        self.origin = found.gpu
        """The GPU of the profile that came with the pack."""
        self.same_gpu = found.same_gpu
        """Whether this one is such a GPU, whatever the versions of the libraries."""
        self._here = _Known({**({} if found.elsewhere else found.entries), **self._measured})
        self._elsewhere = _Known(found.entries if found.elsewhere else {})

    def __len__(self) -> int:
        """How many calls were measured on such a GPU, whatever the versions of the libraries."""
        others = self._elsewhere.entries if self.same_gpu else {}
        return len(others.keys() | self._here.entries.keys())

    def get(self, call: str) -> Entry | None:
        """What is known of a call, by its key.

        Of another GPU, or with other libraries, only where no size near by was measured here.
        """
        entry = self._here.entries.get(call)
        if entry is not None or self._here.near(call) is not None:
            return entry
        return self._elsewhere.entries.get(call)

    def near(self, call: str) -> tuple[str, Entry] | None:
        """The measured call that differs from `call` in image size alone and is nearest to it."""
        return self._here.near(call) or self._elsewhere.near(call)

    def items(self) -> Iterable[tuple[str, Entry]]:
        """What was measured on such a machine, by the keys of the calls."""
        return self._here.entries.items()

    def elsewhere(self) -> Mapping[str, Entry]:
        """What was measured on another GPU, or with other libraries, by the keys of the calls."""
        return self._elsewhere.entries

    def keep_fit(self, fit: Mapping[str, Any]) -> None:
        """Remember constants of the performance model, here and on disk, with what is measured."""
        self.fit = self._own_fit = fit
        self.model_made = False
        self.add({})

    def own(self) -> Mapping[str, Entry]:
        """What was measured on this machine."""
        return dict(self._measured)

    def ignore_unknown(self, kernels: Iterable[str]) -> None:
        """Leave out what the pack's profile says of kernels that are not among these."""
        names, own = set(kernels), self._measured
        unknown = {
            call: entry.kernel
            for known in (self._here, self._elsewhere)
            for call, entry in known.entries.items()
            if entry.kernel not in names and call not in own
        }
        if not unknown:
            return
        self._here, self._elsewhere = (
            _Known({call: entry for call, entry in known.entries.items() if call not in unknown})
            for known in (self._here, self._elsewhere)
        )
        which = ", ".join(sorted(set(unknown.values())))
        count = len(unknown)
        _once(
            f"{count} entries of the profile are of kernels that are not here: {which}",
            logging.INFO,
        )

    def add(self, measured: Mapping[str, Entry]) -> None:
        """Remember measurements, here and on disk, beside those that another process made."""
        self._here.learn(measured)
        self._measured = {**self._measured, **measured}
        if self._cache is None:
            return
        kept, fit = self._kept()
        self._measured = {**kept, **self._measured}
        self._own_fit = self._own_fit or fit
        self._cache.put(self._key, KIND, self.to_json())

    def to_json(self) -> dict[str, Any]:
        """The measurements of this machine, as a file under `tuning_profiles/` holds them."""
        entries = {call: entry.to_json() for call, entry in sorted(self._measured.items())}
        document = {"version": PROFILE_VERSION, "meta": self._meta, "entries": entries}
        return document | ({"fit": dict(self._own_fit)} if self._own_fit else {})

    def _kept(self) -> tuple[dict[str, Entry], Mapping[str, Any] | None]:
        """Entries and constants of the cache."""
        data = None if self._cache is None else self._cache.get(self._key, KIND)
        if data is None:
            return {}, None
        try:
            content = profile_file.checked(data)
        except InvalidFile as error:
            _once(f"the profile in the cache is ignored: {error}")
            return {}, None
        return _entries(content, "the profile in the cache"), content.fit


def profile_cache(root: Path | None = None) -> DiskCache:
    """Where the measurements of this machine are kept, by default in the user's cache folder."""
    return DiskCache(root, settings().cache_bytes, f"profile{PROFILE_VERSION}")


_TENSOR = re.compile(r"(\d+(?:x\d+)+)(:\w+\S*)")
_STRIDES = re.compile(r"@(?:\d+,)+(\d+,\d+)")
_SIZES = re.compile(r"(size|upsample)=\((\d+),(\d+)\)")


@lru_cache(maxsize=1 << 14)
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


@dataclass(frozen=True)
class Shipped:
    """What comes with the pack. gpu: on which it was measured. elsewhere: as the entries'.

    fit: constants of the performance model. model_made: nothing was measured: these are another
    kind's. same_gpu: whether this GPU is one of that kind: by its name, its multiprocessors and its
    memory, since makers give one name to several.
    """

    entries: Mapping[str, Entry]
    gpu: str | None = None
    elsewhere: str | None = None
    fit: Mapping[str, Any] | None = None
    model_made: bool = False
    same_gpu: bool = False


def shipped(hardware: Hardware) -> Shipped:
    """The profile that comes with the pack for this GPU, or else for the one most like it.

    One that was measured goes before one that the model made. Measured ones are of the same compute
    capability, and about as many multiprocessors; model-made ones of the nearest that is not newer.
    Entries of another GPU, and of this one with other versions of libraries, say where they were
    measured.
    """
    if hardware.kind != "cuda":
        return Shipped({})
    mine = identity(hardware)
    files = _shipped_files()
    fitting = [
        (path, content)
        for path, content in files
        if content.meta["gpu"] == hardware.name or content.meta["capability"] == mine["capability"]
    ] or [
        (path, content)
        for path, content in files
        if content.model_made and content.meta["capability"] <= mine["capability"]
    ]
    if not fitting:
        return Shipped({})
    path, content = min(fitting, key=lambda pair: _distance(pair[1], mine))
    gpu = str(content.meta["gpu"])
    if content.model_made:
        _once(
            f"no GPU like {hardware.name} was measured: the model-made profile of {gpu} is used; "
            "`python -m accel tune` measures on this machine"
        )
        return Shipped({}, gpu, fit=content.fit, model_made=True)
    entries = _entries(content, f"the profile {path.name}", path)
    parts = _other_parts(content.meta, hardware) if gpu == hardware.name else []
    same_gpu = gpu == hardware.name and not parts
    versions = [
        (_version(name, content.meta), _version(name, mine))
        for name in VERSIONS
        if content.meta[name] != mine[name]
    ]
    if same_gpu and not versions:
        return Shipped(entries, gpu, fit=content.fit, same_gpu=True)
    theirs = [there for there, _ in (*parts, *versions)]
    elsewhere = f"{gpu} with {', '.join(theirs)}" if theirs else gpu
    _tell(hardware.name, gpu, theirs, [here for _, here in (*parts, *versions)])
    marked = {call: replace(entry, elsewhere=elsewhere) for call, entry in entries.items()}
    return Shipped(marked, gpu, elsewhere, content.fit, same_gpu=same_gpu)


def profiled() -> dict[str, Hardware]:
    """The GPUs that have a profile in the pack, by name, as they were when it was made."""
    found = {}
    for _, content in _shipped_files():
        meta = content.meta
        chip = chips.named(meta["gpu"])
        if chip is None:
            continue
        found[meta["gpu"]] = Hardware(
            name=meta["gpu"],
            kind="cuda",
            capability=(meta["capability"][0], meta["capability"][1]),
            multiprocessors=meta["multiprocessors"],
            memory_bytes=int(meta.get("memory_mib", 0)) << 20,
            l2_bytes=chip.l2_bytes,
            driver=None,
            torch=meta["torch"],
            cuda=meta["cuda"],
            cudnn=meta["cudnn"],
            triton=meta["triton"],
            shared_bytes=chip.shared_bytes - chips.RESERVED_BYTES,
        )
    return found


def _other_parts(meta: Mapping[str, Any], hardware: Hardware) -> list[tuple[str, str]]:
    """What a GPU of the same name had others of, and this one's: chips are sold in variants."""
    found = []
    if meta["multiprocessors"] != hardware.multiprocessors:
        counts = (meta["multiprocessors"], hardware.multiprocessors)
        found.append((f"{counts[0]} multiprocessors", f"{counts[1]} multiprocessors"))
    theirs, ours = meta.get("memory_mib"), hardware.memory_bytes >> 20
    if theirs and not 1 / MEMORY < ours / theirs < MEMORY:
        found.append((f"{theirs} MiB of memory", f"{ours} MiB"))
    return found


def _version(library: str, meta: Mapping[str, Any]) -> str:
    return f"no {library}" if meta[library] is None else f"{library} {meta[library]}"


def _tell(here: str, gpu: str, theirs: Sequence[str], ours: Sequence[str]) -> None:
    """Warn of a profile that is used though it was measured elsewhere."""
    what = f"with {', '.join(theirs)} (here {', '.join(ours)})" if theirs else ""
    if gpu != here:
        text = f"no profile of {here}: that of {gpu} is used"
        text += f", which was measured {what}" if what else ""
    else:
        text = f"the profile of {here} is used, though it was measured {what}"
    _once(f"{text}; `python -m accel tune` measures on this machine")


def _distance(content: Content, mine: Mapping[str, Any]) -> tuple[Any, ...]:
    """How unlike the two are on which profiles were made: the GPU first, then the libraries."""
    theirs = content.meta
    return (
        content.model_made,
        theirs["gpu"] != mine["gpu"],
        [-number for number in theirs["capability"]],  # the newest
        abs(theirs["multiprocessors"] - mine["multiprocessors"]),
        sum(theirs[name] != mine[name] for name in VERSIONS),
    )


def _shipped_files() -> list[tuple[Path, Content]]:
    found = []
    for path in sorted(SHIPPED.glob("*.json")):
        try:
            found.append((path, profile_file.read(path)))
        except InvalidFile as error:
            _once(f"the profile {path.name} is ignored: {error}", path=path)
    return found


def _entries(content: Content, what: str, path: Path | None = None) -> dict[str, Entry]:
    if content.faults:
        count = len(content.faults)
        left_out = "an entry is left out" if count == 1 else f"{count} entries are left out"
        _once(f"{what}: {left_out}: {content.summary()}", path=path)
    return entries_of(content)


def entries_of(content: Content) -> dict[str, Entry]:
    """The entries of a profile's file, by the keys of calls."""
    return {
        call: Entry(fields["kernel"], fields["config"], float(fields["us"]), _others(fields))
        for call, fields in content.entries.items()
    }


def _others(fields: Mapping[str, Any]) -> tuple[tuple[str, Config, float], ...]:
    kept = fields.get("others", ())[:OTHERS]
    return tuple((kernel, config, float(us)) for kernel, config, us in kept)


_said: set[tuple[Path | None, str]] = set()
_said_lock = threading.Lock()


def _once(message: str, level: int = logging.WARNING, path: Path | None = None) -> None:
    """Log, though profiles are read again and again, each thing once."""
    with _said_lock:
        if (path, message) in _said:
            return
        _said.add((path, message))
    logger.log(level, "%s", message)
