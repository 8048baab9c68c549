"""One engine under random swaps, compared bit for bit with a fresh engine at every step."""

from __future__ import annotations

import dataclasses
import gc
import random
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support import make_lora, make_unet, residuals_for, two_levels

import accel
from accel.errors import InvalidFile, InvalidLora
from accel.runtime.pool import Pool
from accel.session import Engine, Session
from accel.sources import FileSource
from accel.tensorfile import TensorFile

STEPS = 30
SIZES = [(16, 16), (24, 16), (17, 9), (33, 12), (8, 40), (13, 13)]
LORA_SETS: list[list[tuple[int, float]]] = [[], [(0, 0.8)], [(1, -0.5)], [(0, 0.3), (1, 1.1)]]

State = Mapping[str, torch.Tensor]


@pytest.fixture(scope="module")
def checkpoints() -> list[State]:
    """Three checkpoints of one structure."""
    return [make_unet(seed, two_levels()).state_dict() for seed in (1, 2, 3)]


@pytest.fixture(scope="module")
def loras() -> list[State]:
    """Two LoRAs with overlapping targets, convolutions among them."""
    return [make_lora(seed, two_levels()) for seed in (11, 12)]


def inputs_for(size: tuple[int, int], batch: int, controlled: bool, seed: int) -> dict[str, Any]:
    """Arguments of the module's forward."""
    generator = torch.Generator().manual_seed(seed)
    config = two_levels()
    height, width = size
    inputs: dict[str, Any] = {
        "sample": torch.randn(batch, 4, height, width, generator=generator),
        "timestep": torch.randint(0, 1000, (batch,), generator=generator),
        "encoder_hidden_states": torch.randn(batch, 77, config.context_dim, generator=generator),
    }
    if controlled:
        *skips, middle = residuals_for(config, batch, height, width, generator)
        inputs["down_block_additional_residuals"] = tuple(skips)
        inputs["mid_block_additional_residual"] = middle
    return inputs


def test_random_swaps_equal_fresh_engines(
    small_plans: Path, checkpoints: list[State], loras: list[State]
) -> None:
    """Whatever came before, an output depends on the present checkpoint, LoRAs and inputs alone."""
    rng = random.Random(0)
    module = make_unet(1, two_levels())
    other = make_unet(9, two_levels())
    session = Session("cpu", "fp32", cache_dir=small_plans)
    engine = session.engine(module)
    shapes = set()
    checkpoint, lora_set = 0, 0
    for step in range(STEPS):
        match rng.choice(["checkpoint", "loras", "both", "inputs"]):
            case "checkpoint":
                checkpoint = rng.randrange(3)
                engine.load_weights(checkpoints[checkpoint])
            case "loras":
                lora_set = rng.randrange(4)
                engine.set_loras([(loras[i], s) for i, s in LORA_SETS[lora_set]])
            case "both":
                checkpoint, lora_set = rng.randrange(3), rng.randrange(4)
                engine.set_loras([(loras[i], s) for i, s in LORA_SETS[lora_set]])
                engine.load_weights(checkpoints[checkpoint])
        size, batch = rng.choice(SIZES), rng.randint(1, 4)
        controlled = rng.random() < 0.5
        shapes.add((size, batch, controlled))
        inputs = inputs_for(size, batch, controlled, seed=step)
        key = ("prompt", step) if rng.random() < 0.5 else None
        output = engine.call((), inputs, key=key)

        fresh = Session("cpu", "fp32", cache_dir=small_plans).engine(other)
        fresh.load_weights(checkpoints[checkpoint])
        fresh.set_loras([(loras[i], s) for i, s in LORA_SETS[lora_set]])
        assert torch.equal(output, fresh(**inputs)), f"step {step} differs from a fresh engine"
    report = engine.report()
    assert report["captures"] == 0, "the plan was in the cache"
    assert report["source"] == "cache"
    assert report["binds"] == len(shapes)
    assert len(report["shapes"]) == len(shapes)


ROUND = 150
"""Operations of both threads together; there are two rounds."""


