from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from accel.settings import settings, user_cache_dir


def test_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SWITCHYARD_CACHE_DIR")
    found = settings()
    assert found.cache_dir == user_cache_dir()
    assert found.cache_dir.is_absolute() and found.cache_dir.name == "switchyard"
    assert found.cache_bytes == 2 * 2**30
    assert found.log_level == "warning"


def test_values_are_read_at_every_call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SWITCHYARD_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("SWITCHYARD_CACHE_GIB", " 0.5 ")
    monkeypatch.setenv("SWITCHYARD_LOG", "INFO")
    found = settings()
    assert (found.cache_dir, found.cache_bytes, found.log_level) == (tmp_path, 2**29, "info")
    monkeypatch.setenv("SWITCHYARD_CACHE_GIB", "0")
    assert settings().cache_bytes == 0
    assert settings().pool_device_bytes is None and settings().pool_ram_bytes is None
    monkeypatch.setenv("SWITCHYARD_POOL_GIB", "1.5")
    monkeypatch.setenv("SWITCHYARD_POOL_RAM_GIB", "0")
    assert settings().pool_device_bytes == 3 * 2**29 and settings().pool_ram_bytes == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SWITCHYARD_CACHE_GIB", "much"),
        ("SWITCHYARD_CACHE_GIB", "-1"),
        ("SWITCHYARD_CACHE_GIB", "nan"),
        ("SWITCHYARD_CACHE_GIB", "inf"),
        ("SWITCHYARD_CACHE_DIR", "a/relative/path"),
        ("SWITCHYARD_LOG", "loud"),
        ("SWITCHYARD_TUNE", "maybe"),
        ("SWITCHYARD_POOL_GIB", "all"),
        ("SWITCHYARD_POOL_RAM_GIB", "-3"),
        ("SWITCHYARD_IDLE", "now"),
    ],
)
def test_bad_value_warns_once_and_gives_the_default(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("SWITCHYARD_CACHE_DIR")
    default = settings()
    monkeypatch.setenv(name, value)
    with caplog.at_level(logging.WARNING):
        assert settings() == default
        assert settings() == default
    (record,) = caplog.records
    assert name in record.message and value in record.message and "\n" not in record.message


@pytest.mark.parametrize(("text", "meant"), [("", None), ("on", True), ("Off", False)])
def test_tuning_is_on_off_or_up_to_the_caller(
    text: str, meant: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SWITCHYARD_TUNE", text)
    assert settings().tune is meant


@pytest.mark.parametrize(("text", "meant"), [("", False), ("on", True), ("OFF", False)])
def test_nothing_is_timed_in_idle_time_unless_it_is_asked_for(
    text: str, meant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SWITCHYARD_IDLE", text)
    assert settings().idle is meant


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="XDG is for the other systems")
def test_xdg_cache_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_cache_dir() == tmp_path / "switchyard"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert user_cache_dir() == Path.home() / ".cache" / "switchyard"


def test_leaves_that_every_command_reads_do_not_import_torch() -> None:
    code = (
        "import sys, accel.settings as s, accel.errors, accel.hardware, accel.cache; s.settings()"
    )
    code += "; sys.exit('torch' in sys.modules)"
    root = Path(__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
