"""The tiny world's training: its scenes and prompts, its check, its phases from end to end."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from accel.demo import world as world_files
from accel.demo.world import CONTROLNET, SCALE, UNET
from accel.lora import read_lora
from accel.models import adapter_names, parameters
from accel.structure import canonical_names, structure_of
from training import check, draw, export, networks, paint, phases, scenes, words
from training.__main__ import main
from training.fit import Budget, Task, fit

CPU = torch.device("cpu")


def some_scenes(count: int, seed: int = 0) -> scenes.Scenes:
    torch.manual_seed(seed)
    return scenes.random_scenes(count, CPU)


# Scenes and what is said about them.


def test_captions_are_tokens_as_clips_tokenizer_makes_them(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    words.write_tokenizer(tmp_path)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(str(tmp_path), local_files_only=True)
    assert len(tokenizer) == words.vocabulary_size()
    drawn = some_scenes(200)
    texts = [*scenes.captions(drawn), ""]
    theirs = tokenizer(texts, padding="max_length", truncation=True)["input_ids"]
    ours = torch.cat([scenes.caption_tokens(drawn), scenes.empty_tokens(CPU)])
    assert torch.equal(torch.tensor(theirs), ours), "77 tokens, one for each word"
    assert len(tokenizer("Zebra, 7 é")["input_ids"]) > 5, "other words fall into letters"
    used = {word for text in texts for word in text.split()}
    assert used == set(words.WORDS) - {"and", "background"}


def test_captions_say_what_is_there() -> None:
    drawn = some_scenes(500)
    names = list(words.COLOURS)
    for index, text in enumerate(scenes.captions(drawn)):
        kind, number = int(drawn.kind[index]), int(drawn.number[index])
        colours = [names[c] for c in drawn.colour[index].tolist()]
        first = words.SHAPES[int(drawn.shape[index, 0])]
        assert text.split(" on ")[1].split()[-1] == names[int(drawn.ground[index])]
        if kind == scenes.SEVERAL:
            assert text.startswith(words.NUMBERS[number - 2])
            assert f"{colours[0]} {words.PLURALS[int(drawn.shape[index, 0])]} on" in text
        else:
            assert text.split()[0] == ("an" if text.split()[1] == "orange" else "a")
            assert f"{colours[0]} {first}" in text
        if kind == scenes.PAIR:
            assert f"{colours[1]} {words.SHAPES[int(drawn.shape[index, 1])]} on" in text
            y, x = (drawn.centre[index, 0] - drawn.centre[index, 1]).tolist()
            apart = {"left of": -x, "right of": x, "above": -y, "below": y}
            assert next(far for words_, far in apart.items() if f" {words_} " in text) > 0.3


@pytest.mark.parametrize("size", [(128, 128), (64, 96)])
def test_shapes_lie_inside_the_picture_and_apart(size: tuple[int, int]) -> None:
    drawn = some_scenes(200)
    inside = draw.distances(drawn, *size) < 0
    assert not inside[..., 0, :].any() and not inside[..., -1, :].any()
    assert not inside[..., :, 0].any() and not inside[..., :, -1].any()
    assert inside.sum(1).max() == 1
    there = inside.flatten(2).any(2).sum(1)
    assert torch.equal(there, drawn.number), "as many as are said, none is lost"


def test_edges_follow_the_shapes_and_pictures_are_antialiased() -> None:
    drawn = some_scenes(40)
    distance = draw.distances(drawn, 128, 128).abs().amin(1, keepdim=True)
    hint = draw.edges(drawn, 128, 128)
    assert hint.shape == (40, 1, 128, 128)
    assert hint[distance < 0.4].min() == 1 and hint[distance > 1.6].max() == 0
    plain = drawn[(drawn.ground_texture == 0) & (drawn.texture[:, :2] == 0).all(1)][:6]
    coarse = draw.picture(plain, 128, 128, "flat")
    fine = draw.picture(plain, 512, 512, "flat")
    assert (coarse - nn.functional.avg_pool2d(fine, 4)).abs().mean() < 2e-3
    styles = [draw.picture(drawn, 128, 128, style) for style in draw.STYLES]
    assert all(style.min() >= 0 and style.max() <= 1 for style in styles)
    assert styles[2].mean() < 0.6 * styles[0].mean() < styles[1].mean(), "night, flat, paper"


# The check.


def test_true_pictures_pass_the_check_and_others_fail() -> None:
    drawn = check.checked_scenes(64, seed=3)
    assert set(drawn.kind.tolist()) == {scenes.SINGLE, scenes.PAIR, scenes.SEVERAL}
    pictures = draw.picture(drawn, 128, 128, "flat")
    blurred = nn.functional.avg_pool2d(pictures, 3, 1, 1, count_include_pad=False)
    faint = (blurred + 0.03 * torch.randn_like(blurred)).clamp(0, 1)
    assert all(finding.right for finding in paint.findings_of(pictures, drawn))
    assert sum(finding.right for finding in paint.findings_of(faint, drawn)) >= 62
    wrong = paint.findings_of(pictures.roll(1, 0), drawn)
    assert sum(finding.right for finding in wrong) <= 3, "of another prompt"
    mirrored = paint.findings_of(pictures.flip(2, 3), drawn)
    placed = (drawn.kind != scenes.SEVERAL) & (drawn.side != scenes.MIDDLE)
    assert not any(mirrored[i].right for i in placed.nonzero()[:, 0])
    grounds = paint.findings_of(pictures[:, :, :1, :1].expand_as(pictures), drawn)
    assert all(any("too little" in why for why in finding.why) for finding in grounds)


def test_the_check_is_the_same_for_a_seed_and_disturbs_no_other_chance() -> None:
    torch.manual_seed(5)
    first = check.checked_scenes(8, seed=1)
    chance = torch.rand(1)
    torch.manual_seed(5)
    assert chance == torch.rand(1)
    assert scenes.captions(first) == scenes.captions(check.checked_scenes(8, seed=1))


def test_the_shipped_world_draws_what_its_prompts_say() -> None:
    recorded = json.loads((world_files.FOLDER / "check.json").read_text())
    assert recorded["prompts"] == 64 and recorded["right"] >= paint.NEEDED
    files = world_files.FOLDER.glob("*.safetensors")
    assert recorded["sha256"] == {path.name: paint.digest(path) for path in files}

    drawn = check.checked_scenes(8, seed=1)  # other prompts than the recorded ones
    painter = paint.Painter.of(world_files.FOLDER, CPU, steps=20, seed=1)
    unet = paint.network(world_files.CHECKPOINTS[0], CPU)
    findings = paint.findings_of(painter.paint(unet, drawn), drawn)
    wrong = [(finding.caption, finding.why) for finding in findings if not finding.right]
    assert len(wrong) <= 1, wrong


# Training.


class _HostCalls(TorchDispatchMode):
    """Operators that need the host: a CUDA graph must not hold them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [value for value in (*args, result) if isinstance(value, Tensor)]
        slow = ("_local_scalar_dense", "nonzero", "where.Scalar")  # the last copies its number
        reads = any(name in str(func) for name in slow)
        if reads or any(tensor.device.type != "meta" for tensor in tensors):
            self.found.append(str(func))
        return result


