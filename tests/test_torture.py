"""One engine under random swaps, compared bit for bit with a fresh engine at every step."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from support import make_lora, make_unet, residuals_for, tiny_config

import accel
from accel.session import Session

STEPS = 60
SIZES = [(16, 16), (24, 16), (17, 9), (33, 12), (8, 40), (13, 13)]
LORA_SETS: list[list[tuple[int, float]]] = [[], [(0, 0.8)], [(1, -0.5)], [(0, 0.3), (1, 1.1)]]

State = Mapping[str, torch.Tensor]


@pytest.fixture(scope="module")
def checkpoints() -> list[State]:
    """Three checkpoints of one structure."""
    return [make_unet(seed).state_dict() for seed in (1, 2, 3)]


@pytest.fixture(scope="module")
def loras() -> list[State]:
    """Two LoRAs with overlapping targets, convolutions among them."""
    return [make_lora(seed) for seed in (11, 12)]


def inputs_for(size: tuple[int, int], batch: int, controlled: bool, seed: int) -> dict[str, Any]:
    """Arguments of the module's forward."""
    generator = torch.Generator().manual_seed(seed)
    config = tiny_config()
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


def test_sixty_random_swaps_equal_fresh_engines(
    plan_cache: Path, checkpoints: list[State], loras: list[State]
) -> None:
    """Whatever came before, an output depends on the present checkpoint, LoRAs and inputs alone."""
    rng = random.Random(0)
    module = make_unet(1)
    session = Session("cpu", "fp32", cache_dir=plan_cache)
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

        fresh = Session("cpu", "fp32", cache_dir=plan_cache).engine(make_unet(9))
        fresh.load_weights(checkpoints[checkpoint])
        fresh.set_loras([(loras[i], s) for i, s in LORA_SETS[lora_set]])
        assert torch.equal(output, fresh(**inputs)), f"step {step} differs from a fresh engine"
    report = engine.report()
    assert report["captures"] == 0, "the plan was in the cache"
    assert report["source"] == "cache"
    assert report["binds"] == len(shapes)
    assert len(report["shapes"]) == len(shapes)


def test_two_checkpoints_are_told_apart(plan_cache: Path, checkpoints: list[State]) -> None:
    """The comparison above can fail: other weights give another output."""
    engine = Session("cpu", "fp32", cache_dir=plan_cache).engine(make_unet(1))
    inputs = inputs_for((16, 16), 1, False, seed=0)
    first = engine(**inputs)
    engine.load_weights(checkpoints[1])
    assert not torch.allclose(first, engine(**inputs), rtol=1e-2)


def test_public_names() -> None:
    """The surface that users and hosts rely on."""
    assert accel.Session is Session
    assert callable(accel.structure_hash)
