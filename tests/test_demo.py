"""The demo: its world and files, and that engine and plain PyTorch paint the same pictures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sparse import ldm_shapes, sparse_file

from accel.cli import main
from accel.demo import Options, run_demo, world
from accel.errors import InvalidInput, StructureMismatch, StructureUnknown
from accel.lora import read_lora
from accel.models import FAMILIES, adapter_names, parameters
from accel.structure import canonical_names, structure_of

ROOT = Path(__file__).parents[1]


# The world.


def test_its_files_are_what_artists_have() -> None:
    first, second = (load_file(path) for path in world.CHECKPOINTS)
    assert first.keys() == second.keys()
    assert any(not torch.equal(first[name], second[name]) for name in first)
    # The UNet among other networks, in the names of single files.
    names = canonical_names(first, world.UNET)
    assert set(names) == set(parameters(world.UNET))
    assert all(name.startswith("model.diffusion_model.") for name in names.values())
    assert len(first) > len(names)
    control = structure_of(world.CONTROLNET_FILE)
    assert control.kind == "controlnet"
    assert set(control.shapes) == set(parameters(world.CONTROLNET))
    shapes = {name: parameter.shape for name, parameter in parameters(world.UNET).items()}
    lora = read_lora(world.LORA, adapter_names(world.UNET), shapes)
    assert {len(shapes[name]) for name in lora.patches} == {2, 4}, "linear layers, convolutions"
    files = [*world.CHECKPOINTS, world.LORA, world.CONTROLNET_FILE]
    assert sum(path.stat().st_size for path in files) <= 16_000_000
    assert {tensor.dtype for path in files for tensor in load_file(path).values()} == {
        torch.float16
    }


def test_the_drawing_follows_the_size() -> None:
    small, wide = world.edges(128, 128), world.edges(104, 136)
    assert small.shape == (1, 3, 128, 128) and wide.shape == (1, 3, 104, 136)
    assert small.min() == 0 and small.max() == 1
    assert abs(float(small.mean() - wide.mean())) < 0.01


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "'an empty prompt'"),
        ("a cat on red", "'cat'"),
        ("a Red Disc", "'disc'"),
        ("a red background", "'background'"),
    ],
)
def test_words_it_was_not_taught_are_refused_with_those_it_was(text: str, complaint: str) -> None:
    with pytest.raises(InvalidInput, match=f"does not know {complaint}.*, triangle, triangles"):
        world.check_prompt(text)
    world.check_prompt("Three striped orange crosses on white")


# The whole demo.


def test_one_engine_paints_what_plain_pytorch_paints(tmp_path: Path) -> None:
    fractions: list[float] = []
    result = run_demo(
        Options(out=tmp_path, device="cpu"),
        lambda fraction, text: fractions.append(fraction),
    )
    titles = [row.title for row in result.rows]
    assert titles == [
        "checkpoint tiny-flat",
        "checkpoint tiny-sketch",
        "tiny-flat + LoRA",
        "tiny-flat + ControlNet",
        "another size",
        "back to tiny-flat",
    ]
    # One forward is held to 1e-5 elsewhere; the first steps of sampling amplify it some ten times.
    assert all(row.error <= 5e-5 for row in result.rows)
    assert all(row.psnr is None or row.psnr >= 80 for row in result.rows)
    assert [row.captures for row in result.rows] == [1, 1, 1, 2, 2, 2]
    assert [row.same_as for row in result.rows] == [None, None, None, None, None, 1]
    assert result.rows[4].size == "136x104", "odd latents"
    assert any("encoded by the text encoder in tiny-flat" in line for line in result.remarks)
    assert any("decoded by the VAE in tiny-flat" in line for line in result.remarks)
    assert fractions == sorted(fractions) and fractions[-1] == pytest.approx(1)

    from PIL import Image

    with Image.open(result.picture) as picture:
        assert picture.width > 6 * 256 and picture.height > 2 * 256
    assert json.loads(json.dumps(result.to_json()))["rows"][5]["same_as"] == 1

    # The plans are in the cache: a second process builds nothing.
    command = [sys.executable, "-m", "accel", "demo", "--out", str(tmp_path), "--steps", "1"]
    done = subprocess.run(
        [
            *command,
            "--device",
            "cpu",
            "--json",
            "--size",
            "64x72",
            "--prompt",
            "a white ring on green",
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    said = json.loads(done.stdout)
    assert said["engine"]["captures"] == 0 and said["engine"]["source"] == "cache"
    assert {row["size"] for row in said["rows"]} == {"64x72", "136x104"}


@pytest.mark.gpu
def test_on_a_gpu_the_pictures_are_those_of_plain_pytorch_in_half_precision(tmp_path: Path) -> None:
    result = run_demo(Options(out=tmp_path, device="cuda"))
    far = {row.title: row.psnr for row in result.rows if row.psnr is not None and row.psnr < 40}
    assert not far, f"dB: {far}"
    assert result.rows[-1].same_as == 1


# An artist's own files.


def test_files_that_do_not_belong_together_are_refused_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = {
        name: sparse_file(
            tmp_path / f"{name}.safetensors", ldm_shapes(name, "model.diffusion_model.")
        )
        for name in ("sd15", "sdxl", "sd21", "sdxl-controlnet")
    }
    with pytest.raises(StructureMismatch, match=r"sdxl\.safetensors: .*holds SDXL.*needed is Sta"):
        run_demo(Options(tmp_path, (paths["sd15"], paths["sdxl"])))
    with pytest.raises(StructureUnknown, match="sd21, which the demo cannot paint with"):
        run_demo(Options(tmp_path, (paths["sd21"],)))
    with pytest.raises(StructureUnknown, match="holds no UNet"):
        run_demo(Options(tmp_path, (paths["sdxl-controlnet"],)))
    with pytest.raises(StructureMismatch, match="give a ControlNet made for sd15"):
        run_demo(Options(tmp_path, (paths["sd15"],), controlnet=paths["sdxl-controlnet"]))

    out = ["demo", "--out", str(tmp_path), "--checkpoint", str(paths["sd15"])]
    assert main([*out, "--lora", str(world.LORA)]) == 2
    assert main([*out, "--checkpoint", str(paths["sdxl"])]) == 2
    assert main([*out[:3], "--lora", "a.safetensors"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3 and all(line.startswith("accel: ") for line in errors)
    assert "layers match this model by name" in errors[0]
    assert "holds SDXL" in errors[1]
    assert "need the --checkpoint" in errors[2]


def test_without_encoders_the_prompt_is_not_claimed_to_be_used(tmp_path: Path) -> None:
    from accel.demo import prompts
    from accel.tensorfile import TensorFile

    shapes = ldm_shapes("sdxl", "model.diffusion_model.")
    file = TensorFile(sparse_file(tmp_path / "sdxl.safetensors", shapes))
    config = next(family.config for family in FAMILIES if family.name == "sdxl")
    made, note = prompts.conditioning(file, config, "a cat", (96, 128), None, seed=3)
    assert "NOT used" in note and "holds no text encoder" in note
    assert made.context.shape == (2, 77, 2048) and made.added is not None
    assert made.added["time_ids"].tolist()[0] == [768, 1024, 0, 0, 768, 1024]
    again, _ = prompts.conditioning(file, config, "a dog", (96, 128), None, seed=3)
    assert torch.equal(made.context, again.context)


def test_text_encoders_are_read_in_both_namings() -> None:
    transformers = pytest.importorskip("transformers")
    from accel.demo import prompts

    config = transformers.CLIPTextConfig(
        vocab_size=49408,
        hidden_size=32,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        hidden_act="gelu",
    )
    torch.manual_seed(0)
    theirs = transformers.CLIPTextModel(config).eval()
    named = {
        name.removeprefix("text_model."): tensor for name, tensor in theirs.state_dict().items()
    }
    texts = [[49406, 320, 49407], [49406, 320, 736, 2368, 49407]]
    padded = torch.tensor([ids + [0] * (77 - len(ids)) for ids in texts])
    with torch.no_grad():
        expected = theirs(padded, output_hidden_states=True)

    from_open_clip = prompts._from_open_clip(_to_open_clip(named))
    from_open_clip.pop("text_projection")
    for tensors in (named, from_open_clip):
        encoder = prompts._encoder(tensors, heads=4, act="gelu")
        last, before_last = prompts._states(encoder, texts, padding=0)
        assert torch.equal(last, expected.last_hidden_state)
        assert torch.equal(before_last, expected.hidden_states[-2])


def _to_open_clip(named: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found = {
        "token_embedding.weight": named["embeddings.token_embedding.weight"],
        "positional_embedding": named["embeddings.position_embedding.weight"],
        "ln_final.weight": named["final_layer_norm.weight"],
        "ln_final.bias": named["final_layer_norm.bias"],
        "text_projection": torch.eye(32),
    }
    parts = {"self_attn.out_proj": "attn.out_proj", "layer_norm1": "ln_1", "layer_norm2": "ln_2"}
    parts |= {"mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    for layer in range(3):
        ours, block = f"encoder.layers.{layer}", f"transformer.resblocks.{layer}"
        for kind in ("weight", "bias"):
            for name, other in parts.items():
                found[f"{block}.{other}.{kind}"] = named[f"{ours}.{name}.{kind}"]
            qkv = [named[f"{ours}.self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
            found[f"{block}.attn.in_proj_{kind}"] = torch.cat(qkv)
    return found


@pytest.mark.parametrize("sdxl", [False, True])
def test_without_a_vae_there_is_a_preview(tmp_path: Path, sdxl: bool) -> None:
    from accel.demo.latents import Decoder
    from accel.tensorfile import TensorFile

    path = tmp_path / "unet.safetensors"
    save_file({"x": torch.zeros(1)}, path)
    decoder = Decoder(TensorFile(path), sdxl, torch.device("cpu"))
    assert "holds no VAE" in decoder.about
    picture = decoder(torch.randn(1, 4, 6, 9))
    assert picture.shape == (3, 48, 72) and picture.min() >= 0 and picture.max() <= 1
