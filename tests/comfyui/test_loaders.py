"""The accelerated loaders give what the host's give, with the weights left in the mapped file."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from accel.hosts.comfyui.journal import journal
from accel.hosts.comfyui.loaders import load_checkpoint, load_diffusion_model
from accel.hosts.comfyui.patcher import EngineMixin
from accel.hosts.comfyui.pool import pool
from accel.hosts.comfyui.run import Options

from .checkpoints import ensure
from .host import conditioning, relative_error, sample

KIND = "tiny-sd15"


@pytest.fixture
def path(models_folder):
    return str(ensure(models_folder, f"checkpoints/{KIND}-a.safetensors")[0])


def mapped_addresses(path: str) -> list[range]:
    """Where this process has a file in memory."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_, name = line.split(maxsplit=5)
        if name == str(Path(path).resolve()):
            first, last = (int(end, 16) for end in span.split("-"))
            found.append(range(first, last))
    return found


def test_the_same_picture_and_no_copy_of_the_weights(path, load):
    prompt = conditioning(KIND, 1), conditioning(KIND, 2)
    model, clip, vae = load_checkpoint(path, Options(wait=True))
    assert isinstance(model, EngineMixin)
    assert clip is not None and vae is not None
    assert relative_error(sample(model, *prompt), sample(load(), *prompt)) < 1e-4
    assert journal().runs[-1].mode == "engine" or journal().runs[-2].mode == "engine"
    if sys.platform == "linux":
        spans = mapped_addresses(path)
        parameters = list(model.model.diffusion_model.parameters())
        inside = [any(p.data_ptr() in span for span in spans) for p in parameters]
        assert sum(inside) == len(parameters) > 500


def test_a_file_read_again_finds_its_weights_in_the_engine(path):
    prompt = conditioning(KIND, 1), conditioning(KIND, 2)
    first = sample(load_checkpoint(path, Options(wait=True))[0], *prompt)
    (network,) = [n for n in pool()._patchers.values() if n.network is not None]
    before = network.network._epoch  # counts every write and every seat that moves in
    assert torch.equal(sample(load_checkpoint(path, Options(wait=True))[0], *prompt), first)
    assert network.network._epoch == before


@pytest.fixture
def alone(tmp_path, path):
    """The denoiser alone as a file."""
    import comfy.utils
    from safetensors.torch import save_file

    state = comfy.utils.load_torch_file(path)
    prefix = "model.diffusion_model."
    network = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    file = tmp_path / "unet.safetensors"
    save_file({key: value.contiguous() for key, value in network.items()}, str(file))
    return str(file)


@pytest.mark.parametrize("dtype", ["default", "fp8_e4m3fn", "fp8_e4m3fn_fast", "fp8_e5m2"])
def test_diffusion_models_in_the_precision_asked_for(dtype, alone):
    import comfy.sd

    types = {"fp8_e4m3fn": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
    own = types.get(dtype.removesuffix("_fast"))
    given = {} if own is None else {"dtype": own}
    plain = comfy.sd.load_diffusion_model(alone, model_options=given)
    fast = load_diffusion_model(alone, dtype, Options(wait=True))
    prompt = conditioning(KIND, 1), conditioning(KIND, 2)
    expected = sample(plain, *prompt)
    assert relative_error(sample(fast, *prompt), expected) < 1e-4
    assert (journal().runs[-1].mode, journal().runs[-1].reasons) == ("engine", [])
    assert (
        next(fast.model.diffusion_model.parameters()).dtype
        == next(plain.model.diffusion_model.parameters()).dtype
    )


def test_where_the_device_multiplies_in_fp8_the_fast_choice_stays_the_hosts(alone, monkeypatch):
    import comfy.model_management

    monkeypatch.setattr(comfy.model_management, "supports_fp8_compute", lambda device=None: True)
    fast = load_diffusion_model(alone, "fp8_e4m3fn_fast", Options(wait=True))
    layers = {type(layer).__qualname__ for layer in fast.model.diffusion_model.modules()}
    assert "fp8_ops.Linear" in layers and not isinstance(fast, EngineMixin)
    kept = load_diffusion_model(alone, "fp8_e4m3fn", Options(wait=True))
    assert isinstance(kept, EngineMixin)
