"""LoRAs on an engine: strengths by block, what a change writes, formats that turn the weight."""

from __future__ import annotations

import itertools
import json
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support import family_config, make_lora, make_unet, tiny_config
from torch import Tensor

from accel.errors import InvalidInput
from accel.lora import block_weights, read_lora
from accel.models import adapter_names, blocks, parameters
from accel.session import Engine, Session

State = dict[str, Tensor]

# As "LoRA Block Weight" lists them, behind BASE.
ALL_SD15 = [
    *(f"IN{number:02}" for number in range(12)),
    "M00",
    *(f"OUT{number:02}" for number in range(12)),
]
ALL_SDXL = [
    *(f"IN{number:02}" for number in range(9)),
    "M00",
    *(f"OUT{number:02}" for number in range(9)),
]
ATTENTION_SD15 = [
    *("IN01", "IN02", "IN04", "IN05", "IN07", "IN08", "M00"),
    *(f"OUT{number:02}" for number in range(3, 12)),
]
ATTENTION_SDXL = [
    *("IN04", "IN05", "IN07", "IN08", "M00"),
    *(f"OUT{number:02}" for number in range(6)),
]

# The presets that it comes with, for the 17 of SD1.5.
PRESETS = {
    "NONE": "0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0",
    "INS": "1,1,1,1,0,0,0,0,0,0,0,0,0,0,0,0,0",
    "IND": "1,0,0,0,1,1,1,0,0,0,0,0,0,0,0,0,0",
    "INALL": "1,1,1,1,1,1,1,0,0,0,0,0,0,0,0,0,0",
    "MIDD": "1,0,0,0,1,1,1,1,1,1,1,1,0,0,0,0,0",
    "OUTD": "1,0,0,0,0,0,0,0,1,1,1,1,0,0,0,0,0",
    "OUTS": "1,0,0,0,0,0,0,0,0,0,0,0,1,1,1,1,1",
    "OUTALL": "1,0,0,0,0,0,0,0,1,1,1,1,1,1,1,1,1",
}


@pytest.mark.parametrize(
    ("family", "every", "attention"),
    [
        ("sd15", ALL_SD15, ATTENTION_SD15),
        ("sd21", ALL_SD15, ATTENTION_SD15),
        ("sdxl", ALL_SDXL, ATTENTION_SDXL),
    ],
)
def test_blocks_of_a_family(family: str, every: list[str], attention: list[str]) -> None:
    known = blocks(family_config(family))
    assert (list(known.names), list(known.attention)) == (every, attention)
    for name, block in known.of.items():
        ldm = parameters(family_config(family))[name].ldm_name
        start = {"IN": "input_blocks.", "M0": "middle_block.", "OU": "output_blocks."}[block[:2]]
        number = "" if block == "M00" else f"{int(block[-2:])}."
        assert ldm.startswith(start + number)
    outside = parameters(family_config(family)).keys() - known.of.keys()
    assert {name.split(".")[0] for name in outside} <= {
        *("time_embedding", "add_embedding", "conv_norm_out", "conv_out"),
    }


def weights_of(given: Any, family: str = "sd15") -> dict[str, float]:
    known = blocks(family_config(family))
    return block_weights(given, known.names, known.attention)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_every_length_that_a_model_takes(family: str) -> None:
    known = blocks(family_config(family))
    for names in (known.names, known.attention):
        numbers = [0.25 + place for place in range(len(names))]
        wanted = dict.fromkeys(known.names, 0.0) | dict(zip(names, numbers, strict=True))
        assert weights_of([7.0, *numbers], family) == wanted
        text = ", ".join(str(number) for number in [7.0, *numbers])
        assert weights_of(text, family) == wanted


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_those_of_a1111(name: str) -> None:
    assert weights_of(name) == weights_of(PRESETS[name])
    assert weights_of(f" {name.lower()} ") == weights_of(name)


def test_presets_of_one_level_reach_every_block() -> None:
    assert set(weights_of("ALL", "sdxl").values()) == {1.0}
    assert set(weights_of("ALL0.5", "sdxl").values()) == {0.5}


@pytest.fixture(scope="module")
def lora() -> State:
    return make_lora(3)


@pytest.fixture(scope="module")
def engine(plan_cache: Path) -> Engine:
    return Session("cpu", "fp32", cache_dir=plan_cache).engine(make_unet(1))


@pytest.fixture(autouse=True)
def none_left(request: pytest.FixtureRequest) -> None:
    if "engine" in request.fixturenames:
        request.getfixturevalue("engine").set_loras([])


def values(engine: Engine) -> Tensor:
    """All that stands in the arena."""
    return engine._network.weights.storage.clone()


def touched(lora: State, some: set[str] | None = None) -> int:
    """Bytes of the float32 parameters that a LoRA changes, or of those of some blocks alone."""
    config = tiny_config()
    shapes = {name: parameter.shape for name, parameter in parameters(config).items()}
    patches = read_lora(lora, adapter_names(config), shapes).patches
    of = blocks(config).of
    names = [name for name in patches if some is None or of.get(name) in some]
    return sum(4 * torch.Size(shapes[name]).numel() for name in names)


