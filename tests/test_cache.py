from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from accel import cache as cache_module
from accel.cache import STALE_SECONDS, DiskCache
from accel.settings import settings

ROOT = Path(__file__).parents[1]
PAYLOAD = {"steps": [1, 2.5, None, "é"], "name": 'with,"body":inside'}


@pytest.fixture
def cache(tmp_path: Path) -> DiskCache:
    return DiskCache(tmp_path / "cache", 2**20, "1")


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    """Another Python with this source; `cache` is the DiskCache in the folder given first."""
    head = "import os, sys, time; from accel.cache import DiskCache; import accel.cache\n"
    head += "cache = DiskCache(sys.argv[1], 2**20, '1')\n"
    command = [sys.executable, "-c", head + code, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def wait_for_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def temporary_files(cache: DiskCache) -> list[Path]:
    return list(cache.root.rglob("*.tmp"))


def age(cache: DiskCache, key: str, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(cache.folder / "plan" / f"{key}.json", (then, then))


def test_what_is_put_is_got(cache: DiskCache) -> None:
    assert cache.get("a", "plan") is None
    assert cache.put("a", "plan", PAYLOAD)
    assert cache.get("a", "plan") == PAYLOAD
    assert cache.get("a", "report") is None
    assert cache.put("a", "plan", {})
    assert cache.get("a", "plan") == {}
    assert cache.problem is None and not temporary_files(cache)


def test_a_file_is_one_json_object(cache: DiskCache) -> None:
    cache.put("a", "plan", PAYLOAD)
    stored = json.loads((cache.folder / "plan" / "a.json").read_text("utf-8"))
    assert stored["body"] == PAYLOAD
    assert (stored["key"], stored["kind"], stored["version"]) == ("a", "plan", "1")


def test_defaults_are_the_users_settings(cache_folder: Path) -> None:
    cache = DiskCache(None, None, "1")
    assert cache.root == cache_folder and cache.limit_bytes == settings().cache_bytes
    assert not cache_folder.exists()  # looking makes no folders


def test_what_json_cannot_hold_is_refused(cache: DiskCache) -> None:
    with pytest.raises(ValueError, match="JSON"):
        cache.put("a", "plan", {"x": float("nan")})
    with pytest.raises(TypeError):
        cache.put("a", "plan", {"x": object()})
    assert cache.entries() == []


@pytest.mark.parametrize(
    "name", ["", "..", "../a", "a/b", "a\\b", "/etc/passwd", "C:a", "A", "a.json", "a\n", "a b"]
)
def test_keys_are_never_paths(cache: DiskCache, name: str) -> None:
    for use in (
        lambda: cache.get(name, "plan"),
        lambda: cache.get("a", name),
        lambda: cache.put(name, "plan", {}),
        lambda: cache.put("a", name, {}),
        lambda: cache.remove(name),
        lambda: cache.lock(name, "plan").__enter__(),
        lambda: cache.get_or_build(name, "plan", dict),
    ):
        with pytest.raises(ValueError, match="cannot be a cache key"):
            use()
    assert not cache.root.exists()


@pytest.mark.parametrize("version", ["", "..", ".locks", "a/b", "1\n"])
def test_versions_are_never_paths(tmp_path: Path, version: str) -> None:
    with pytest.raises(ValueError, match="cannot be a cache version"):
        DiskCache(tmp_path, 1, version)


def damaged_contents(content: bytes) -> Iterator[bytes]:
    yield b""
    yield b"\0" * len(content)
    yield b"[]"
    yield content[:-1]
    yield content + b" "
    for keep in range(1, len(content), 7):
        yield content[:keep]
    for place in range(len(content)):
        yield content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def test_a_damaged_file_is_ignored_with_a_warning_and_built_again(
    cache: DiskCache, caplog: pytest.LogCaptureFixture
) -> None:
    cache.put("a", "plan", PAYLOAD)
    path = cache.folder / "plan" / "a.json"
    for content in damaged_contents(path.read_bytes()):
        path.write_bytes(content)
        caplog.clear()
        assert cache.get("a", "plan") is None, content
        assert [record.levelname for record in caplog.records] == ["WARNING"], content
        assert str(path) in caplog.text
        assert not path.exists()
        assert cache.get_or_build("a", "plan", lambda: PAYLOAD) == (PAYLOAD, False)
        assert cache.get_or_build("a", "plan", dict) == (PAYLOAD, True)


def test_a_file_under_another_name_is_not_taken(
    cache: DiskCache, caplog: pytest.LogCaptureFixture
) -> None:
    cache.put("a", "plan", PAYLOAD)
    (cache.folder / "plan" / "a.json").rename(cache.folder / "plan" / "b.json")
    assert cache.get("b", "plan") is None
    assert "another entry" in caplog.text


def test_a_file_of_another_format_is_not_taken(
    cache: DiskCache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache.put("a", "plan", PAYLOAD)
    monkeypatch.setattr(cache_module, "FORMAT", cache_module.FORMAT + 1)
    assert cache.get("a", "plan") is None
    assert "another version" in caplog.text


def test_versions_do_not_see_each_other_but_share_the_limit(cache: DiskCache) -> None:
    cache.put("a", "plan", {"from": "old"})
    age(cache, "a", 60)
    newer = DiskCache(cache.root, 250, "2")
    assert newer.get("a", "plan") is None
    newer.put("a", "plan", {"from": "new"})
    assert [(entry.version, entry.key) for entry in newer.entries()] == [("1", "a"), ("2", "a")]
    newer.put("b", "plan", {"from": "new"})
    assert [(entry.version, entry.key) for entry in newer.entries()] == [("2", "a"), ("2", "b")]


def test_the_least_recently_used_goes_first(cache: DiskCache) -> None:
    for seconds, key in ((40, "a"), (30, "b"), (20, "c")):
        cache.put(key, "plan", {"key": key})
        age(cache, key, seconds)
    size = cache.entries()[0].bytes
    assert cache.get("a", "plan") == {"key": "a"}  # used now: no longer the oldest
    cache.limit_bytes = 3 * size
    cache.put("d", "plan", {"key": "d"})
    assert [entry.key for entry in cache.entries()] == ["c", "a", "d"]


def test_more_than_the_whole_cache_is_not_kept(
    cache: DiskCache, caplog: pytest.LogCaptureFixture
) -> None:
    cache.put("small", "plan", {})
    cache.limit_bytes = 200
    assert not cache.put("large", "plan", {"x": "x" * 200})
    assert [entry.key for entry in cache.entries()] == ["small"]
    assert "SWITCHYARD_CACHE_GIB" in caplog.text


def test_prune_and_remove(cache: DiskCache) -> None:
    for key in ("a", "b", "c"):
        cache.put(key, "plan", {})
        cache.put(key, "report", {})
    assert [entry.kind for entry in cache.remove("b")] == ["plan", "report"]
    assert cache.remove("b") == []
    oldest = cache.entries()[0]
    total = sum(entry.bytes for entry in cache.entries())
    assert cache.prune(total) == []
    assert cache.prune(total - 1) == [oldest]
    assert len(cache.prune()) == 3
    assert cache.entries() == []


def test_foreign_files_in_the_folder_are_left_alone(cache: DiskCache) -> None:
    foreign = [
        cache.root / "other" / "plan" / "a.json",
        cache.root / "note.json",
        cache.folder / "plan" / "Read me.json",
        cache.folder / "plan" / ".hidden.tmp",
    ]
    for path in foreign:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    cache.put("a", "plan", {})
    DiskCache(cache.root, 0, "1").prune()
    assert all(path.read_text() == "mine" for path in foreign)
    assert cache.entries() == []


def test_two_threads_build_once(cache: DiskCache) -> None:
    builds = []
    together = threading.Barrier(8)
    results = []

    def build() -> dict[str, Any]:
        builds.append(threading.get_ident())
        time.sleep(0.1)
        return {"builder": builds[-1]}

    def ask() -> None:
        own = DiskCache(cache.root, cache.limit_bytes, cache.version)
        together.wait()
        results.append(own.get_or_build("a", "plan", build))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1
    assert [payload for payload, _ in results] == [{"builder": builds[0]}] * 8
    assert sorted(fetched for _, fetched in results) == [False] + [True] * 7


def test_two_processes_build_once(cache: DiskCache) -> None:
    code = """
def build():
    time.sleep(0.3)
    return {"builder": os.getpid()}
print("ready", flush=True)
while not os.path.exists(sys.argv[2]):
    time.sleep(0.001)
payload, fetched = cache.get_or_build("a", "plan", build)
print(payload["builder"], fetched, flush=True)
"""
    go = cache.root.parent / "go"
    processes = [start(code, cache.root, go) for _ in range(3)]
    assert [wait_for_line(process) for process in processes] == ["ready"] * 3
    go.touch()
    answers = [wait_for_line(process).split() for process in processes]
    assert [process.wait() for process in processes] == [0] * 3
    assert len({builder for builder, _ in answers}) == 1
    assert sorted(fetched for _, fetched in answers) == ["False", "True", "True"]


def test_a_build_that_fails_lets_the_next_one_try(cache: DiskCache) -> None:
    def fail() -> dict[str, Any]:
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        cache.get_or_build("a", "plan", fail)
    assert cache.get_or_build("a", "plan", lambda: PAYLOAD) == (PAYLOAD, False)


def test_waiting_is_said_and_does_not_last_for_ever(
    cache: DiskCache, caplog: pytest.LogCaptureFixture
) -> None:
    code = "with cache.lock('a', 'plan'):\n    print('held', flush=True)\n    time.sleep(60)\n"
    holder = start(code, cache.root)
    assert wait_for_line(holder) == "held"
    with cache.lock("a", "plan", timeout_seconds=0.2):
        pass
    assert "waiting for another process that is building plan a" in caplog.text
    assert "building it here too" in caplog.text
    with cache.lock("b", "plan", timeout_seconds=0):  # another key is free
        assert caplog.text.count("building it here too") == 1
    holder.kill()
    holder.wait()


def test_waiting_for_a_thread_does_not_last_for_ever(
    cache: DiskCache, caplog: pytest.LogCaptureFixture
) -> None:
    entered = []

    def enter() -> None:
        with cache.lock("a", "plan", timeout_seconds=0.05):
            entered.append(True)

    with cache.lock("a", "plan"):
        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
    assert entered and "waiting for another thread" in caplog.text


def test_a_killed_holder_frees_its_lock(cache: DiskCache) -> None:
    code = "with cache.lock('a', 'plan'):\n    print('held', flush=True)\n    time.sleep(60)\n"
    holder = start(code, cache.root)
    assert wait_for_line(holder) == "held"
    threading.Timer(0.2, holder.kill).start()
    started = time.monotonic()
    assert cache.get_or_build("a", "plan", lambda: PAYLOAD) == (PAYLOAD, False)
    assert time.monotonic() - started < 10
    holder.wait()


def test_killed_in_the_middle_of_writing(cache: DiskCache) -> None:
    cache.put("a", "plan", {"old": True})
    code = """
def stop(descriptor):  # the content is written, the final name not yet taken
    print("writing", flush=True)
    time.sleep(60)
os.fsync = stop
cache.get_or_build("b", "plan", lambda: {"x": "y" * 10000})
"""
    writer = start(code, cache.root)
    assert wait_for_line(writer) == "writing"
    (left_over,) = temporary_files(cache)
    assert DiskCache(cache.root, 2**20, "1").get("b", "plan") is None
    assert left_over.exists()  # its writer lives: not ours to remove
    writer.kill()
    writer.wait()
    after = DiskCache(cache.root, 2**20, "1")
    assert not temporary_files(after)
    assert after.get("a", "plan") == {"old": True}
    assert [entry.key for entry in after.entries()] == ["a"]
    assert after.get_or_build("b", "plan", lambda: PAYLOAD) == (PAYLOAD, False)


def test_an_old_temporary_file_is_removed_whoever_has_its_process_id(cache: DiskCache) -> None:
    cache.put("a", "plan", {})
    for name in ("young", "old"):
        (cache.folder / "plan" / f".{name}.{os.getpid()}.0123.tmp").touch()
    old = cache.folder / "plan" / f".old.{os.getpid()}.0123.tmp"
    then = time.time() - STALE_SECONDS - 1
    os.utime(old, (then, then))
    DiskCache(cache.root, 2**20, "2")
    assert [path.name for path in temporary_files(cache)] == [f".young.{os.getpid()}.0123.tmp"]


def check_that_nothing_is_kept(cache: DiskCache, caplog: pytest.LogCaptureFixture) -> str:
    """Builds go on without storage, and the reason is said once. Returns it."""
    for _ in range(3):
        assert cache.get_or_build("a", "plan", lambda: PAYLOAD) == (PAYLOAD, False)
        assert not cache.put("b", "plan", PAYLOAD)
    assert cache.get("a", "plan") is None
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "\n" not in record.message
    assert record.message == cache.problem
    return record.message


def test_a_folder_that_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    cache = DiskCache(tmp_path / "file" / "cache", 2**20, "1")
    message = check_that_nothing_is_kept(cache, caplog)
    assert str(cache.root) in message and "SWITCHYARD_CACHE_DIR" in message
    assert cache.entries() == [] and cache.prune() == [] and cache.remove("a") == []


def test_an_unwritable_folder_still_excludes_threads(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = DiskCache(tmp_path / "file" / "cache", 2**20, "1")
    inside: list[int] = []
    most: list[int] = []

    def build() -> dict[str, Any]:
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.02)
        inside.pop()
        return PAYLOAD

    def ask() -> None:
        cache.get_or_build("a", "plan", build)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 4


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EROFS, "Read-only file system"),
        (errno.EACCES, "Permission denied"),
    ],
)
def test_a_write_that_fails(
    cache: DiskCache,
    call: str,
    number: int,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    cache.put("kept", "plan", PAYLOAD)

    def fail(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(cache_module.os, call, fail)
        assert words in check_that_nothing_is_kept(cache, caplog)
    assert not temporary_files(cache)
    assert cache.get("kept", "plan") == PAYLOAD  # reading goes on
    assert cache.put("a", "plan", PAYLOAD)  # and writing, once it can
    assert cache.problem is None


def test_reading_does_not_need_a_writable_folder(
    cache: DiskCache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache.put("a", "plan", PAYLOAD)

    def fail(*arguments: object, **named: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(cache_module.os, "utime", fail)
    assert cache.get_or_build("a", "plan", dict) == (PAYLOAD, True)
    assert not caplog.records and cache.problem is None


def test_writes_do_not_tear(cache: DiskCache, caplog: pytest.LogCaptureFixture) -> None:
    """Readers in this process while others replace the entry: always one whole version."""
    code = "for i in range(150):\n    assert cache.put('a', 'plan', {'x': [i] * 2000})\n"
    cache.put("a", "plan", {"x": [0] * 2000})
    writers = [start(code, cache.root) for _ in range(2)]
    reads = 0
    while any(writer.poll() is None for writer in writers):
        payload = cache.get("a", "plan")
        assert payload is not None and len(set(payload["x"])) == 1
        reads += 1
    assert reads and [writer.returncode for writer in writers] == [0, 0]
    assert not caplog.records and not temporary_files(cache)
