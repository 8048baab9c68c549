"""The trained tiny world through a real server: from its files and a prompt to a picture."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from training import words
from training.check import nearest_colour

from .server import Server
from .workflows import Graph

WORLD = Path(__file__).parents[2] / "assets" / "tiny"
PROMPT = "a large blue ring left of a large red triangle on yellow"


@pytest.fixture(scope="module")
def world(server: Server) -> Server:
    """A server that finds the world's files where a user would put them."""
    for name, kind in (
        ("tiny-flat", "checkpoints"),
        ("tiny-sketch", "checkpoints"),
        ("tiny-night-lora", "loras"),
        ("tiny-edges-controlnet", "controlnet"),
    ):
        (server.models / kind).mkdir(parents=True, exist_ok=True)
        file = f"{name}.safetensors"
        shutil.copyfile(WORLD / file, server.models / kind / file)
    shutil.copyfile(WORLD / "edges.png", server.folder / "input" / "edges.png")
    return server


def picture(
    server,
    fast: bool,
    checkpoint: str,
    size: tuple[int, int] = (128, 128),
    lora: str | None = None,
    controlnet: str | None = None,
) -> torch.Tensor:
    """What SaveImage writes, 3 x height x width in 0..1."""
    graph = Graph()
    loaded = graph.add("CheckpointLoaderSimple", ckpt_name=f"{checkpoint}.safetensors")
    model, clip, vae = ([loaded[0], output] for output in range(3))
    if lora:
        model = graph.add("LoraLoaderModelOnly", model=model, lora_name=lora, strength_model=1.0)
    if fast:
        model = graph.add("SwitchyardAccelerate", model=model, first_run="wait",
                          compare_once=False)  # fmt: skip
    positive = graph.add("CLIPTextEncode", text=PROMPT, clip=clip)
    negative = graph.add("CLIPTextEncode", text="", clip=clip)
    if controlnet:
        net = graph.add("ControlNetLoader", control_net_name=controlnet)
        if fast:
            net = graph.add("SwitchyardAccelerateControlNet", control_net=net, first_run="wait")
        hint = graph.add("LoadImage", image="edges.png")
        applied = graph.add("ControlNetApplyAdvanced", positive=positive, negative=negative,
                            control_net=net, image=hint, strength=1.0, start_percent=0.0,
                            end_percent=1.0)  # fmt: skip
        positive, negative = applied, [applied[0], 1]
    latent = graph.add("KSampler", model=model, seed=3, steps=20, cfg=2.0, sampler_name="euler",
                       scheduler="normal", positive=positive, negative=negative, denoise=1.0,
                       latent_image=graph.latent(*size))  # fmt: skip
    decoded = graph.add("VAEDecode", samples=latent, vae=vae)
    saved = graph.add("SaveImage", images=decoded, filename_prefix="tiny")
    (image,) = server.run(graph.workflow).outputs[saved[0]]["images"]
    with Image.open(server.folder / "output" / image["subfolder"] / image["filename"]) as file:
        values = np.asarray(file.convert("RGB"), dtype=np.float32)
    return torch.from_numpy(values / 255).permute(2, 0, 1)


@pytest.mark.parametrize(
    "changes",
    [
        {"checkpoint": "tiny-flat"},
        {"checkpoint": "tiny-sketch", "size": (136, 104)},
        {
            "checkpoint": "tiny-flat",
            "lora": "tiny-night-lora.safetensors",
            "controlnet": "tiny-edges-controlnet.safetensors",
        },
    ],
    ids=["flat", "sketch at another size", "LoRA and ControlNet"],
)
def test_the_accelerated_picture_is_the_hosts(world, changes):
    plain = picture(world, False, **changes)
    fast = picture(world, True, **changes)
    run = world.get("/switchyard/state")["last_run"]
    assert (run["mode"], run["host_calls"], run["reasons"]) == ("engine", 0, [])
    width, height = changes.get("size", (128, 128))
    assert plain.shape == fast.shape == (3, height, width)
    noise = float((plain - fast).square().mean())
    assert noise <= 1e-5, "50 dB"


def test_the_picture_is_what_the_prompt_says(world):
    seen = nearest_colour(picture(world, True, "tiny-flat"))
    names = list(words.COLOURS)
    blue, red, yellow = (seen == names.index(name) for name in ("blue", "red", "yellow"))
    assert yellow[[0, 0, -1, -1], [0, -1, 0, -1]].all(), "the ground reaches the corners"
    assert blue.sum() > 300 and red.sum() > 300
    assert blue.nonzero()[:, 1].float().mean() + 20 < red.nonzero()[:, 1].float().mean()
