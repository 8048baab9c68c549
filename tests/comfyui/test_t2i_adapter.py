"""T2I-Adapters on an accelerated MODEL: alone, in chains, at odd sizes and for a part of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import comfy.controlnet
import comfy.model_management as management
import pytest
import torch
from comfy.t2i_adapter.adapter import Adapter

from accel.hosts.comfyui.journal import journal
from accel.hosts.comfyui.patcher import accelerate
from accel.hosts.comfyui.pool import pool
from accel.hosts.comfyui.run import Options

from .checkpoints import CONFIGS, ensure
from .host import call, conditioning, relative_error, sample

TOLERANCE = 1e-4
KINDS = ("tiny-sd15", "tiny-sdxl")


@pytest.fixture(autouse=True)
def _own_engines() -> Iterator[None]:
    pool.cache_clear()
    yield
    management.unload_all_models()
    pool.cache_clear()


@pytest.fixture
def net(models_folder) -> Callable[[str], Any]:
    """The ControlNet of a kind."""

    def loaded(kind: str) -> Any:
        (path,) = ensure(models_folder, f"controlnet/{kind}-1.safetensors")
        return comfy.controlnet.load_controlnet(str(path))

    return loaded


def adapter(kind: str) -> Any:
    """A T2I-Adapter: for SDXL of the layout that reaches the middle block."""
    widths = CONFIGS[kind].block_out_channels
    torch.manual_seed(4)
    xl = kind == "tiny-sdxl"
    channels = [*widths, widths[-1]][:4]
    made = Adapter(channels, 2, 3 * (256 if xl else 64), ksize=1, sk=True, use_conv=False, xl=xl)
    return comfy.controlnet.T2IAdapter(
        made.requires_grad_(False), made.input_channels, 8, "nearest-exact"
    )


def conditions(kind: str, *added: Any, strength: float = 1.0, end: float = 1.0) -> tuple[Any, Any]:
    """Positive and negative after a chain of ComfyUI's own node."""
    conds = conditioning(kind, 1), conditioning(kind, 2)
    for seed, control in enumerate(added):
        generator = torch.Generator().manual_seed(seed)
        conds = call(
            "nodes",
            "ControlNetApplyAdvanced",
            positive=conds[0],
            negative=conds[1],
            control_net=control,
            image=torch.rand(1, 128, 128, 3, generator=generator),
            strength=strength,
            start_percent=0.0,
            end_percent=end,
        )[:2]
    return conds


def binds() -> int:
    (engine,) = [e for e in pool()._patchers.values() if e.structure.kind == "unet" and e.network]
    return engine.network.counters.binds


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_alone_and_in_chains_run_on_the_engine(kind, load, net):
    plain, control, added = load(kind), net(kind), adapter(kind)
    fast = accelerate(plain, Options(wait=True))
    bare = sample(plain, *conditions(kind))
    for chain in ((added,), (control, added), (added, control), (added, added)):
        expected = sample(plain, *conditions(kind, *chain, strength=0.7))
        assert relative_error(bare, expected) > 0.01
        result = sample(fast, *conditions(kind, *chain, strength=0.7))
        assert relative_error(result, expected) < TOLERANCE
        run = journal().runs[-1]
        assert (run.mode, run.engine_calls, run.reasons) == ("engine", 3, [])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(15, 17), (9, 20)], ids=str)
def test_odd_sizes_where_some_of_it_does_not_fit(kind, size, load):
    """The adapter halves downwards, the network upwards: the host leaves out what differs."""
    plain = load(kind)
    fast, conds = accelerate(plain, Options(wait=True)), conditions(kind, adapter(kind))
    expected = sample(plain, *conds, size=size, batch=2)
    assert relative_error(sample(plain, *conditions(kind), size=size, batch=2), expected) > 0.01
    assert relative_error(sample(fast, *conds, size=size, batch=2), expected) < TOLERANCE
    assert journal().runs[-1].mode == "engine"


def test_a_range_toggles_it_within_a_run(load):
    plain, added = load(), adapter(KINDS[0])
    fast = accelerate(plain, Options(wait=True))
    for _ in range(2):
        conds = conditions(KINDS[0], added, end=0.5)
        expected = sample(plain, *conds, steps=6)
        assert relative_error(sample(fast, *conds, steps=6), expected) < TOLERANCE
    assert binds() == 2  # with and without, once each