def test_a_training_step_needs_nothing_of_the_host() -> None:
    meta = torch.device("meta")
    unet, text = networks.make_unet().to(meta), networks.make_text_encoder().to(meta)
    controlnet = networks.make_controlnet().to(meta)

    predict = phases.predictor(unet, text, controlnet)

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(8, *shape, dtype=dtype, device=meta)

    half, small = torch.float16, torch.int16
    pool = phases.Pool(
        empty(4, 8, 8, dtype=half),
        empty(4, 8, 8, dtype=half),
        empty(words.LENGTH, dtype=small),
        empty(1, 64, 64, dtype=torch.uint8),
    )
    settings = phases.Settings(Path(), meta, small=4)
    loss = phases._denoising_loss("edges", pool, predict, settings)
    with _HostCalls() as calls:
        loss().backward()
        assert not calls.found
        torch.zeros(1, device=meta) + torch.zeros(())
        assert calls.found, "the watch sees what it looks for"
    assert all(p.grad is not None for p in text.parameters())


def test_fit_learns_keeps_the_average_and_stops_in_time(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer, wanted = nn.Linear(4, 4), torch.randn(4, 4)

    def loss() -> Tensor:
        x = torch.randn(32, 4)
        return (layer(x) - x @ wanted).square().mean()

    task = Task("try", dict(layer.named_parameters()), [(1, loss)], 0.05, {"batch": 32})
    fit(task, Budget(minutes=1, steps=400), tmp_path, CPU, seed=7)
    saved, curve = (
        load_file(tmp_path / "try.safetensors"),
        json.loads((tmp_path / "try.json").read_text()),
    )
    assert torch.equal(saved["weight"], layer.weight), "what is saved is what is left in place"
    assert torch.allclose(layer.weight.T, wanted, atol=0.02)
    assert curve["steps"] == 400 == len(curve["rows"]) and curve["seed"] == 7
    losses = [row[2] for row in curve["rows"]]
    assert losses[-1] < 1e-2 * losses[0]

    fit(task, Budget(minutes=0.3 / 60), tmp_path, CPU, seed=7)
    assert 0.3 <= json.loads((tmp_path / "try.json").read_text())["seconds"] < 3
    broken = Task("bad", task.parameters, [(1, lambda: loss() * math.nan)], 0.05, {})
    with pytest.raises(RuntimeError, match="bad: the loss is nan at step 1"):
        fit(broken, Budget(1, 3), tmp_path, CPU, 0)


@torch.no_grad()
def test_latents_are_normalised_without_touching_what_is_decoded() -> None:
    torch.manual_seed(0)
    vae = networks.make_vae().eval()
    vae.quant_conv.bias[:4] += torch.tensor([3.0, -1, 0, 5])
    pictures = (255 * draw.picture(some_scenes(6), 32, 32, "flat")).byte()
    inputs = pictures.float() / 127.5 - 1
    before = vae.encode(inputs).latent_dist
    decoded = vae.decode(before.mean + 0.1 * before.std).sample
    phases._normalise(vae, pictures)
    after = vae.encode(inputs).latent_dist
    latent = SCALE * after.mean
    assert latent.mean((0, 2, 3)).abs().max() < 1e-4
    assert torch.allclose(latent.std((0, 2, 3)), torch.ones(4), atol=1e-4)
    again = vae.decode(after.mean + 0.1 * after.std).sample
    assert torch.allclose(again, decoded, atol=1e-4)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world trained for one step, exported."""
    work = tmp_path_factory.mktemp("world")
    command = [*phases.PHASES, "export", "--work", str(work), "--small", "2", "--device", "cpu"]
    assert main([*command, "--steps", "2"]) == 0
    return work


def test_every_phase_leaves_weights_and_a_curve(world: Path) -> None:
    for phase in phases.PHASES:
        curve = json.loads((world / f"{phase}.json").read_text())
        assert curve["phase"] == phase and len(curve["rows"]) == curve["steps"] == 2
        assert load_file(world / f"{phase}.safetensors")
    base, sketch = (load_file(world / f"{name}.safetensors") for name in ("base", "sketch"))
    assert not torch.equal(base["unet.conv_out.weight"], sketch["unet.conv_out.weight"])
    assert not any(name.startswith("text.") for name in sketch)
    assert main(["plot", "--work", str(world)]) == 0
    from PIL import Image

    with Image.open(world / "files" / "curves.png") as picture:
        assert picture.width == 5 * 420


def test_the_files_are_what_artists_have(world: Path) -> None:
    folder = world / "files"
    assert export.total_bytes(folder) <= export.MOST_BYTES
    flat, sketch = (load_file(folder / export.FILES[name]) for name in ("base", "sketch"))
    assert flat.keys() == sketch.keys()
    assert {t.dtype for t in flat.values()} == {torch.float16}
    assert set(canonical_names(flat, UNET)) == set(parameters(UNET))
    control = structure_of(folder / export.FILES["edges"])
    assert control.kind == "controlnet"
    assert set(control.shapes) == set(parameters(CONTROLNET))
    shapes = {name: parameter.shape for name, parameter in parameters(UNET).items()}
    lora = read_lora(folder / export.FILES["night"], adapter_names(UNET), shapes)
    assert {len(shapes[name]) for name in lora.patches} == {2, 4}
    assert len(lora.patches) == len(load_file(folder / export.FILES["night"])) // 3

    trained = load_file(world / "base.safetensors")
    name = "text_model.encoder.layers.1.mlp.fc1.weight"
    ours = next(t for n, t in trained.items() if n.endswith("encoder.layers.1.mlp.fc1.weight"))
    assert torch.equal(flat[f"cond_stage_model.transformer.{name}"], ours.half())


def test_diffusers_reads_the_autoencoder_from_the_single_file(world: Path, tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    networks.make_vae().save_config(tmp_path)
    flat = load_file(world / "files" / export.FILES["base"])
    theirs = AutoencoderKL.from_single_file(
        {n: t for n, t in flat.items() if n.startswith("first_stage_model.")}, config=str(tmp_path)
    ).state_dict()
    ours = load_file(world / "vae.safetensors")
    assert theirs.keys() == ours.keys()
    for name, tensor in ours.items():
        assert torch.equal(theirs[name].half(), tensor.half()), name


def test_the_check_paints_with_every_part(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paint, "OTHER_GUIDANCE", (1.0,))
    folder = world / "files"
    assert paint.check(folder, CPU, seed=0, steps=1, prompts=2) is False
    report = json.loads((folder / "check.json").read_text())
    assert report["right by guidance"] == {"2.0": 0, "1.0": 0}
    assert report["prompts"] == 2 and report["right"] == 0 and len(report["wrong"]) == 2
    assert (folder / "samples.png").is_file()
    names = {path.name: paint.digest(path) for path in folder.glob("*.safetensors")}
    assert report["sha256"] == names and set(names) == set(export.FILES.values())


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["base"], "vae.safetensors is not there: train the phase vae first"),
        (["vae", "--minutes", "cake=1"], "no phase 'cake'"),
        (["vae", "--minutes", "vae=soon"], "'soon' is no number"),
        (["vae", "--minutes", "0"], "give more than 0"),
        (["plot"], "holds no loss curve"),
        (["check"], "tiny-flat.safetensors"),
    ],
)
def test_wrong_use_gets_one_clear_line(
    arguments: list[str], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--work", str(tmp_path), "--device", "cpu", "--small", "1"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith("training: ") and complaint in said[0]
