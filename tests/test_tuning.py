"""Selection: profiles, measurements and defaults; on the CPU, with kernels made for the purpose."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import pickle
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from accel import background, tuning
from accel.cache import DiskCache
from accel.errors import OutOfMemory
from accel.hardware import describe
from accel.kernels import NO_CONFIG, Call, Kernel, TensorSpec, kernels, load_triton, registry
from accel.tuning import compiling
from accel.tuning import measure as measuring
from accel.tuning import profile as profiles
from accel.tuning import select as selection
from accel.tuning.compiling import Compiler
from accel.tuning.profile import Entry, Profile
from accel.tuning.select import Choice, Selector

sys.path.append(str(Path(__file__).parent / "kernels"))
from harness import chip

CPU = torch.device("cpu")
GPU = chip()


def spec(*shape: int, constant: bool = False) -> TensorSpec:
    tensor = torch.empty(shape, dtype=torch.float32, device="meta")
    return TensorSpec.of(tensor, constant)


def add_call(rows: int = 4) -> Call:
    return Call("add", spec(rows, 8), (spec(rows, 8), spec(rows, 8)), {})


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Kernel]]:
    """Registers kernels for `add` that exist only in this test, beside which there are none."""
    load_triton()  # not into this test's list
    monkeypatch.setattr(registry, "_KERNELS", [])

    def make(name: str, run: Any = None, configs: Any = None, **traits: Any) -> Kernel:
        def right(out: torch.Tensor, a: Any, b: Any, **_: Any) -> torch.Tensor:
            return torch.add(a, b, out=out)

        registry.kernel("add", name=name, configs=configs, **traits)(run or right)
        return kernels()[-1]  # type: ignore[index]

    yield make


@pytest.fixture
def cache(tmp_path: Path) -> DiskCache:
    return DiskCache(tmp_path, 1 << 20, "profile-test")


CUDA = torch.device("cuda")


def selector(
    cache: DiskCache | None = None, measuring: bool = True, waiting: bool = True
) -> Selector:
    compiler = Compiler(GPU, CUDA, cache)
    return Selector(compiler, CUDA, Profile(GPU, cache), measuring, waiting)


def times(monkeypatch: pytest.MonkeyPatch, us: dict[Any, float]) -> list[str]:
    """Pretend that candidates take these microseconds; returns the keys of calls measured."""
    asked: list[str] = []

    def fake(calls: Any, hardware: Any, device: Any) -> Iterator[Any]:
        for call in calls:
            asked.append(call.key)
            found = tuning_candidates(call)[:-1]
            yield (
                call,
                [
                    measuring.Measurement(kernel, config, us.get(_named(kernel, config)), "broken")
                    for kernel, config in found
                ],
            )

    monkeypatch.setattr(selection, "measure", fake)
    return asked


def tuning_candidates(call: Call) -> Any:
    return registry.candidates(call, GPU)


def _named(kernel: Kernel, config: Any) -> Any:
    return (kernel.name, *config.values()) if config else kernel.name


# Keys and constraints.


def test_a_call_is_told_by_what_matters_and_by_nothing_else() -> None:
    image, rows = spec(2, 8, 8, 16), spec(128, 16)
    weight = spec(32, 16, constant=True)
    linear = {"activation": "none"}
    keys = {
        Call("linear", spec(2, 8, 8, 32), (image, weight, None, None), linear).key,
        Call("linear", spec(128, 32), (rows, weight, None, None), linear).key,
    }
    assert len(keys) == 1, "how the rows are split does not matter"
    keys.add(Call("linear", spec(128, 16), (rows, weight, None, None), {"activation": "geglu"}).key)
    keys.add(Call("linear", spec(128, 32), (rows, weight, spec(32), None), linear).key)
    sliced = TensorSpec.of(torch.empty(128, 48, device="meta")[:, 16:32])
    keys.add(Call("linear", spec(128, 32), (sliced, weight, None, None), linear).key)
    odd = TensorSpec.of(torch.empty(128 * 16 + 1, device="meta")[1:].view(128, 16))
    assert not odd.aligned and sliced.aligned and sliced.row_stride() == 48
    keys.add(Call("linear", spec(128, 32), (odd, weight, None, None), linear).key)
    assert len(keys) == 5
    norm = {"groups": 4, "eps": 1e-5, "activation": "none"}
    shapes = [spec(2, 8, 8, 16), spec(2, 4, 16, 16)]
    assert len({Call("group_norm", s, (s, None, None), norm).key for s in shapes}) == 2


def test_strides_that_no_single_row_stride_says() -> None:
    images = torch.empty(2, 8, 8, 16, device="meta")
    assert TensorSpec.of(images[:, :, :, :8]).row_stride() == 16
    assert TensorSpec.of(images[:, :, :4]).row_stride() is None
    assert TensorSpec.of(images[:, :1, :, :8]).row_stride() is None
    assert TensorSpec.of(images[:1, :1, :, :8]).row_stride() == 16
    assert TensorSpec.of(torch.empty(4, device="meta").expand(3, 4)).row_stride() == 0
    assert not TensorSpec.of(images.transpose(1, 2)).contiguous


def test_candidates_are_those_that_fit_the_default_first(made: Any) -> None:
    made("slow", priority=2)
    made("tiled", priority=0, configs=lambda call, hardware: [{"tile": 64}, {"tile": 32}])
    made("elsewhere", devices=("cpu",))
    made("never", supports=lambda call, hardware: False)
    found = registry.candidates(add_call(), GPU)
    names = [(kernel.name, dict(config)) for kernel, config in found]
    expected = [("tiled", {"tile": 64}), ("tiled", {"tile": 32}), ("slow", {})]
    assert names == [*expected, ("reference.add", {})]


# Profiles.


def test_a_profile_outlives_its_process(cache: DiskCache) -> None:
    entry = Entry("tiled", {"tile": 64, "wide": True, "kind": "a"}, 12.5)
    Profile(GPU, cache).add({"a": entry})
    again = Profile(GPU, cache)
    assert again.get("a") == entry and again.get("b") is None
    other = Profile(dataclasses.replace(GPU, torch="9.9"), cache)
    assert other.get("a") is None, "another version of PyTorch is measured anew"


def test_two_processes_keep_what_each_measured(cache: DiskCache) -> None:
    ours, theirs = Profile(GPU, cache), Profile(GPU, cache)
    ours.add({"a": Entry("x", {}, 1.0)})
    theirs.add({"b": Entry("y", {}, 2.0)})
    both = Profile(GPU, cache)
    assert both.get("a") is not None and both.get("b") is not None


@pytest.mark.parametrize(
    "fields",
    [
        None,
        {"kernel": "x", "config": {}},
        {"kernel": "x", "config": {}, "us": -1},
        {"kernel": "x", "config": {}, "us": float("nan")},
        {"kernel": "x", "config": {}, "us": True},
        {"kernel": 3, "config": {}, "us": 1.0},
        {"kernel": "x", "config": {"tile": [1]}, "us": 1.0},
        {"kernel": "x", "config": None, "us": 1.0},
    ],
    ids=str,
)
def test_an_entry_that_makes_no_sense_is_left_out(
    fields: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    good = {"kernel": "x", "config": {"tile": 64}, "us": 3.0}
    data = {
        "version": profiles.PROFILE_VERSION,
        "meta": profiles.identity(GPU),
        "entries": {"bad": fields, "good": good},
    }
    (tmp_path / "gpu.json").write_text(json.dumps(data))
    monkeypatch.setattr(profiles, "SHIPPED", tmp_path)
    profile = Profile(GPU, None)
    assert profile.get("bad") is None
    assert profile.get("good") == Entry("x", {"tile": 64}, 3.0)
    assert [r.levelname for r in caplog.records] == ["WARNING"] and "bad" in caplog.text


@pytest.mark.parametrize("content", ["{", "[]", '{"meta": {"gpu": "sm_90"}, "version": 99}'])
def test_a_shipped_profile_that_cannot_be_read_is_ignored(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gpu.json").write_text(content)
    monkeypatch.setattr(profiles, "SHIPPED", tmp_path)
    assert Profile(GPU, None).get("a") is None


def test_the_users_own_measurements_go_before_the_shipped(
    cache: DiskCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = {name: {"kernel": "x", "config": {}, "us": 3.0} for name in ("a", "b")}
    data = {"version": profiles.PROFILE_VERSION, "meta": profiles.identity(GPU), "entries": shipped}
    (tmp_path / "gpu.json").write_text(json.dumps(data))
    monkeypatch.setattr(profiles, "SHIPPED", tmp_path)
    Profile(GPU, cache).add({"a": Entry("y", {}, 2.0)})
    again = Profile(GPU, cache)
    assert (again.get("a"), again.get("b")) == (Entry("y", {}, 2.0), Entry("x", {}, 3.0))
    assert set(again.to_json()["entries"]) == {"a"}


def test_families_differ_in_image_size_alone() -> None:
    def attention(tokens: int, others: int) -> str:
        q, k = spec(2, tokens, 64), spec(2, others, 64)
        return Call("attention", q, (q, k, k), {"heads": 8, "scale": 0.125}).key

    def linear(rows: int, columns: int) -> str:
        x, weight = spec(rows, 16), spec(columns, 16, constant=True)
        return Call("linear", spec(rows, columns), (x, weight, None, None), {}).key

    def upsample(side: int) -> str:
        attrs = {"size": (2 * side, 2 * side)}
        out, x = spec(2, 2 * side, 2 * side, 8), spec(2, side, side, 8)
        return Call("upsample_nearest", out, (x,), attrs).key

    def family(key: str) -> str:
        return profiles.family_of(key)[0]

    assert family(attention(64, 64)) == family(attention(100, 100))
    assert family(attention(64, 77)) == family(attention(100, 77))
    assert family(attention(64, 77)) != family(attention(64, 64))
    assert family(attention(64, 77)) != family(attention(64, 154)), "a prompt is no image"

    def sliced(tokens: int, prompt: int | None = None) -> str:
        """Queries, keys and values as slices of one product each."""
        made = torch.empty(2, tokens, 192, device="meta")
        other = made if prompt is None else torch.empty(2, prompt, 192, device="meta")
        parts = (made[..., :64], other[..., 64:128], other[..., 128:])
        specs = tuple(TensorSpec.of(part) for part in parts)
        return Call("attention", spec(2, tokens, 64), specs, {"heads": 8, "scale": 0.125}).key

    assert family(sliced(64)) == family(sliced(100)) != family(attention(64, 64))
    assert family(sliced(64, 77)) == family(sliced(100, 77)) != family(sliced(64, 154))
    assert family(linear(64, 32)) == family(linear(65, 32)) != family(linear(64, 48))
    assert profiles.family_of(linear(65, 32))[1] == 65
    assert family(upsample(8)) == family(upsample(12))
    norm = {"groups": 4, "eps": 1e-5, "activation": "none"}
    images = [spec(2, *sides, 16) for sides in ((8, 8), (6, 11))]
    square, wide = (Call("group_norm", s, (s, None, None), norm).key for s in images)
    assert family(square) == family(wide)

    def joined(batch: int, *sides: int) -> str:
        image, scale = spec(batch, *sides, 16), spec(16, constant=True)
        both = spec(2, batch, *sides, 16)
        return Call("concat_group_norm", both, (image, None, scale, scale), norm).key

    assert family(joined(2, 8, 8)) == family(joined(2, 6, 11)) == family(joined(1, 8, 16))
    rows = [profiles.family_of(joined(1, *sides))[1] for sides in ((8, 8), (8, 16))]
    assert rows[1] == 2 * rows[0]


def test_a_measurement_speaks_for_sizes_near_by(
    made: Any, cache: DiskCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    made("library")
    made("tiled", configs=lambda call, hardware: [{"tile": 64}])
    asked = times(monkeypatch, {"library": 2.0, ("tiled", 64): 1.0})
    chooser = selector(cache)
    chooser.select([add_call(100)])
    near = chooser.select([add_call(140)])[0]
    assert near.kernel.name == "tiled" and near.us is None and "near this" in near.reason
    assert near.about == pytest.approx(1.4), "as many more rows take that much longer"
    assert asked == [add_call(100).key]
    chooser.select([add_call(160)])
    assert asked == [add_call(100).key, add_call(160).key]


# Selection.


def test_the_fastest_measured_is_chosen_once_and_remembered(
    made: Any, cache: DiskCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    made("library")
    made("tiled", configs=lambda call, hardware: [{"tile": 64}, {"tile": 32}])
    asked = times(monkeypatch, {"library": 9.0, ("tiled", 64): 8.0, ("tiled", 32): 4.0})
    chooser = selector(cache)
    first, second, third = chooser.select([add_call(), add_call(), add_call(50)])
    assert (first.kernel.name, dict(first.config), first.us) == ("tiled", {"tile": 32}, 4.0)
    assert second is first and third.kernel.name == "tiled"
    assert asked == [add_call().key, add_call(50).key]
    assert chooser.select([add_call()])[0] is first
    assert selector(cache).select([add_call()])[0].config == {"tile": 32}
    assert len(asked) == 2, "what is remembered is not measured again"


def test_a_choice_stays_for_the_life_of_the_process(
    made: Any, cache: DiskCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    made("library")
    made("other")
    times(monkeypatch, {"library": 1.0, "other": 2.0})
    chooser = selector(cache)
    before = chooser.select([add_call()])[0]
    chooser.profile.add({add_call().key: Entry("other", {}, 0.5)})
    assert chooser.select([add_call()])[0] is before


def test_without_measuring_a_library_runs_and_says_so(made: Any) -> None:
    made("ours", priority=0, launches=lambda *arguments: [])
    made("second", priority=5)
    made("library", priority=1)
    choice = selector(measuring=False).select([add_call()])[0]
    assert choice.kernel.name == "library" and "measuring is off" in choice.reason


def test_a_kernel_alone_is_not_taken_on_trust(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made("ours", launches=lambda *arguments: [])
    assert selector(measuring=False).select([add_call()])[0].kernel.name == "reference.add"
    asked = times(monkeypatch, {})
    assert selector().select([add_call()])[0].kernel.name == "reference.add"
    assert asked
    times(monkeypatch, {"ours": 1.0})
    assert selector().select([add_call()])[0].kernel.name == "ours"


def test_a_profile_that_names_what_is_not_offered_is_not_believed(
    made: Any, cache: DiskCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    made("library")
    made("tiled", configs=lambda call, hardware: [{"tile": 64}])
    asked = times(monkeypatch, {"library": 1.0, ("tiled", 64): 2.0})
    Profile(GPU, cache).add({add_call().key: Entry("tiled", {"tile": 7}, 0.1)})
    assert selector(cache).select([add_call()])[0].kernel.name == "library"
    assert asked


def test_a_size_near_by_lends_a_configuration_that_this_one_would_not_offer(
    made: Any, cache: DiskCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The code is there already, which counts for more than the last percent."""
    made("library")
    made("tiled", configs=lambda call, hardware: [{"tile": call.out.shape[0]}])
    asked = times(monkeypatch, {"library": 2.0, ("tiled", 40): 1.0})
    assert selector(cache).select([add_call(40)])[0].config == {"tile": 40}
    near = selector(cache).select([add_call(48)])[0]
    assert near.kernel.name == "tiled" and near.config == {"tile": 40} and len(asked) == 1


