"""The checkpoints are what ComfyUI takes them for, and its server runs a plain workflow."""

from __future__ import annotations

import comfy.controlnet
import comfy.lora
import comfy.sd
import comfy.utils
import pytest
import torch

from accel.models import config_of_module, unsupported_state

from .checkpoints import CONFIGS, ensure
from .host import conditioning, sample
from .workflows import Graph

_TINY = [kind for kind in CONFIGS if kind.startswith("tiny-")]


@pytest.mark.parametrize("kind", [*_TINY, "wide-sd15"])
def test_a_checkpoint_is_detected_with_every_weight(kind, load):
    patcher = load(kind)
    module = patcher.model.diffusion_model
    assert config_of_module(module) == CONFIGS[kind]
    assert unsupported_state(module) is None


@pytest.mark.parametrize("kind", ["tiny-sd15", "tiny-sdxl"])
@pytest.mark.parametrize("adapter", ["1", "loha", "lokr"])
def test_every_key_of_an_adapter_finds_its_layer(kind, adapter, load, models_folder):
    patcher = load(kind)
    (path,) = ensure(models_folder, f"loras/{kind}-{adapter}.safetensors")
    state = comfy.utils.load_torch_file(str(path))
    keys = comfy.lora.model_lora_keys_unet(patcher.model, {})
    patches = comfy.lora.load_lora(state, keys)
    added = patcher.add_patches(patches)
    layers = {key.rpartition(".")[0] for key in state if key.endswith(".alpha")}
    assert len(added) == len(layers) > 20


@pytest.mark.parametrize("kind", ["tiny-sd15", "tiny-sdxl"])
def test_the_denoiser_depends_on_all_inputs_and_stays_finite(kind, load, models_folder):
    patcher = load(kind)
    positive, negative = conditioning(kind, 1), conditioning(kind, 2)
    plain = sample(patcher, positive, negative)
    assert plain.isfinite().all() and plain.std() < 300
    other = sample(patcher, conditioning(kind, 3), negative)
    assert (plain - other).norm() / plain.norm() > 0.01
    (path,) = ensure(models_folder, f"controlnet/{kind}-1.safetensors")
    control = comfy.controlnet.load_controlnet(str(path))
    control.set_cond_hint(torch.rand(1, 3, 128, 128), 1.0, (0, 1))
    positive = [[positive[0][0], {**positive[0][1], "control": control}]]
    controlled = sample(patcher, positive, negative)
    assert controlled.isfinite().all()
    assert (plain - controlled).norm() / plain.norm() > 0.01


def test_the_t2i_adapter_reaches_the_network(load, models_folder):
    patcher = load("tiny-sd15")
    positive, negative = conditioning("tiny-sd15", 1), conditioning("tiny-sd15", 2)
    (path,) = ensure(models_folder, "controlnet/tiny-sd15-t2i.safetensors")
    adapter = comfy.controlnet.load_controlnet(str(path))
    assert type(adapter).__name__ == "T2IAdapter"
    adapter.set_cond_hint(torch.rand(1, 3, 128, 128), 1.0, (0, 1))
    adapted = [[positive[0][0], {**positive[0][1], "control": adapter}]]
    plain, other = sample(patcher, positive, negative), sample(patcher, adapted, negative)
    assert (plain - other).norm() / plain.norm() > 0.01


def test_the_server_runs_a_workflow_from_text_to_image(server):
    server.ensure("checkpoints/tiny-sdxl-a.safetensors")
    graph = Graph()
    model = graph.checkpoint("tiny-sdxl")
    positive = graph.add("CLIPTextEncode", text="a castle", clip=[model[0], 1])
    negative = graph.add("CLIPTextEncode", text="", clip=[model[0], 1])
    latent = graph.sample(model, positive, negative, graph.latent(), "plain")
    image = graph.add("VAEDecode", samples=latent, vae=[model[0], 2])
    saved = graph.add("SaveImage", images=image, filename_prefix="plain")
    result = server.run(graph.workflow)
    assert (server.folder / "output" / result.outputs[saved[0]]["images"][0]["filename"]).exists()
    record = server.record("plain")
    assert {"denoised_0", "denoised_2", "x_0", "latent"} <= set(record)
    assert all(tensor.isfinite().all() for tensor in record.values())
