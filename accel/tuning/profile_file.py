"""The file of a profile: what it may hold, where a wrong one is wrong, and how it is written.

    {"version": 2,
     "meta": {what the measurements depend on, and further remarks},
     "entries": {call: {"kernel": name, "config": {...}, "us": microseconds,
                        "others": [[name, {...}, microseconds], ...]}},
     "fit": {...}}

`others` and `fit` may be missing. Where `meta` has `"made_by": "model"` nothing was measured: there
are no entries, and the constants of `fit` are another kind of GPU's. A fault of the whole refuses
the file, one of an entry leaves it out. Both are told with the line at which they stand.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import InvalidFile

VERSION = 2

LEAST_US, MOST_US = 0.01, 10e6
"""No call of an image takes ten seconds, none is done in a few clocks: a time beyond is one of
another unit."""

FIT_VERSION = 1

MOST_FACTOR = 50.0
"""A constant of the performance model further from what the chip's rates say is nonsense."""

SHOWN = 5
"""Faults that are told one by one."""

META: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "gpu": ("a name", lambda value: isinstance(value, str) and bool(value)),
    "capability": (
        "two numbers such as [9, 0]",
        lambda value: isinstance(value, list) and len(value) == 2 and all(map(_is_count, value)),
    ),
    "multiprocessors": ("a number of at least 1", lambda value: _is_count(value) and value > 0),
    "torch": ("a version", lambda value: isinstance(value, str)),
    "cuda": ("a version or null", lambda value: value is None or isinstance(value, str)),
    "cudnn": ("a version or null", lambda value: value is None or isinstance(value, str)),
    "triton": ("a version or null", lambda value: value is None or isinstance(value, str)),
}
"""What a measurement depends on: what it must be, and whether it is."""

REMARKS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "memory_mib": ("a number of MiB", lambda value: _is_count(value) and 0 < value < 1 << 30),
}
"""What may be missing beside it."""

_FIELDS = ("kernel", "config", "us")
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\],\n]')

Line = Callable[..., str]
"""Where something stands, by the names that lead to it: `"line 12: "`, or "" where nobody knows."""


@dataclass
class Content:
    """A profile's file: plain JSON values. faults: of entries that were left out."""

    meta: dict[str, Any] = field(default_factory=dict)
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)
    fit: dict[str, Any] | None = None
    faults: list[str] = field(default_factory=list)

    @property
    def model_made(self) -> bool:
        """Whether nothing of it was measured."""
        return self.meta.get("made_by") == "model"

    def summary(self) -> str:
        """The faults in one line: the first few in full."""
        more = len(self.faults) - SHOWN
        shown = "; ".join(self.faults[:SHOWN])
        return shown + (f"; and {more} more" if more > 0 else "")


def parsed(text: str) -> Content:
    """The content of a file. Raises `InvalidFile` with the line at fault."""
    try:
        data = json.loads(text, object_pairs_hook=_unique)
    except _Twice:
        key, line = next((path[-1], line) for path, line, again in _keys(text) if again)
        raise InvalidFile(f"line {line}: {_shown(key)} stands there a second time") from None
    except json.JSONDecodeError as error:
        raise InvalidFile(f"line {error.lineno}: {error.msg}") from None
    except (ValueError, RecursionError):  # a number of thousands of digits, lists in lists in lists
        raise InvalidFile("line 1: it holds more than JSON is read for here") from None
    return checked(data, _Lines(text))


