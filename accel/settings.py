"""Settings from the environment. Importing this costs nothing: no torch."""

from __future__ import annotations

import logging
import math
import os
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import gettempdir
from typing import TypeVar

logger = logging.getLogger(__name__)

LOG_LEVELS = ("debug", "info", "warning", "error")
DEFAULT_CACHE_GIB = 2.0
SWITCHES = {"on": True, "off": False}

_T = TypeVar("_T")


@dataclass(frozen=True)
class Settings:
    """What a user may set; each field names its variable.

    `cache_dir` (SWITCHYARD_CACHE_DIR): where built plans are kept.
    `cache_bytes` (SWITCHYARD_CACHE_GIB, in GiB): size limit of the cache.
    `log_level` (SWITCHYARD_LOG): one of LOG_LEVELS, for the command line's log.
    `tune` (SWITCHYARD_TUNE, "on" or "off"): time the kernels for a call that no profile knows,
    before its first run. Unset, sessions of scripts do and hosts, whose users wait, do not.
    `pool_device_bytes` (SWITCHYARD_POOL_GIB, in GiB): weights that wait on each device; unset, what
    is free there bounds them.
    `pool_ram_bytes` (SWITCHYARD_POOL_RAM_GIB, in GiB): weights that wait in pinned RAM; unset, a
    quarter of all RAM.
    `idle` (SWITCHYARD_IDLE, "on" or "off"): while a session's engines have nothing to do, time what
    runs by prediction; later processes use it. Off unless it is set.
    """

    cache_dir: Path
    cache_bytes: int
    log_level: str
    tune: bool | None
    pool_device_bytes: int | None
    pool_ram_bytes: int | None
    idle: bool


def settings() -> Settings:
    """The settings in force. A bad value is warned of once and replaced by its default."""
    names = ("CACHE_DIR", "CACHE_GIB", "LOG", "TUNE", "IDLE", "POOL_GIB", "POOL_RAM_GIB")
    values = (os.environ.get(f"SWITCHYARD_{name}", "").strip() for name in names)
    return _parse(user_cache_dir(), *values)


@lru_cache(maxsize=16)  # one entry per environment seen, so that each bad value is warned of once
def _parse(
    default_cache: Path,
    cache_dir: str,
    cache_gib: str,
    log: str,
    tune: str,
    idle: str,
    pool_gib: str,
    pool_ram_gib: str,
) -> Settings:
    return Settings(
        cache_dir=_cache_dir(cache_dir, default_cache),
        cache_bytes=_bytes("SWITCHYARD_CACHE_GIB", cache_gib, int(DEFAULT_CACHE_GIB * 2**30)),
        log_level=_log_level(log),
        tune=_switch("SWITCHYARD_TUNE", tune),
        pool_device_bytes=_bytes("SWITCHYARD_POOL_GIB", pool_gib, None),
        pool_ram_bytes=_bytes("SWITCHYARD_POOL_RAM_GIB", pool_ram_gib, None),
        idle=_switch("SWITCHYARD_IDLE", idle) or False,
    )


def user_cache_dir() -> Path:
    """The platform's folder for caches of the current user, with our name in it; may not exist."""
    try:
        home = Path.home()
    except RuntimeError:  # no HOME and no entry in the user database, as in some containers
        return Path(gettempdir()) / "switchyard"
    if sys.platform == "win32":
        base, place = os.environ.get("LOCALAPPDATA", ""), home / "AppData" / "Local"
    elif sys.platform == "darwin":
        base, place = "", home / "Library" / "Caches"
    else:
        base, place = os.environ.get("XDG_CACHE_HOME", ""), home / ".cache"
    # The XDG rules: a relative path is invalid and ignored.
    return (Path(base) if base and Path(base).is_absolute() else place) / "switchyard"


def _cache_dir(text: str, default: Path) -> Path:
    if not text:
        return default
    try:
        path = Path(text).expanduser()
    except RuntimeError:
        path = Path(text)
    if path.is_absolute():
        return path
    # Relative to whatever folder a host was started in, there would be a cache for each of them.
    return _default("SWITCHYARD_CACHE_DIR", text, "an absolute path", default)


def _bytes(name: str, gib: str, default: _T) -> int | _T:
    """A size in bytes; `default` where none, or none that makes sense, is given."""
    if not gib:
        return default
    try:
        value = float(gib)
    except ValueError:
        value = math.nan
    if math.isfinite(value) and value >= 0:
        return int(value * 2**30)
    _warn(name, gib, "a size in GiB such as 2", default)
    return default


def _log_level(text: str) -> str:
    level = text.lower() or "warning"
    if level in LOG_LEVELS:
        return level
    return _default("SWITCHYARD_LOG", text, f"one of {', '.join(LOG_LEVELS)}", "warning")


def _switch(name: str, text: str) -> bool | None:
    if not text:
        return None
    if text.lower() in SWITCHES:
        return SWITCHES[text.lower()]
    return _default(name, text, "on or off", None)


def _default(name: str, text: str, wanted: str, default: _T) -> _T:
    _warn(name, text, wanted, default)
    return default


def _warn(name: str, text: str, wanted: str, default: object) -> None:
    used = "none" if default is None else default
    logger.warning("%s is %r, which is not %s: using %s", name, text, wanted, used)