class Rider:
    """One thread's engine, what it should hold, and the operations on both."""

    def __init__(self, engine: Engine, world: World, seed: int) -> None:
        self.engine, self.world, self.rng = engine, world, random.Random(seed)
        self.weights, self.loras, self.wrong = "a", 0, list[str]()
        self.engine.load_weights(world.files["a"])

    def ride(self, count: int) -> None:
        """Random operations, the output compared after each."""
        for number in range(count):
            name = self.rng.choice([name for name in dir(self) if name.startswith("do_")])
            try:
                getattr(self, name)()
                output = self.engine.call((), self.world.inputs, self.rng.choice([None, "key"]))
                if not torch.equal(output, self.world.expected(self.weights, self.loras)):
                    self.wrong.append(f"{number}: {name} gave another output")
            except Exception as error:
                self.wrong.append(f"{number}: {name} raised {error!r}")

    def do_load(self) -> None:
        self.weights = self.rng.choice("abc")
        self.engine.load_weights(self.world.files[self.weights])

    def do_load_state_dict(self) -> None:
        self.weights = self.rng.choice("abc")
        self.engine.load_weights(self.world.states[self.weights])

    def do_mix(self) -> None:
        self.weights = "mix"
        states = self.world.states
        self.engine.mix([(self.world.files["a"], 0.6), (states["b"], 0.4)])

    def do_difference(self) -> None:
        self.weights = "difference"
        files = self.world.files
        self.engine.add_difference(files["c"], self.world.states["a"], files["b"], 0.5)

    def do_loras(self) -> None:
        self.loras = self.rng.randrange(4)
        self.engine.set_loras([(self.world.loras[i], s) for i, s in LORA_SETS[self.loras]])

    def do_schedule(self) -> None:
        (first, second), (step, self.loras) = self.world.loras, self.rng.choice([(0, 1), (9, 2)])
        self.engine.schedule_loras([(first, 0.8, 0.0, 0.5), (second, -0.5, 0.5, 1.0)])
        self.engine.at_step(step, 10)

    def do_prefetch(self) -> None:
        self.engine.prefetch(self.world.files[self.rng.choice("abc")])

    def do_broken_file(self) -> None:
        with pytest.raises(InvalidFile, match="cut"):
            self.engine.load_weights(self.world.cut)

    def do_broken_lora(self) -> None:
        with pytest.raises(InvalidLora):
            self.engine.set_loras([(self.world.loras[0], 1.0), (self.world.bad_lora, 1.0)])

    def do_file_that_fails_half_way(self) -> None:
        source = FileSource(TensorFile(self.world.files["c"]), self.engine.config)
        self.fail_at_random(source)
        source.lasting, source.stamp = False, object  # type: ignore[method-assign]
        with pytest.raises(OSError, match="half-way"):
            self.engine._load("load_weights", source)

    def do_lora_that_fails_half_way(self) -> None:
        lora = self.engine.session._lora(self.world.loras[0], self.engine.config)
        name = self.rng.choice(list(lora.patches))
        broken = dataclasses.replace(lora, patches={**lora.patches, name: Broken()})
        with pytest.raises(OSError, match="half-way"), self.engine.session._lock:
            self.engine._network.set_adapters(self.engine.seat, ((broken, 0.9),))

    def do_give_memory_back(self) -> None:
        self.engine.session.pool.shrink("cpu")

    def fail_at_random(self, source: FileSource) -> None:
        """Let reading fail at some parameter."""
        read, bad = source.read_into, self.rng.choice(list(self.engine._network.weights.shapes))

        def failing(name: str, out: torch.Tensor) -> None:
            if name == bad:
                raise OSError("half-way")
            read(name, out)

        source.read_into = failing  # type: ignore[method-assign]


class Broken:
    """A patch whose delta cannot be computed."""

    target = ""

    def delta(self, shape: Any, device: Any = "cpu") -> torch.Tensor:
        raise OSError("half-way")