def read(path: Path) -> Content:
    """The content of the file at `path`. Raises `InvalidFile`, the line at fault in its text."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InvalidFile("it is not UTF-8 text") from None
    except OSError as error:
        raise InvalidFile(error.strerror or str(error)) from None
    return parsed(text)


def _nowhere(*names: str) -> str:
    return ""


def checked(data: Any, line: Line = _nowhere) -> Content:
    """JSON data as a profile's content. Raises `InvalidFile` for what is none."""
    if not isinstance(data, dict):
        raise InvalidFile(f"{line()}it is no JSON object")
    for name in data:
        if name not in ("version", "meta", "entries", "fit"):
            raise InvalidFile(f"{line(name)}a profile has no field {name!r}")
    for name in ("version", "meta", "entries"):
        if name not in data:
            raise InvalidFile(f"{line()}{name!r} is missing")
    version = data["version"]
    if isinstance(version, bool) or version != VERSION:
        what = _shown(version)
        raise InvalidFile(f"{line('version')}it has version {what}, and {VERSION} is read here")
    _check_meta(data["meta"], line)
    for name in ("entries", "fit"):
        if name in data and not isinstance(data[name], dict):
            raise InvalidFile(f"{line(name)}{name!r} is no JSON object")
    content = Content(data["meta"], {}, data.get("fit"))
    if content.model_made and (data["entries"] or not content.fit):
        raise InvalidFile(f"{line('meta', 'made_by')}what a model made has 'fit' and no entries")
    wrong = None if content.fit is None else fit_fault(content.fit)
    if wrong is not None:
        names, what = wrong
        if content.model_made:  # which has nothing else
            raise InvalidFile(f"{line('fit', *names)}{what}")
        content.fit = None
        content.faults.append(f"{line('fit', *names)}{what}")
    for call, entry in data["entries"].items():
        found = _fault(entry)
        if found is None:
            content.entries[call] = entry
        else:
            name, what = found
            content.faults.append(f"{line('entries', call, name)}{_plain(call)}: {what}")
    return content


def _check_meta(meta: Any, line: Line) -> None:
    if not isinstance(meta, dict):
        raise InvalidFile(f"{line('meta')}'meta' is no JSON object")
    for name in META:
        if name not in meta:
            raise InvalidFile(f"{line('meta')}'meta' lacks {name!r}")
    for name, (wanted, good) in {**META, **REMARKS}.items():
        if name in meta and not good(meta[name]):
            what = _shown(meta[name])
            raise InvalidFile(f"{line('meta', name)}{name!r} is {what}, and not {wanted}")


def _fault(entry: Any) -> tuple[str, str] | None:
    """The field at fault and what is wrong; None for a good entry."""
    if not isinstance(entry, dict):
        return "", f"{_shown(entry)} is no JSON object"
    for name in _FIELDS:
        if name not in entry:
            return "", f"{name!r} is missing"
    for name in entry:
        if name not in (*_FIELDS, "others"):
            return name, f"an entry has no field {name!r}"
    for name, what in zip(_FIELDS, map(_wrong, _FIELDS, (entry[n] for n in _FIELDS)), strict=True):
        if what is not None:
            return name, what
    others = entry.get("others", [])
    if not isinstance(others, list):
        return "others", f"'others' is {_shown(others)}, and not a list"
    for other in others:
        if not isinstance(other, list) or len(other) != len(_FIELDS):
            return "others", f"one of 'others' is {_shown(other)}, and not [kernel, config, us]"
        for what in map(_wrong, _FIELDS, other):
            if what is not None:
                return "others", f"in one of 'others' {what}"
    return None


def _wrong(name: str, value: Any) -> str | None:
    """What is wrong with a value of an entry's field."""
    if name == "kernel":
        good = isinstance(value, str) and bool(value)
        return None if good else f"'kernel' is {_shown(value)}, and not a name"
    if name == "config":
        if not isinstance(value, dict):
            return f"'config' is {_shown(value)}, and no JSON object"
        for key, part in value.items():
            if not isinstance(part, (int, str, bool)):
                return f"{key!r} of 'config' is {_shown(part)}, and no whole number, text or truth"
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return f"'us' is {_shown(value)}, and not a number"
    if not LEAST_US <= value <= MOST_US:  # not a number is neither
        limits = f"{LEAST_US} and {MOST_US:.0f}"
        return f"'us' is {_shown(value)}, and not microseconds between {limits}"
    return None


