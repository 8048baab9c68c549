"""`cache list` and `cache prune`: the plans built on this machine."""

from __future__ import annotations

import argparse
import json
import math
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import SwitchyardError
from ..settings import settings
from . import output

if TYPE_CHECKING:
    from ..cache import DiskCache, Entry


def add(commands: Any) -> None:
    """Declare the command."""
    command = commands.add_parser(
        "cache",
        help="list or remove what was built here",
        description="The disk cache of built plans. Removing an entry is safe: it is built again "
        "when it is needed.",
    )
    actions = command.add_subparsers(title="actions", metavar="ACTION", required=True)
    shown = actions.add_parser("list", help="print every entry, the last used first")
    shown.add_argument("--json", action="store_true", help="print a JSON object instead")
    shown.set_defaults(run=show)
    pruned = actions.add_parser(
        "prune",
        help="remove entries, the least recently used first",
        description="Remove the least recently used entries until the rest fits. Without an "
        "option the limit is SWITCHYARD_CACHE_GIB.",
    )
    how = pruned.add_mutually_exclusive_group()
    how.add_argument("--all", action="store_true", help="remove everything")
    how.add_argument("--limit-gib", type=_gib, metavar="GIB", help="keep at most this much")
    pruned.add_argument("--json", action="store_true", help="print a JSON object instead")
    pruned.set_defaults(run=prune)


def show(options: argparse.Namespace) -> int:
    """Print the entries."""
    cache = _open()
    entries = [_facts(entry) for entry in reversed(cache.entries())]
    total = sum(entry["bytes"] for entry in entries)
    if options.json:
        output.print_json(
            {
                "folder": str(cache.root),
                "bytes": total,
                "limit_bytes": cache.limit_bytes,
                "entries": entries,
            }
        )
        return 0
    if entries:
        output.print_table(
            ("kind", "key", "family", "version", "size", "last used"),
            [
                (
                    entry["kind"],
                    entry["key"][:12],
                    entry["family"] or "—",
                    entry["version"],
                    output.size(entry["bytes"]),
                    output.when(datetime.fromisoformat(entry["used"]).timestamp()),
                )
                for entry in entries
            ],
            right=("size",),
        )
    used, limit = output.size(total), output.size(cache.limit_bytes)
    output.stdout().print(
        f"{len(entries)} entries, {used} of at most {limit}, in {cache.root}",
        markup=False,
        soft_wrap=True,
    )
    return 0


def prune(options: argparse.Namespace) -> int:
    """Remove entries and say which."""
    cache = _open()
    limit = settings().cache_bytes if options.limit_gib is None else options.limit_gib * 2**30
    # Descriptions first: what is gone can no longer be read.
    facts = {entry.path: _facts(entry) for entry in cache.entries()}
    removed = [facts[entry.path] for entry in cache.prune(0 if options.all else int(limit))]
    freed = sum(entry["bytes"] for entry in removed)
    left = cache.entries()
    if options.json:
        output.print_json({"removed": removed, "freed_bytes": freed, "entries_left": len(left)})
    else:
        for entry in removed:
            print(f"removed {entry['kind']} {entry['key'][:12]} {entry['family'] or ''}".rstrip())
        print(f"{len(removed)} removed, {output.size(freed)} freed, {len(left)} left")
    if options.all and left:
        raise SwitchyardError(f"{len(left)} entries in {cache.root} could not be removed")
    return 0


def _open() -> DiskCache:
    from ..compiler import open_cache

    return open_cache(None, None)


def _facts(entry: Entry) -> dict[str, Any]:
    return {
        "kind": entry.kind,
        "key": entry.key,
        "family": _family(entry.path),
        "version": entry.version,
        "bytes": entry.bytes,
        "used": datetime.fromtimestamp(entry.used, timezone.utc).isoformat(timespec="seconds"),
        "path": str(entry.path),
    }


def _family(path: Path) -> str | None:
    """The family that a plan was made for. Not through the cache: looking is not using."""
    try:
        structure = json.loads(path.read_bytes())["body"]["structure"]
        return structure.get("family") or f"a {structure['kind']} of no published family"
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def _gib(text: str) -> float:
    value = float(text)
    if not math.isfinite(value) or value < 0:
        raise ValueError(text)
    return value


_gib.__name__ = "size in GiB"  # what argparse calls a value that it refuses