class World:
    """Checkpoints and LoRAs, and what a fresh engine makes of each pair of them."""

    def __init__(self, folder: Path, plans: Path) -> None:
        config, self._plans = two_levels(), plans
        self.states = {
            name: make_unet(seed, config).state_dict() for seed, name in enumerate("abc")
        }
        self.files = {name: folder / f"{name}.safetensors" for name in self.states}
        for name, state in self.states.items():
            save_file(state, self.files[name])
        self.cut = folder / "cut.safetensors"
        self.cut.write_bytes(self.files["a"].read_bytes()[:-100])
        first, second = (make_lora(seed, config) for seed in (11, 12))
        save_file(first, folder / "lora.safetensors")
        self.loras: list[Path | State] = [folder / "lora.safetensors", second]
        self.bad_lora = {**second, "lora_unet_no_such_layer.alpha": torch.tensor(1.0)}
        generator = torch.Generator().manual_seed(0)
        self.inputs = {
            "sample": torch.randn(1, 4, 8, 8, generator=generator),
            "timestep": 400,
            "encoder_hidden_states": torch.randn(1, 7, 32, generator=generator),
        }
        a, b, c = self.states.values()
        mix = {name: a[name] * 0.6 + b[name] * 0.4 for name in a}
        difference = {name: c[name] + (a[name] - b[name]) * 0.5 for name in a}
        self._merged = {**self.states, "mix": mix, "difference": difference}
        self._known: dict[tuple[str, int], torch.Tensor] = {}
        self.module = make_unet(9, config)
        for weights in self._merged:
            for loras in range(len(LORA_SETS)):
                self._known[weights, loras] = self._fresh(weights, loras)

    def expected(self, weights: str, loras: int) -> torch.Tensor:
        """The output of a fresh engine."""
        return self._known[weights, loras]

    def _fresh(self, weights: str, loras: int) -> torch.Tensor:
        nothing = Pool({"cpu": 0, "pinned": 0})
        engine = Session("cpu", "fp32", self._plans, pool=nothing).engine(self.module)
        engine.load_weights(self._merged[weights])
        engine.set_loras([(self.loras[i], s) for i, s in LORA_SETS[loras]])
        output: torch.Tensor = engine(**self.inputs)
        return output


def tensor_bytes() -> int:
    """Bytes of every tensor that Python knows of, each memory once."""
    gc.collect()
    found = {}
    for one in gc.get_objects():
        if type(one) in (torch.Tensor, torch.nn.Parameter) and one.device.type == "cpu":
            storage = one.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def test_three_hundred_operations_in_two_threads(small_plans: Path, tmp_path: Path) -> None:
    """Two engines of one network and pool: each output is a fresh engine's, and memory is flat."""
    world = World(tmp_path, small_plans)
    assert len({tuple(one.flatten().tolist()) for one in world._known.values()}) == 20
    pool = Pool({"pinned": 0}, free=lambda tier: 1 << 40)
    session = Session("cpu", "fp32", small_plans, pool=pool)
    riders = [Rider(session.engine(world.module), world, seed) for seed in (1, 2)]
    pool.set_budget("cpu", 5 * riders[0].engine._network.weights.bytes // 2)
    held = []
    for _ in range(2):
        threads = [
            threading.Thread(target=rider.ride, args=(ROUND // len(riders),)) for rider in riders
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [rider.wrong[:4] for rider in riders] == [[], []]
        for rider in riders:  # to a state that can be compared
            rider.engine.prefetch(world.files["a"]).result(timeout=60)
            rider.engine.load_weights(world.files["a"])
            rider.engine.set_loras([])
            rider.weights, rider.loras = "a", 0
        riders[0].engine._network._give_up_waiting()
        held.append(tensor_bytes())
    assert held[1] <= held[0], "memory grows"
    report = riders[0].engine.report()
    assert report["captures"] == 0 and report["binds"] == 1
    events = report["pool"]["events"]
    assert events["hits_cpu"] > 20 and events["evictions"] > 5 and events["prefetches"] > 2
    assert events["loras_brought"] > 10


def test_two_checkpoints_are_told_apart(small_plans: Path, checkpoints: list[State]) -> None:
    """The comparison above can fail: other weights give another output."""
    engine = Session("cpu", "fp32", cache_dir=small_plans).engine(make_unet(1, two_levels()))
    inputs = inputs_for((16, 16), 1, False, seed=0)
    first = engine(**inputs)
    engine.load_weights(checkpoints[1])
    assert not torch.allclose(first, engine(**inputs), rtol=1e-2)


def test_public_names() -> None:
    """The surface that users and hosts rely on."""
    assert accel.Session is Session
    assert callable(accel.structure_hash)