def fit_fault(data: Any) -> tuple[tuple[str, ...], str] | None:
    """Of constants of the performance model the names that lead to a wrong one, and what is wrong.

    None where they are as `cost.Fit.to_json` writes them.
    """
    if not isinstance(data, dict) or data.get("version") != FIT_VERSION:
        return ("version",), f"it is no fit of version {FIT_VERSION}"
    tables: list[tuple[tuple[str, ...], Any]] = []
    for name in ("constants", "tiles"):
        if not isinstance(data.get(name), dict):
            return (name,), f"a fit's {name!r} is no JSON object"
        tables.append(((name,), data[name]))
    tables[:1] = [(("constants", form), terms) for form, terms in data["constants"].items()]
    for names, terms in tables:
        if not isinstance(terms, dict):
            return names, f"{names[-1]!r} of a fit is {_shown(terms)}, and no JSON object"
        for term, value in terms.items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not 1 / MOST_FACTOR <= value <= MOST_FACTOR:
                what = f"a fit's {term!r} is {_shown(value)}, and not a factor"
                return (*names, term), f"{what} between {1 / MOST_FACTOR} and {MOST_FACTOR:.0f}"
    return None


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _shown(value: Any) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    try:
        text = json.dumps(value)
    except RecursionError:
        return "lists in lists"
    return text if len(text) <= 40 else text[:37] + "..."


def _plain(call: str) -> str:
    """A call as one line that every log can take."""
    return json.dumps(call)[1:-1]


class _Lines:
    """Says on which line of a text a key stands, or the nearest thing around it that has one."""

    def __init__(self, text: str) -> None:
        self._text = text

    @cached_property
    def _places(self) -> dict[tuple[str, ...], int]:
        return lines_of(self._text)

    def __call__(self, *names: str) -> str:
        wanted = tuple(name for name in names if name)
        while wanted and wanted not in self._places:
            wanted = wanted[:-1]
        return f"line {self._places.get(wanted, 1)}: "


def lines_of(text: str) -> dict[tuple[str, ...], int]:
    """The line of every key in a JSON text, by the names that lead to it; in a list there is "".

    Of one that stands in several objects of a list the last.
    """
    return {path: line for path, line, _ in _keys(text)}


def _keys(text: str) -> Iterator[tuple[tuple[str, ...], int, bool]]:
    """Every key of a JSON text: the names that lead to it, its line, whether its object had it."""
    path: list[str] = []  # of each open object the key that is being read, of a list ""
    objects: list[set[str] | None] = []  # the keys of each so far; of a list None
    line, wants_key = 1, False
    for token in _TOKEN.findall(text):
        if token == "\n":
            line += 1
        elif token in ("{", "["):
            path.append("")
            objects.append(set() if token == "{" else None)
            wants_key = objects[-1] is not None
        elif token in ("}", "]"):
            path.pop()
            objects.pop()
            wants_key = False
        elif token == ",":
            wants_key = objects[-1] is not None
        elif wants_key:
            key, known = json.loads(token), objects[-1]
            assert known is not None
            path[-1] = key
            yield tuple(path), line, key in known
            known.add(key)
            wants_key = False


class _Twice(Exception):
    """An object has a key twice: which of the two counts nobody can know."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _Twice
    return found


def written(content: Content) -> str:
    """A content as a file holds it: sorted, an entry a line."""
    meta = json.dumps(content.meta, indent=1, sort_keys=True, ensure_ascii=False)
    parts = {"version": str(VERSION), "meta": meta, "entries": by_lines(content.entries)}
    if content.fit is not None:
        parts["fit"] = json.dumps(content.fit, indent=1, sort_keys=True, ensure_ascii=False)
    return "{\n" + ",\n".join(f'"{name}": {part}' for name, part in parts.items()) + "\n}\n"


def by_lines(values: Mapping[str, Any]) -> str:
    """A JSON object, sorted, with one line for each of its values."""
    lines = (f"{json.dumps(name)}: {json.dumps(values[name])}" for name in sorted(values))
    return "{\n" + ",\n".join(lines) + "\n}"