def weighed(lora: State, weights: Mapping[str, float]) -> State:
    """The LoRA with each block's weight in its factors."""
    config = tiny_config()
    of, targets = blocks(config).of, adapter_names(config)
    changed = {}
    for key, value in lora.items():
        layer, _, part = key.removeprefix("lora_unet_").partition(".")
        weight = weights[of[targets[layer]]]
        changed[key] = value * weight if part == "lora_up.weight" else value
    return changed


def test_weights_of_blocks_are_in_the_arena(engine: Engine, lora: State, tmp_path: Path) -> None:
    path = tmp_path / "style.safetensors"
    save_file(lora, path)
    before = values(engine)
    numbers = [0.0, *(((place * 5) % 7 - 2) / 4 for place in range(25))]
    weights = dict(zip(ALL_SD15, numbers[1:], strict=True))
    assert 0.0 in weights.values() and min(weights.values()) < 0
    engine.set_loras([(weighed(lora, weights), 0.8)])
    want = engine._network.weights.storage.view(torch.float32).clone()
    engine.set_loras([(path, 0.8, numbers)])
    have = engine._network.weights.storage.view(torch.float32)
    torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-6)
    report = engine.report()["loras"]
    assert [(one["name"], one["strength"]) for one in report] == [("style", 0.8)]
    assert report[0]["blocks"] == weights
    engine.set_loras([(path, 0.8, "ALL")])
    assert engine.set_loras([(path, 0.8)]).bytes == 0, "the same change by another name"
    engine.set_loras([(path, 0.8, "NONE")])
    assert torch.equal(values(engine), before)


def test_another_weight_of_a_block_writes_that_block_alone(
    engine: Engine, lora: State, tmp_path: Path
) -> None:
    path = tmp_path / "style.safetensors"
    save_file(lora, path)
    full = engine.set_loras([(path, 0.8, [1.0] * 26)])
    assert full.bytes == touched(lora)
    numbers = [1.0] * 26
    numbers[1 + ALL_SD15.index("OUT05")] = 0.25
    numbers[1 + ALL_SD15.index("M00")] = -1.0
    change = engine.set_loras([(path, 0.8, numbers)])
    assert 0 < change.bytes == touched(lora, {"OUT05", "M00"}) < full.bytes


def test_another_strength_in_a_stack_writes_its_keys_alone(engine: Engine, tmp_path: Path) -> None:
    paths = []
    for seed, part in ((3, ""), (4, "mid_block"), (5, "up_blocks_1")):
        state = {key: value for key, value in make_lora(seed).items() if part in key}
        paths.append((tmp_path / f"{seed}.safetensors", state))
        save_file(state, paths[-1][0])
    stack = [(path, 0.5) for path, _ in paths]
    engine.set_loras(stack)
    for place, (path, state) in enumerate(paths):
        stack[place] = (path, -0.75)
        change = engine.set_loras(stack)
        assert 0 < change.bytes == touched(state)
    fresh = engine.session.engine(make_unet(1))
    fresh.set_loras(stack)
    assert torch.equal(values(engine), values(fresh))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("1,0,1", ("3 block weights", "17", "26", "IN01 … OUT11", "IN00 … OUT11")),
        ([1.0] * 12, ("12 block weights",)),
        ("1,x" + ",1" * 15, ("'x'", "OUTALL")),
        ("MYPRESET", ("'MYPRESET'",)),
        ([1.0] * 16 + [float("nan")], ("nan",)),
        ([1.0] * 16 + [10**400], ("finite numbers",)),
        ([], ("0 block weights",)),
    ],
)
def test_block_weights_that_are_none(given: Any, words: tuple[str, ...]) -> None:
    with pytest.raises(InvalidInput) as caught:
        weights_of(given)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ((1.0, "1,0,1"), "LoRA 'state dict': 3 block weights"),
        ((1.0, 0.5), "not 0.5"),
        ((float("nan"),), "not nan"),
        ((10**400,), "finite number"),
        (("1",), "not '1'"),
    ],
)
def test_a_set_that_is_refused_changes_nothing(
    engine: Engine, lora: State, entry: Any, words: str
) -> None:
    some = {key: value for key, value in lora.items() if "mid_block" in key}
    engine.set_loras([(some, 0.5)])
    before = values(engine)
    with pytest.raises(InvalidInput, match=words):
        engine.set_loras([(some, 0.7), (some, *entry)])
    assert torch.equal(values(engine), before)


# ---- formats that turn or scale the weight