def test_a_configuration_that_does_not_fit_is_not_lent(
    made: Any, cache: DiskCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    made("library")
    made(
        "tiled",
        configs=lambda call, hardware: [{"tile": 7}],
        fits=lambda call, config, hardware: call.out.shape[0] <= 44,
    )
    times(monkeypatch, {"library": 2.0, ("tiled", 7): 1.0})
    assert selector(cache).select([add_call(40)])[0].kernel.name == "tiled"
    near, far = selector(cache, measuring=False).select([add_call(44), add_call(48)])
    assert near.kernel.name == "tiled" and far.kernel.name == "library"


@pytest.mark.skipif(not load_triton(), reason="there is no Triton here")
def test_what_kernels_say_of_sizes_near_by() -> None:
    """Whole groups in one block end where its registers do; a prompt's keys where its tiles do."""

    def half(*shape: int) -> TensorSpec:
        return TensorSpec.of(torch.empty(shape, dtype=torch.float16, device="meta"))

    def fits(name: str, call: Call, config: dict[str, Any]) -> bool:
        (kernel,) = (kernel for kernel in kernels() if kernel.name == name)
        return kernel.fits(call, config, GPU)

    def norm(side: int) -> Call:
        image, vector = half(2, side, side, 1280), half(1280)
        attrs = {"groups": 32, "eps": 1e-5, "activation": "silu"}
        return Call("group_norm", image, (image, vector, vector), attrs)

    whole = {"scheme": "whole", "groups": 1, "warps": 8, "pdl": True}
    assert fits("triton.group_norm", norm(16), whole)
    assert not fits("triton.group_norm", norm(24), whole)
    (kernel,) = (kernel for kernel in kernels() if kernel.name == "triton.group_norm")
    assert not kernel.fits(norm(16), whole, chip((8, 9))), "its launches cannot overlap"
    assert kernel.fits(norm(16), whole | {"pdl": False}, chip((8, 9)))

    def attention(keys: int) -> Call:
        q, k = half(2, 256, 1280), half(2, keys, 1280)
        return Call("attention", q, (q, k, k), {"heads": 8, "scale": 0.1})

    short = {"kind": "short", "rows": 64, "warps": 4, "repeat": 1}
    assert fits("triton.attention", attention(77), short)
    assert not fits("triton.attention", attention(154), short)
    assert not fits("triton.attention", attention(231), short)


def test_a_tie_goes_to_what_overlaps_with_its_neighbours(
    made: Any, cache: DiskCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    made("library")
    made("ours", configs=lambda call, hardware: [{"pdl": False}, {"pdl": True}])
    times(monkeypatch, {"library": 1.0, ("ours", False): 1.0, ("ours", True): 1.019})
    assert selector(cache).select([add_call()])[0].config == {"pdl": True}
    times(monkeypatch, {"library": 1.0, ("ours", False): 1.0, ("ours", True): 1.03})
    assert selector().select([add_call()])[0].kernel.name == "library"


def test_a_default_that_cannot_be_planned_gives_way(made: Any) -> None:
    def gone(call: Call, config: Any) -> int:
        raise RuntimeError("there is no such algorithm")

    made("first", priority=0, configs=lambda call, hardware: [{"algorithm": 0}], workspace=gone)
    made("second", priority=1)
    assert selector(measuring=False).select([add_call()])[0].kernel.name == "second"


def test_where_nothing_can_be_measured_the_default_runs(
    made: Any, cache: DiskCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    made("first", priority=0)
    made("second")
    times(monkeypatch, {})
    choice = selector(cache).select([add_call()])[0]
    assert choice.kernel.name == "first" and "broken" in choice.reason
    assert Profile(GPU, cache).get(add_call().key) is None


def test_what_is_measured_is_kept_though_the_rest_fails(
    made: Any, cache: DiskCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    made("library")
    made("other")

    def breaks(calls: Any, hardware: Any, device: Any) -> Iterator[Any]:
        found = tuning_candidates(calls[0])[:-1]
        yield calls[0], [measuring.Measurement(*one, 2.0) for one in found]
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(selection, "measure", breaks)
    with pytest.raises(RuntimeError):
        selector(cache).select([add_call(4), add_call(400)])
    assert Profile(GPU, cache).get(add_call(4).key) is not None


def test_that_triton_fails_here_is_not_remembered(
    made: Any, cache: DiskCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    made("library")
    made("ours", launches=lambda *arguments: [])
    times(monkeypatch, {"library": 2.0})
    assert selector(cache).select([add_call()])[0].kernel.name == "library"
    assert Profile(GPU, cache).get(add_call().key) is None


def test_a_remembered_plan_that_cannot_be_had_is_measured_anew(
    made: Any, cache: DiskCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(call: Call, config: Any) -> int:
        raise RuntimeError("there are only 2 plans")

    made("library")
    made("planned", configs=lambda call, hardware: [{"plan": 5}], workspace=gone)
    asked = times(monkeypatch, {"library": 1.0})
    Profile(GPU, cache).add({add_call().key: Entry("planned", {"plan": 5}, 0.5)})
    assert selector(cache).select([add_call()])[0].kernel.name == "library"
    assert asked


def test_one_kernel_needs_no_measuring(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made("only")
    asked = times(monkeypatch, {})
    assert selector().select([add_call()])[0].kernel.name == "only"
    assert not asked


def test_on_the_cpu_the_reference_runs() -> None:
    choice = tuning.selector_for(CPU).select([add_call()])[0]
    assert choice.kernel.name == "reference.add" and choice.config == NO_CONFIG
    assert tuning.selector_for(CPU) is tuning.selector_for(CPU)
    assert describe("cpu").kind == "cpu"


# Compiling: what is there, and what is made in the background meanwhile.


@dataclasses.dataclass(frozen=True)
class Code:
    """In place of a launch of Triton's."""

    name: str

    def key(self) -> str:
        return self.name

    def warm(self) -> None:
        pass

    def compile(self) -> None:
        raise RuntimeError("refused")


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Compiling in processes of their own, which takes until `go` is set; `asked`: of what.

    `works`: whether they make anything.
    """
    state: dict[str, Any] = {"go": threading.Event(), "asked": [], "works": True}

    def compile_apart(variants: Any, hardware: Any, count: int, niceness: int = 0) -> set[str]:
        state["asked"] += [kernel.name for kernel, _, _ in variants.values()]
        assert state["go"].wait(10)
        return set(variants) if state["works"] else set()

    monkeypatch.setattr(compiling, "compile_apart", compile_apart)
    yield state
    state["go"].set()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_size_near_by_lends_its_kernel_until_the_predicted_one_is_compiled(
    made: Any, cache: DiskCache, processes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made("library")
    made(
        "tiled",
        configs=lambda call, hardware: [{"tile": 64}, {"tile": 32}],
        launches=lambda *arguments, config, **rest: [Code(f"tiled {config['tile']}")],
    )
    times(monkeypatch, {"library": 2.0, ("tiled", 64): 1.0, ("tiled", 32): 1.5})
    selector(cache, measuring=True).select([add_call(100)])
    known = next(kernel for kernel in registry.kernels() if kernel.name == "tiled")

    def predicted(self: Selector, call: Call, *rest: Any) -> Choice:
        return Choice(known, {"tile": 32}, "predicted, 0.5 us", about=0.5)

    monkeypatch.setattr(Selector, "_predicted", predicted)
    chooser = selector(cache, measuring=False, waiting=False)
    # Of what is not there nothing is lent.
    first = chooser.select([add_call(120)])[0]
    assert first.kernel.name == "library" and first.provisional
    chooser.compiler._stored.add(key_of(chooser, known, {"tile": 64}))
    second, again = (chooser.select([add_call(140)])[0] for _ in range(2))
    assert second.config == {"tile": 64} and second.provisional and again == second
    assert "near this" in second.reason and "until what is predicted" in second.reason
    assert not chooser.settled and len(processes["asked"]) == 1
    # Who waits has the predicted one at once.
    patient = selector(cache, measuring=False, waiting=True).select([add_call(140)])[0]
    assert patient.config == {"tile": 32} and not patient.provisional
    processes["go"].set()
    wait_for(lambda: chooser.settled)
    assert chooser.select([add_call(140)])[0] == second, "equal bits, till a host asks for better"
    chooser.renew()
    after = chooser.select([add_call(140)])[0]
    assert after.config == {"tile": 32} and not after.provisional


def key_of(chooser: Selector, kernel: Kernel, config: Any) -> str:
    """Under which a variant's code is known."""
    (key,) = compiling._launches([(kernel, config, add_call(100))])
    return key


def test_libraries_run_until_ours_is_compiled(
    made: Any, cache: DiskCache, processes: dict[str, Any]
) -> None:
    made("ours", priority=0, unmeasured=True, launches=lambda *arguments: [Code("ours")])
    made("library", priority=5)
    chooser = selector(cache, measuring=False, waiting=False)
    first, again = (chooser.select([add_call()])[0] for _ in range(2))
    assert first.kernel.name == "library" and first.provisional and not chooser.settled
    assert "until ours is compiled" in first.reason
    assert again == first and processes["asked"] == ["ours"], "what is under way is asked for once"
    chooser.renew()  # too early
    processes["go"].set()
    wait_for(lambda: chooser.settled)
    assert chooser.select([add_call()])[0] == first, "equal bits, till a host asks for better"
    chooser.renew()
    after = chooser.select([add_call()])[0]
    assert after.kernel.name == "ours" and not after.provisional
    # A later process finds it compiled, and does not wait for it.
    processes["go"].clear()
    later = selector(cache, measuring=False, waiting=False).select([add_call()])[0]
    assert later.kernel.name == "ours" and processes["asked"] == ["ours"]


def test_what_was_not_compiled_is_not_remembered(
    made: Any, cache: DiskCache, processes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes that were killed, or never began: this process tries, once, and no other knows."""
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    ours = made("ours", launches=lambda *arguments: [Code("ours")])
    variant = (ours, NO_CONFIG, add_call())
    processes["works"] = False
    processes["go"].set()
    compiler = Compiler(GPU, CUDA, cache)
    compiler.compile_later([variant])
    wait_for(lambda: not compiler.busy)
    assert compiler.has(variant), "it was refused, and is not tried over and over"
    assert not Compiler(GPU, CUDA, cache).has(variant)
    monkeypatch.setattr(Code, "compile", lambda self: None)
    again = Compiler(GPU, CUDA, cache)
    again.compile_later([variant])
    wait_for(lambda: not again.busy)
    assert Compiler(GPU, CUDA, cache).has(variant), "it was compiled here, in the background"


def test_a_process_that_goes_away_remembers_nothing(
    made: Any, cache: DiskCache, processes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = made("ours", launches=lambda *arguments: [Code("ours")])
    monkeypatch.setattr(Code, "compile", lambda self: None)
    monkeypatch.setattr(background, "closing", threading.Event())
    background.closing.set()
    processes["works"] = False
    processes["go"].set()
    compiler = Compiler(GPU, CUDA, cache)
    compiler.compile_later([(ours, NO_CONFIG, add_call())])
    wait_for(lambda: not compiler.busy)
    assert not Compiler(GPU, CUDA, cache).has((ours, NO_CONFIG, add_call()))


def test_a_cleared_cache_of_tritons_has_nothing(
    made: Any, cache: DiskCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = made("ours", launches=lambda *arguments: [Code("ours")])
    variant = (ours, NO_CONFIG, add_call())
    before = Compiler(GPU, CUDA, cache)
    before._remember(compiling._launches([variant]))
    assert Compiler(GPU, CUDA, cache).has(variant)
    monkeypatch.setattr(compiling, "cache_token", lambda: "another")
    assert not Compiler(GPU, CUDA, cache).has(variant)


@pytest.fixture
def with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were one, as far as proving a choice goes."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())


def broken(error: str) -> Callable[[Code], None]:
    def warm(self: Code) -> None:
        raise RuntimeError(error)

    return warm


@pytest.mark.usefixtures("with_a_gpu")
def test_what_was_measured_elsewhere_is_tried_before_it_is_believed(
    made: Any, cache: DiskCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A profile comes with the pack; whether Triton works here, it cannot say."""
    made("ours", launches=lambda *arguments: [Code("ours")])
    made("library", priority=5)
    Profile(GPU, cache).add({add_call().key: Entry("ours", {}, 1.0)})
    assert selector(cache, measuring=False).select([add_call()])[0].kernel.name == "ours"
    monkeypatch.setattr(Code, "warm", broken("no compiler was found"))
    choice = selector(cache, measuring=False).select([add_call()])[0]
    assert choice.kernel.name == "library" and "does not run here" in choice.reason
    asked = times(monkeypatch, {"library": 1.0})
    assert selector(cache).select([add_call()])[0].kernel.name == "library"
    assert asked, "who measures does not take the library on trust"


@pytest.mark.usefixtures("with_a_gpu")
def test_full_memory_says_nothing_of_a_kernel(
    made: Any, cache: DiskCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    made("ours", launches=lambda *arguments: [Code("ours")])
    made("library", priority=5)
    Profile(GPU, cache).add({add_call().key: Entry("ours", {}, 1.0)})
    chooser = selector(cache, measuring=False)
    monkeypatch.setattr(Code, "warm", broken("Triton Error [CUDA]: out of memory"))
    with pytest.raises(OutOfMemory):
        chooser.select([add_call()])
    monkeypatch.undo()


def test_who_waits_gets_ours_at_once(made: Any, processes: dict[str, Any]) -> None:
    made("ours", priority=0, unmeasured=True, launches=lambda *arguments: [Code("ours")])
    made("library", priority=5)
    choice = selector(measuring=False).select([add_call()])[0]
    assert choice.kernel.name == "ours" and not choice.provisional and not processes["asked"]


def test_another_triton_has_compiled_nothing(cache: DiskCache, made: Any) -> None:
    ours = made("ours", launches=lambda *arguments: [Code("ours")])
    variant = (ours, NO_CONFIG, add_call())
    before = Compiler(GPU, CUDA, cache)
    before._remember(compiling._launches([variant]))
    assert Compiler(GPU, CUDA, cache).has(variant)
    other = dataclasses.replace(GPU, triton="9.9.0")
    assert not Compiler(other, CUDA, cache).has(variant)
    made("changed", launches=lambda *arguments: [Code("ours, changed")])
    assert not Compiler(GPU, CUDA, cache).has((kernels()[-1], NO_CONFIG, add_call()))  # type: ignore[index]


def test_many_kernels_are_compiled_apart_and_few_are_not(
    made: Any, processes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    warmed: list[str] = []
    monkeypatch.setattr(Code, "warm", lambda self: warmed.append(self.name))
    processes["go"].set()
    few = [made(f"few{i}", launches=lambda *a, i=i: [Code(f"few{i}")]) for i in range(3)]
    many = [made(f"many{i}", launches=lambda *a, i=i: [Code(f"m{i}")]) for i in range(40)]
    compiler = Compiler(GPU, CUDA)
    compiler.compile((kernel, NO_CONFIG, add_call()) for kernel in few)
    assert not processes["asked"] and sorted(warmed) == ["few0", "few1", "few2"]
    compiler.compile((kernel, NO_CONFIG, add_call()) for kernel in [*few, *many])
    assert processes["asked"] == [kernel.name for kernel in many], "the few are known"
    assert len(warmed) == 43


FRAGILE = """
import os, re, sys, time
print(flush=True)
for name in re.findall(rb"kernel_[a-z0-9]+", sys.stdin.buffer.read()):
    if b"crash" in name:
        os._exit(139)
    if b"hang" in name:
        time.sleep(60)
    print(name.decode(), flush=True)
"""
"""In place of a process that compiles: says it has compiled each kernel that it is told of."""


def test_what_crashes_or_hangs_costs_itself_alone_and_is_not_tried_here(
    made: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compiling, "_BOOT", FRAGILE)
    monkeypatch.setattr(compiling, "PATIENCE", 0.8)
    monkeypatch.setattr(compiling, "_deadly", set())
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    touched: list[str] = []
    for what in ("warm", "compile"):
        monkeypatch.setattr(Code, what, lambda self: touched.append(self.name))
    names = [f"kernel_{name}" for name in ("a", "crash1", "b", "crash2", "hang", "c")]
    variants = {}
    for name in names:
        ours = made(name, launches=lambda *rest, name=name: [Code(name)])
        (key,) = compiling._launches([(ours, NO_CONFIG, add_call())])
        variants[key] = (ours, NO_CONFIG, add_call())
    done = compiling.compile_apart(variants, GPU, 1)
    assert done == {"kernel_a", "kernel_b", "kernel_c"} and not compiling._processes
    bad = {kernel.name for kernel, *rest in variants.values() if compiling.deadly((kernel, *rest))}
    assert bad == {"kernel_crash1", "kernel_crash2", "kernel_hang"}
    assert sum("fails badly" in record.getMessage() for record in caplog.records) == 3
    compiler = Compiler(GPU, CUDA)
    compiler.compile(variants.values())
    compiler.compile_later(list(variants.values()))
    wait_for(lambda: not compiler.busy)
    assert touched and bad.isdisjoint(touched)
    assert all(map(compiler.has, variants.values())), "what was refused is not asked for again"
    times = measured(monkeypatch, add_call())
    assert {name for name, result in times.items() if result.us is None} == bad
    made("library", priority=9)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    chooser = selector(measuring=False)
    chooser.profile.add({add_call().key: Entry("kernel_hang", {}, 1.0)})
    assert chooser.select([add_call()])[0].kernel.name == "library"


def test_who_has_had_enough_ends_what_he_began_and_nothing_else(
    made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "_BOOT", FRAGILE)
    monkeypatch.setattr(compiling, "_deadly", set())
    made("kernel_hang", launches=lambda *rest: [Code("kernel_hang")])
    variant = (kernels()[0], NO_CONFIG, add_call())  # type: ignore[index]
    other = threading.Thread(target=compiling.compile_apart, args=({"other": variant}, GPU, 1))
    other.start()
    wait_for(lambda: len(compiling._processes) == 1)
    (stays,) = compiling._processes
    joined = threading.Thread.join

    def interrupted(self: threading.Thread, timeout: float | None = None) -> None:
        if threading.current_thread() is not threading.main_thread() or timeout is not None:
            return joined(self, timeout)
        wait_for(lambda: len(compiling._processes) == 2)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(threading.Thread, "join", interrupted)
        compiling.compile_apart({"mine": variant}, GPU, 1)
    assert set(compiling._processes) == {stays} and stays.poll() is None
    # The end of this process ends all, and none is started any more.
    monkeypatch.setattr(background, "closing", threading.Event())
    compiling._end_those(None)
    other.join(10)
    assert not other.is_alive() and not compiling._processes
    assert compiling.compile_apart({"late": variant}, GPU, 1) == set()
    assert not compiling._deadly, "it was ended, and did not end"


@pytest.mark.skipif(not load_triton(), reason="there is no Triton here")
def test_a_process_whose_parent_was_killed_compiles_nothing_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    process = compiling._started(threading.Event(), low=False)
    assert process is not None and process.stdin is not None and process.stdout is not None
    process.stdout.close()
    call, kernel, config = norm()
    with process.stdin:
        process.stdin.write(pickle.dumps((0, sys.path, (9, 0), [(kernel.name, config, call)])))
    assert process.wait(60)
    compiling._end(process)
    assert not list(tmp_path.rglob("*.cubin"))


def norm() -> tuple[Call, Kernel, Any]:
    """A call, a kernel of Triton's for it, and a configuration."""
    half = TensorSpec.of(torch.empty(64, 320, dtype=torch.float16, device="meta"))
    scale = TensorSpec.of(torch.empty(320, dtype=torch.float16, device="meta"), constant=True)
    call = Call("layer_norm", half, (half, scale, scale), {"eps": 1e-5})
    kernel = next(kernel for kernel in kernels() if kernel.name == "triton.layer_norm")
    return call, kernel, kernel.configs(call, GPU)[0]  # type: ignore[misc]


@pytest.mark.skipif(not load_triton(), reason="there is no Triton here")
def test_a_process_compiles_for_a_gpu_that_is_not_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it leaves in Triton's cache is code for that GPU.

    ComfyUI imports a pack under its folder's name, which the process has never heard of.
    """
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "psutil.py").write_text("raise ImportError")
    monkeypatch.chdir(elsewhere)
    call, kernel, config = norm()
    wanted = {"one": (kernel, config, call), "refused": (kernel, {"rows": 1}, call)}
    sent: list[bytes] = []
    dumps = pickle.dumps
    package = "/pack's/folder.accel"
    monkeypatch.setattr(
        compiling.pickle,
        "dumps",
        lambda share: sent.append(renamed(dumps(share, protocol=0), package)) or sent[0],
    )
    assert len(compiling.compile_apart(wanted, GPU, 1)) == 1
    (found,) = tmp_path.rglob("_layer_norm.cubin")
    assert found.stat().st_size > 1000
    assert '"arch": 90' in next(tmp_path.rglob("_layer_norm.json")).read_text()


def renamed(pickled: bytes, package: str) -> bytes:
    """As it is pickled where `accel` goes by another name."""
    assert b"caccel." in pickled
    return pickled.replace(b"caccel.", b"c" + package.encode() + b".")


# Measuring: what surrounds the clock, which needs a GPU.


def measured(monkeypatch: pytest.MonkeyPatch, call: Call) -> dict[Any, measuring.Measurement]:
    results = measuring._measure(call, GPU, CPU, lambda run: lambda: float(run(1).numel()))
    return {_named(result.kernel, result.config): result for result in results}


def test_a_candidate_that_is_wrong_or_fails_is_never_used(
    made: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def wrong(out: torch.Tensor, a: Any, b: Any) -> torch.Tensor:
        return torch.sub(a, b, out=out)

    def partial(out: torch.Tensor, a: Any, b: Any) -> torch.Tensor:
        out.fill_(float("nan"))
        return out

    def fails(out: torch.Tensor, a: Any, b: Any) -> torch.Tensor:
        raise RuntimeError("out of resources: shared memory\nand more")

    made("right")
    made("wrong", wrong)
    made("partial", partial)
    made("fails", fails)
    with caplog.at_level(logging.WARNING):
        results = measured(monkeypatch, add_call())
    assert results["right"].us == 32.0
    assert [results[name].us for name in ("wrong", "partial", "fails")] == [None] * 3
    assert results["fails"].problem == "out of resources: shared memory"
    assert sum("is not used" in r.getMessage() for r in caplog.records) == 2


def test_those_close_to_the_best_are_timed_again_by_turns(made: Any) -> None:
    """The first time of `noisy` is off; `far` is out of the question."""
    takes = {"noisy": [9.2, 9.9, 9.9, 9.9, 9.9], "steady": [9.5] * 5, "far": [20.0]}
    turns: list[str] = []
    for name in takes:
        made(name)
    made("wrong", lambda out, a, b: torch.sub(a, b, out=out))
    names = iter([*takes, "wrong"])

    def timer_of(run: Any) -> Any:
        name = next(names)

        def timer() -> float:
            run(0)
            turns.append(name)
            return takes[name].pop(0) if name in takes else 1.0

        return timer

    results = measuring._measure(add_call(), GPU, CPU, timer_of)
    assert [result.us for result in results] == [9.9, 9.5, 20.0, None]
    assert turns[:4] == ["noisy", "steady", "far", "wrong"]
    assert turns[4:] == ["steady", "noisy", "noisy", "steady"] * 2


def test_what_takes_long_is_timed_again_under_load(
    made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`hungry` is quicker by itself, and slower where the power is all used."""
    alone = {"hungry": 20.0, "frugal": 21.0, "far": 22.5}
    loaded = {"hungry": 26.0, "frugal": 24.7}
    asked: list[tuple[str, float]] = []
    for name in alone:
        made(name)
    names = iter(alone)

    class Timer:
        def __init__(self, run: Any) -> None:
            self.run, self.name = run, next(names)

        def __call__(self) -> float:
            self.run(0)
            asked.append((self.name, 0.0))
            return alone[self.name]

        def under_load(self, us: float) -> Any:
            asked.append((self.name, us))
            return lambda: loaded[self.name]

    monkeypatch.setattr(measuring, "TENSOR_CORES", ("add",))
    results = measuring._measure(add_call(), GPU, CPU, Timer)
    # The order is that under load; the unit that of what was timed by itself.
    assert [r.us for r in results] == [20.0, pytest.approx(20.0 * 24.7 / 26.0), 22.5]
    assert asked[:4] == [*((name, 0.0) for name in alone), ("hungry", measuring.WARM_US)]
    turns = ["frugal", "hungry", "hungry", "frugal"] * 2
    assert asked[4:] == [(name, measuring.TURN_US) for name in turns]

    names, asked[:] = iter(alone), []
    monkeypatch.setattr(measuring, "HEAVY_US", 20.5)
    measuring._measure(add_call(), GPU, CPU, Timer)
    assert {us for _, us in asked} == {0.0}


def test_what_a_candidate_leaves_unwritten_is_not_what_another_wrote(
    made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def idle(out: torch.Tensor, a: Any, b: Any) -> torch.Tensor:
        return out

    made("right")
    made("idle", idle)
    assert measured(monkeypatch, add_call())["idle"].problem == "wrong result"


def test_configurations_and_scratch_memory_reach_the_kernel(
    made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def run(out: torch.Tensor, a: Any, b: Any, *, config: Any, workspace: Any) -> torch.Tensor:
        seen.append((config["tile"], None if workspace is None else workspace.numel()))
        return torch.add(a, b, out=out)

    made(
        "tiled",
        run,
        configs=lambda call, hardware: [{"tile": 0}, {"tile": 64}],
        workspace=lambda call, config: 4 * config["tile"],
    )
    measured(monkeypatch, add_call())
    assert set(seen) == {(0, None), (64, 256)}


def test_each_launch_reads_other_weights_but_the_same_activations(
    made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = Call("add", spec(4, 8), (spec(4, 8), spec(4, 8, constant=True)), {})
    operands = measuring.Operands(call, GPU, CPU)
    pointers = [[tensor.data_ptr() for tensor in tensors] for tensors in operands._sets]
    assert len({a for a, _ in pointers}) == 1
    assert len({b for _, b in pointers}) == len(pointers) == measuring.LAUNCHES


def test_no_memory_is_no_error(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made("right")

    def full(*arguments: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(measuring, "_random", full)
    assert measured(monkeypatch, add_call())["right"].problem == "no memory"


def test_random_operands_have_the_strides_and_alignment_asked_for() -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.empty(6, 24, dtype=torch.float16, device="meta")
    sliced = measuring._random(TensorSpec.of(base[:, 8:16]), generator, CPU)
    assert sliced.stride() == (24, 1) and sliced.shape == (6, 8)
    odd = TensorSpec.of(torch.empty(65, dtype=torch.float16, device="meta")[1:].view(8, 8))
    assert measuring._random(odd, generator, CPU).storage_offset() == 1
    weight = TensorSpec.of(torch.empty(64, 256, device="meta"), constant=True)
    assert abs(float(measuring._random(weight, generator, CPU).std()) * 16 - 1) < 0.1