def turning(seed: int) -> list[State]:
    """A DoRA, an OFT, an IA3, a full difference and a plain LoRA, all on the same two layers."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.2

    made: list[State] = [{} for _ in range(5)]
    shapes = {name: parameter.shape for name, parameter in parameters(tiny_config()).items()}
    block = "mid_block.attentions.0.transformer_blocks.0"
    for name in (f"{block}.attn1.to_q", f"{block}.ff.net.0.proj"):
        outputs, inputs = shapes[f"{name}.weight"]
        key = f"lora_unet_{name.replace('.', '_')}"
        made[0] |= {
            f"{key}.lora_up.weight": random(outputs, 2),
            f"{key}.lora_down.weight": random(2, inputs),
            f"{key}.dora_scale": 1 + random(outputs, 1),
        }
        made[1][f"{key}.oft_blocks"] = random(outputs // 8, 8, 8)
        made[2] |= {f"{key}.weight": random(inputs), f"{key}.on_input": torch.tensor(1)}
        made[3][f"{key}.diff"] = random(outputs, inputs)
        made[4] |= {
            f"{key}.lora_up.weight": random(outputs, 2),
            f"{key}.lora_down.weight": random(2, inputs),
        }
    return made


def test_changes_of_any_kind_add_up_in_any_order(engine: Engine) -> None:
    before = values(engine).view(torch.float32)
    stack = list(zip(turning(1), [0.7, -0.4, 0.5, 1.5, -1.0], strict=True))
    alone = []
    for entry in stack:
        engine.set_loras([entry])
        alone.append(values(engine).view(torch.float32) - before)
        assert float(alone[-1].norm()) > 0.1
    want = before + torch.stack(alone).sum(0)
    for order in itertools.islice(itertools.permutations(stack), 0, None, 37):
        engine.set_loras(list(order))
        have = engine._network.weights.storage.view(torch.float32)
        torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-5)
    engine.set_loras([])
    assert torch.equal(values(engine).view(torch.float32), before)


def test_the_weight_that_is_turned_is_the_rounded_one(plan_cache: Path) -> None:
    """Source -> arena's dtype -> float32 change -> one rounding."""
    module = make_unet(1)
    engine = Session("cpu", "bf16", cache_dir=plan_cache).engine(module)
    dora = turning(2)[0]
    engine.set_loras([(dora, 0.6)])
    config = tiny_config()
    shapes = {name: parameter.shape for name, parameter in parameters(config).items()}
    for name, patch in read_lora(dora, adapter_names(config), shapes).patches.items():
        base = module.get_parameter(name).to(torch.bfloat16).float()
        want = (base + patch.delta(base, 0.6)).to(torch.bfloat16)
        have = torch.empty_like(want)
        found = 0
        for _, place in engine._network.weights._places[name]:
            have.copy_(place.reshape(want.shape))
            found += 1
        assert found == 1 and torch.equal(have, want)


# ---- files that a session knows


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Four small LoRAs."""
    paths = [tmp_path / f"{seed}.safetensors" for seed in range(4)]
    for seed, path in enumerate(paths):
        save_file({k: v for k, v in make_lora(seed).items() if "mid_block" in k}, path)
    return paths


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the LoRAs that are read, from here on."""
    found: list[str] = []

    def spy(source: Any, *args: Any) -> Any:
        found.append(Path(source).stem)
        return read_lora(source, *args)

    monkeypatch.setattr("accel.session.read_lora", spy)
    return found


def test_loras_on_an_engine_are_known_however_many(
    engine: Engine, files: list[Path], reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("accel.session.RECENT_LORA_BYTES", 0)
    for strength in (0.5, 0.6):
        engine.set_loras([(path, strength) for path in files])
    assert reads == ["0", "1", "2", "3"]
    parsed = [weakref.ref(lora) for lora in engine._held]
    engine.set_loras([])
    assert [ref() for ref in parsed] == [None] * 4, "nothing keeps what is on no engine"


def test_the_last_loras_are_known_within_a_number_of_bytes(
    engine: Engine, files: list[Path], reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = [path.stat().st_size for path in files]
    monkeypatch.setattr("accel.session.RECENT_LORA_BYTES", sum(sizes) - 1)
    for place in (0, 1, 2, 0, 3, 0, 1):  # 1 has made room for 3
        engine.set_loras([(files[place], 0.5)])
    assert reads == ["0", "1", "2", "3", "1"]


def test_a_configuration_beside_a_file_is_looked_at_again(engine: Engine, tmp_path: Path) -> None:
    layer = "base_model.model.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    state = {
        f"{layer}.lora_A.weight": torch.ones(2, 64),
        f"{layer}.lora_B.weight": torch.ones(64, 2),
    }
    path, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    save_file(state, path)
    seen = []
    for alpha in (2.0, 4.25):
        config.write_text(json.dumps({"lora_alpha": alpha}))
        engine.set_loras([(path, 0.5)])
        (lora,) = engine._held
        (patch,) = lora.patches.values()
        seen.append(patch.scale)
    assert seen == [1.0, 2.125]


def test_text_encoder_keys_are_said(
    engine: Engine, lora: State, caplog: pytest.LogCaptureFixture
) -> None:
    text = {f"lora_te_text_model_encoder_layers_{n}_mlp_fc1.alpha": torch.ones(()) for n in "012"}
    with caplog.at_level("WARNING"):
        engine.set_loras([({**lora, **text}, 0.5)])
    assert "3 keys are of text encoders" in caplog.text
    assert engine.report()["loras"][0]["skipped_keys"] == 3
