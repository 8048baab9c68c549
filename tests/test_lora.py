"""LoRAs against the merged weights of peft and of lycoris-lora, in every spelling of their keys."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lora_layers import (
    ATTENTION,
    BLOCK,
    KOHYA_STYLES,
    LAYERS,
    SHAPES,
    TARGETS,
    Merged,
    Net,
    State,
    assert_merged,
    joined,
    ldm,
    lycoris_reference,
    peft_reference,
    refused,
)
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from safetensors.torch import save_file
from torch import Tensor, nn

from accel.errors import InvalidFile
from accel.lora import LowRank, fits, read_lora
from accel.models.families import FAMILIES, Family
from accel.models.unet import adapter_names, config_of_module, parameters
from accel.tensorfile import TensorFile


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        yield


def kohya_reference(
    names: list[str], rank: int = 4, alpha: float = 2.0, tucker: bool = False, **options: Any
) -> tuple[Net, Merged, dict[str, State]]:
    """lycoris-lora's merged weights, and its saved tensors per layer, without any prefix."""
    net, merged, saved = Net(names), {}, {}
    for place, name in enumerate(names):
        module = LoConModule(
            name,
            net.get_submodule(name),
            lora_dim=rank + place,
            alpha=alpha,
            use_tucker=tucker,
            **options,
        )
        for parameter in module.parameters():
            nn.init.normal_(parameter)
        merged[f"{name}.weight"] = module.get_merged_weight()[0].detach()
        saved[name] = {k: v.detach().clone() for k, v in module.custom_state_dict().items()}
    return net, merged, saved


@pytest.mark.parametrize("style", KOHYA_STYLES)
@pytest.mark.parametrize("tucker", [False, True])
def test_kohya_equals_lycoris(style: str, tucker: bool) -> None:
    net, merged, saved = kohya_reference(list(LAYERS), tucker=tucker)
    lora = read_lora(joined(saved, KOHYA_STYLES[style]), TARGETS, SHAPES)
    assert (lora.format, lora.skipped) == ("kohya", ())
    conv = lora.patches["mid_block.resnets.0.conv1.weight"]
    assert isinstance(conv, LowRank) and (conv.mid is not None) == tucker
    assert_merged(lora, net, merged)


@pytest.mark.parametrize("style", KOHYA_STYLES)
@pytest.mark.parametrize("tucker", [False, True])
def test_loha_equals_lycoris(style: str, tucker: bool) -> None:
    net, merged, saved = lycoris_reference(LohaModule, list(LAYERS), use_tucker=tucker)
    assert any("hada_t1" in parts for parts in saved.values()) == tucker
    lora = read_lora(joined(saved, KOHYA_STYLES[style]), TARGETS, SHAPES)
    assert lora.format == "LoHa"
    assert_merged(lora, net, merged)


LOKR_KINDS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "second in parts": ({}, {"lokr_w1", "lokr_w2_a"}),
    "both in parts": ({"decompose_both": True, "lora_dim": 1}, {"lokr_w1_a", "lokr_w2_a"}),
    "with cores": ({"use_tucker": True, "lora_dim": 2}, {"lokr_t2", "lokr_w2_a"}),
    "both whole": ({"full_matrix": True}, {"lokr_w1", "lokr_w2"}),
    "of a factor": ({"factor": 2}, {"lokr_w1", "lokr_w2_b"}),
    "rank-stabilised": ({"rs_lora": True, "factor": 2}, {"lokr_w2_a"}),
}


@pytest.mark.parametrize("kind", LOKR_KINDS)
@pytest.mark.parametrize("style", KOHYA_STYLES)
def test_lokr_equals_lycoris(style: str, kind: str) -> None:
    options, parts = LOKR_KINDS[kind]
    net, merged, saved = lycoris_reference(LokrModule, list(LAYERS), **options)
    assert parts <= set().union(*saved.values())
    lora = read_lora(joined(saved, KOHYA_STYLES[style]), TARGETS, SHAPES)
    assert lora.format == "LoKr"
    assert_merged(lora, net, merged)


@pytest.mark.parametrize("kind", [LohaModule, LokrModule])
def test_no_alpha_is_scale_one_in_lycoris(kind: Callable[..., Any]) -> None:
    net, merged, saved = lycoris_reference(kind, list(LAYERS), alpha=0)
    for place, parts in enumerate(saved.values()):
        del parts["alpha"]
        if place % 2:
            parts["alpha"] = torch.tensor(0.0)
    assert_merged(read_lora(joined(saved, KOHYA_STYLES["kohya"]), TARGETS, SHAPES), net, merged)


@pytest.mark.parametrize(
    ("kind", "options", "part", "shape", "words"),
    [
        (LohaModule, {}, "hada_w1_b", (5, 24), ("damaged", "hada_w1_b [5, 24]")),
        (LohaModule, {}, "hada_w2_a", (33, 2), ("maps", "24 -> 33", "24 -> 32")),
        (LohaModule, {}, "hada_w1_a", (0, 2), ("damaged",)),
        (LokrModule, {}, "lokr_w2_b", (9, 4), ("damaged", "lokr_w2_b [9, 4]")),
        (LokrModule, {}, "lokr_w1", (3, 3), ("maps", "24 -> 32")),
        (LokrModule, {}, "lokr_w1", (4,), ("damaged", "lokr_w1 [4]")),
        (LokrModule, {}, "lokr_w1", (0, 4), ("damaged",)),
    ],
)
def test_lycoris_layers_that_do_not_fit(
    kind: Callable[..., Any], options: Any, part: str, shape: tuple[int, ...], words: tuple[str]
) -> None:
    _, _, saved = lycoris_reference(kind, ATTENTION[:1], **options)
    assert part in saved[ATTENTION[0]]
    saved[ATTENTION[0]][part] = torch.ones(shape)
    refused(joined(saved, KOHYA_STYLES["kohya"]), *words)


@pytest.mark.parametrize("part", ["hada_w1_b", "hada_t2", "lokr_w2_b", "lokr_w1"])
def test_incomplete_lycoris_layers(part: str) -> None:
    kind = LohaModule if part.startswith("hada") else LokrModule
    conv = "mid_block.resnets.0.conv1"
    _, _, saved = lycoris_reference(kind, [conv], use_tucker=part == "hada_t2")
    del saved[conv][part]
    refused(joined(saved, KOHYA_STYLES["kohya"]), "incomplete")


def test_kohya_rank_stabilised() -> None:
    net, merged, saved = kohya_reference(list(LAYERS), rs_lora=True)
    assert_merged(read_lora(joined(saved, KOHYA_STYLES["kohya"]), TARGETS, SHAPES), net, merged)


@pytest.mark.parametrize("kind", [LohaModule, LokrModule])
def test_lycoris_rank_stabilised(kind: Callable[..., Any]) -> None:
    net, merged, saved = lycoris_reference(kind, list(LAYERS), rs_lora=True, lora_dim=2)
    # Of a LoKr without factors of a rank, a file does not say what rank its alpha was made with.
    known = [name for name in LAYERS if not {"lokr_w1", "lokr_w2"} <= saved[name].keys()]
    assert len(known) >= 4
    saved = {name: saved[name] for name in known}
    merged = {f"{name}.weight": merged[f"{name}.weight"] for name in known}
    assert_merged(read_lora(joined(saved, KOHYA_STYLES["kohya"]), TARGETS, SHAPES), net, merged)


def test_rank_and_alpha_of_each_layer() -> None:
    _, _, saved = kohya_reference(list(LAYERS))
    for place, parts in enumerate(saved.values()):
        parts["alpha"] = torch.tensor(float(place + 1), dtype=torch.bfloat16)
    lora = read_lora(joined(saved, KOHYA_STYLES["kohya"]), TARGETS, SHAPES)
    for place, name in enumerate(LAYERS):
        patch = lora.patches[f"{name}.weight"]
        assert isinstance(patch, LowRank)
        assert (patch.rank, patch.alpha) == (4 + place, place + 1)
        assert patch.scale == pytest.approx((place + 1) / (4 + place))
        product = saved[name]["lora_up.weight"].flatten(1) @ saved[name][
            "lora_down.weight"
        ].flatten(1)
        torch.testing.assert_close(
            patch.delta(torch.zeros(SHAPES[f"{name}.weight"])).flatten(1),
            product * (place + 1) / (4 + place),
        )


@pytest.mark.parametrize("alpha", [None, 0.0])
def test_no_alpha_is_scale_one(alpha: float | None) -> None:
    net, merged, saved = kohya_reference(list(LAYERS), alpha=0)  # lycoris: 0 is "as the rank"
    for parts in saved.values():
        del parts["alpha"]
        if alpha is not None:
            parts["alpha"] = torch.tensor(alpha)
    assert_merged(read_lora(joined(saved, KOHYA_STYLES["kohya"]), TARGETS, SHAPES), net, merged)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_factors_are_multiplied_in_float32(dtype: torch.dtype) -> None:
    names = list(LAYERS)
    net, merged, saved = Net(names), {}, {}
    for name in names:
        module = LoConModule(name, net.get_submodule(name), lora_dim=4, alpha=1.5)
        for parameter in module.parameters():
            nn.init.normal_(parameter)
            parameter.data = parameter.data.to(dtype).float()
        merged[f"{name}.weight"] = module.get_merged_weight()[0].detach()
        saved[name] = {k: v.detach().to(dtype) for k, v in module.custom_state_dict().items()}
    state = joined(saved, KOHYA_STYLES["kohya"])
    lora = read_lora(state, TARGETS, SHAPES)
    assert all(isinstance(p, LowRank) and p.up.dtype == dtype for p in lora.patches.values())
    assert_merged(lora, net, merged)


def test_linear_factors_on_1x1_conv_and_the_other_way_round() -> None:
    conv, linear = "mid_block.attentions.0.proj_in", f"{BLOCK}.attn2.to_k"
    net, merged, saved = kohya_reference([conv, linear])
    for name, parts in saved.items():
        for part in ("lora_up.weight", "lora_down.weight"):
            parts[part] = parts[part].flatten(1) if name == conv else parts[part][:, :, None, None]
    assert saved[conv]["lora_up.weight"].ndim == 2 and saved[linear]["lora_up.weight"].ndim == 4
    assert_merged(read_lora(joined(saved, KOHYA_STYLES["kohya"]), TARGETS, SHAPES), net, merged)


def test_flat_factor_of_a_3x3_conv() -> None:
    net, merged, saved = kohya_reference(["mid_block.resnets.0.conv1"])
    parts = saved["mid_block.resnets.0.conv1"]
    parts["lora_down.weight"] = parts["lora_down.weight"].flatten(1)
    assert_merged(read_lora(joined(saved, KOHYA_STYLES["kohya"]), TARGETS, SHAPES), net, merged)


def renamed(saved: State, spell: Callable[[str, str], str]) -> State:
    """peft's keys spelled anew: spell(layer, "A" or "B")."""
    state = {}
    for key, value in saved.items():
        layer, _, rest = key.removeprefix("base_model.model.").partition(".lora_")
        state[spell(layer, rest[0])] = value
    return state


def as_processor(layer: str, letter: str) -> str:
    """The keys of the first attention processors: `attn1.processor.to_out_lora.down.weight`."""
    attention, _, projection = layer.rpartition(".to_")
    return (
        f"unet.{attention}.processor.to_{projection.removesuffix('.0')}_lora.{WAY[letter]}.weight"
    )


WAY = {"A": "down", "B": "up"}
DIFFUSERS_STYLES: dict[str, Callable[[str, str], str]] = {
    "unet": lambda layer, x: f"unet.{layer}.lora_{x}.weight",
    "bare": lambda layer, x: f"{layer}.lora_{x}.weight",
    "peft": lambda layer, x: f"base_model.model.{layer}.lora_{x}.weight",
    "peft-unet": lambda layer, x: f"unet.base_model.model.{layer}.lora_{x}.weight",
    "adapter-name": lambda layer, x: f"{layer}.lora_{x}.default.weight",
    "other-adapter-name": lambda layer, x: f"base_model.model.{layer}.lora_{x}.my-style.weight",
    "old": lambda layer, x: f"unet.{layer}.lora.{WAY[x]}.weight",
    "linear-layer": lambda layer, x: f"unet.{layer}.lora_linear_layer.{WAY[x]}.weight",
    "dotted-ldm": lambda layer, x: f"diffusion_model.{ldm(layer)}.lora_{x}.weight",
    "dotted-ldm-full": lambda layer, x: f"model.diffusion_model.{ldm(layer)}.lora_{x}.weight",
    "joined": lambda layer, x: f"lora_unet_{layer.replace('.', '_')}.lora_{x}.weight",
}


@pytest.mark.parametrize("style", [*DIFFUSERS_STYLES, "processor"])
def test_diffusers_equals_peft(style: str) -> None:
    names = ATTENTION if style == "processor" else list(LAYERS)
    net, merged, saved, _ = peft_reference(names, lora_alpha=4)  # scale 1: no alpha in the keys
    state = renamed(saved, DIFFUSERS_STYLES.get(style, as_processor))
    lora = read_lora(state, TARGETS, SHAPES)
    assert lora.format == "diffusers"
    assert_merged(lora, net, merged)


@pytest.mark.parametrize(
    ("style", "alpha"),
    [
        ("unet", "unet.{}.alpha"),
        ("old", "unet.{}.lora.alpha"),
        ("old", "unet.{}.lora.down.weight.alpha"),
        ("unet", "unet.{}.lora_A.weight.alpha"),
        ("processor", "unet.{}_lora.alpha"),
        ("processor", "unet.{}_lora.down.weight.alpha"),
    ],
)
def test_alphas_of_a_diffusers_state_dict(style: str, alpha: str) -> None:
    net, merged, saved, _ = peft_reference(ATTENTION)
    state: dict[str, Tensor | float] = {**renamed(saved, DIFFUSERS_STYLES.get(style, as_processor))}
    for number, layer in enumerate(ATTENTION):
        spelled = layer
        if style == "processor":
            spelled = layer.replace(".to_", ".processor.to_").removesuffix(".0")
        # Both as tensors and as the plain numbers of `network_alphas`.
        state[alpha.format(spelled)] = torch.tensor(6) if number else 6.0
    assert_merged(read_lora(state, TARGETS, SHAPES), net, merged)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"use_rslora": True},
    {"rank_pattern": {"attn1.to_q": 2}, "alpha_pattern": {"conv1": 3, f"{BLOCK}.attn1.to_q": 9}},
    {"alpha_pattern": {r".*attn\d\.to_[qk]": 3, "to_q": 5, "proj": 8}, "use_rslora": True},
    {"alpha_pattern": {"to_q": 5, r".*attn\d\.to_[qk]": 3}},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("place", ["bare", "unet", "beside"])
def test_scale_from_peft_configuration(tmp_path: Path, options: dict[str, Any], place: str) -> None:
    net, merged, saved, config = peft_reference(list(LAYERS), **options)
    fields = {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
    metadata = {"format": "pt"}
    path = tmp_path / "adapter_model.safetensors"
    if place == "beside":
        (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    else:
        if place == "unet":
            fields = {f"unet.{k}": v for k, v in fields.items()}
            fields |= {"text_encoder.r": 4, "text_encoder.lora_alpha": 400}
        metadata["lora_adapter_metadata"] = json.dumps(fields)
    save_file(saved, path, metadata)
    assert_merged(read_lora(path, TARGETS, SHAPES), net, merged)


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ("{", "configuration cannot be read"),
        ("[]", "configuration cannot be read"),
        ('{"lora_alpha": "high"}', "lora_alpha cannot be read"),
        ('{"unet.lora_alpha": NaN}', "lora_alpha cannot be read"),
        ('{"lora_alpha": 1' + "0" * 400 + "}", "lora_alpha cannot be read"),
        ("[" * 100_000, "configuration cannot be read"),
        ('{"alpha_pattern": {"(": 3}}', "alpha_pattern cannot be read"),
        ('{"alpha_pattern": [3]}', "alpha_pattern cannot be read"),
        ('{"init_lora_weights": "pissa_niter_4"}', "started from 'pissa_niter_4'"),
    ],
)
def test_unusable_peft_configuration(tmp_path: Path, metadata: str, words: str) -> None:
    state = renamed(peft_reference(ATTENTION)[2], DIFFUSERS_STYLES["unet"])
    path = tmp_path / "a.safetensors"
    save_file(state, path, {"lora_adapter_metadata": metadata})
    refused(path, words)


def test_two_formats_in_one_file() -> None:
    net, merged, saved = kohya_reference(ATTENTION)
    state = joined(saved, KOHYA_STYLES["kohya"])
    first = KOHYA_STYLES["kohya"](ATTENTION[0])
    layer = f"unet.{ATTENTION[0]}"
    state[f"{layer}.lora_B.weight"] = state.pop(f"{first}.lora_up.weight")
    state[f"{layer}.lora_A.weight"] = state.pop(f"{first}.lora_down.weight")
    state[f"{layer}.alpha"] = state.pop(f"{first}.alpha")
    lora = read_lora(state, TARGETS, SHAPES)
    assert sorted(lora.format.split(" + ")) == ["diffusers", "kohya"]
    assert_merged(lora, net, merged)


# ---- what is left out, and what is read


TEXT_KEYS = [
    "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight",
    "lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha",
    "lora_te2_text_model_encoder_layers_0_mlp_fc1.hada_w1_a",
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight",
    "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.up.weight",
    "te.text_model.encoder.layers.0.mlp.fc1.lora_A.weight",
    "base_model.model.text_model.encoder.layers.0.mlp.fc1.lora_A.weight",
    "bundle_emb.a-word.string_to_param.*",
]


def test_text_encoders_are_listed_and_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, merged, saved = kohya_reference(ATTENTION)
    state = joined(saved, KOHYA_STYLES["kohya"])
    path = tmp_path / "my style.safetensors"
    save_file({**{key: torch.ones(4, 4) for key in TEXT_KEYS}, **state}, path)
    read: list[str] = []
    whole = TensorFile.read

    def spy(self: TensorFile, name: str) -> Tensor:
        read.append(name)
        return whole(self, name)

    monkeypatch.setattr(TensorFile, "read", spy)
    lora = read_lora(str(path), TARGETS, SHAPES)
    assert lora.name == "my style"
    assert sorted(lora.skipped) == sorted(TEXT_KEYS)
    assert sorted(read) == sorted(state)
    assert_merged(lora, net, merged)


def test_patches_hold_no_gradient() -> None:
    state = joined(kohya_reference(ATTENTION)[2], KOHYA_STYLES["kohya"])
    lora = read_lora({k: v.requires_grad_() for k, v in state.items()}, TARGETS, SHAPES)
    for name, patch in lora.patches.items():
        assert isinstance(patch, LowRank)
        assert not (patch.up.requires_grad or patch.delta(torch.zeros(SHAPES[name])).requires_grad)


# ---- refusals


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        (["oft_diag", "alpha"], "OFT of an earlier kind"),
        (["oft_r"], "OFT of an earlier kind"),
        (["glora_A.Xd"], "GLoRA of peft"),
        (["lora_A.weight", "lora_B.weight", "lora_A.bias"], "LoRA with biases of its factors"),
        (["lora_A", "lora_B", "lora_E"], "AdaLoRA"),
        (["q_layer.weight", "lambda_layer"], "T-LoRA"),
        (["lora_up.weight", "lora_down.weight", "reshape_weight"], "LoRA of a reshaped layer"),
    ],
)
@pytest.mark.parametrize("prefix", ["lora_unet_", "unet.", "base_model.model."])
def test_formats_not_supported_yet_are_named(keys: list[str], name: str, prefix: str) -> None:
    # One layer of it among good ones is enough.
    state = joined(kohya_reference(ATTENTION[1:])[2], KOHYA_STYLES["kohya"])
    layer = ATTENTION[0] if "." in prefix else ATTENTION[0].replace(".", "_")
    state |= {f"{prefix}{layer}.{key}": torch.ones(4, 4) for key in keys}
    refused(state, f": {name} is not supported yet")


def test_unknown_keys_are_not_dropped() -> None:
    state = joined(kohya_reference(ATTENTION)[2], KOHYA_STYLES["kohya"])
    refused({**state, "lora_unet_x.new_idea": torch.ones(1)}, "'lora_unet_x.new_idea'", "no known")


def test_no_lora_at_all() -> None:
    refused({"model.diffusion_model.out.2.weight": torch.ones(4)}, "has no layer", "out.2.weight")
    refused({}, "the file is empty")
    refused({key: torch.ones(4, 4) for key in TEXT_KEYS}, "all 8 keys are of text encoders")


def test_other_model_by_name() -> None:
    state = joined(kohya_reference(ATTENTION)[2], lambda name: f"lora_unet_double_blocks_{name}")
    first = f"double_blocks_{ATTENTION[0]}"
    refused(state, "0 of 3 layers match", f"{first!r} does not", "choose a LoRA")


def test_half_a_match_is_none() -> None:
    state = joined(kohya_reference(ATTENTION)[2], KOHYA_STYLES["kohya"])
    state |= {
        "lora_unet_extra.lora_up.weight": torch.ones(4, 2),
        "lora_unet_extra.lora_down.weight": torch.ones(2, 4),
    }
    refused(state, "3 of 4 layers match", "'extra' does not")


def test_other_model_by_shape() -> None:
    state = joined(kohya_reference(ATTENTION)[2], KOHYA_STYLES["kohya"])
    key = KOHYA_STYLES["kohya"](f"{BLOCK}.attn2.to_k")
    state[f"{key}.lora_down.weight"] = torch.ones(5, 77)
    refused(state, "3 of 3 layers match", "attn2_to_k", "77 -> 32 features", "40 -> 32 features")


def test_other_model_by_outputs() -> None:
    state = joined(kohya_reference(ATTENTION)[2], KOHYA_STYLES["kohya"])
    key = KOHYA_STYLES["kohya"](f"{BLOCK}.attn2.to_k")
    state[f"{key}.lora_up.weight"] = torch.ones(33, 5)
    refused(state, "attn2_to_k", "40 -> 33 features", "40 -> 32 features")


@pytest.mark.parametrize(
    ("shape", "words"),
    [((4, 24), "24 -> 40 features where"), ((4, 24, 5, 5), "24 -> 40 features (5x5) where")],
)
def test_other_kernel(shape: tuple[int, ...], words: str) -> None:
    layer = "lora_unet_mid_block_resnets_0_conv1"
    state = {
        f"{layer}.lora_up.weight": torch.ones(40, 4),
        f"{layer}.lora_down.weight": torch.ones(shape),
    }
    refused(state, words, "24 -> 40 features (3x3)")


@pytest.mark.parametrize(
    ("part", "shape"),
    [
        ("lora_up.weight", (24, 7)),
        ("lora_up.weight", (24,)),
        ("lora_up.weight", ()),
        ("lora_up.weight", (24, 4, 3, 3)),
        ("lora_down.weight", (0, 24)),
        ("lora_mid.weight", (4, 4)),
        ("lora_mid.weight", (4, 3, 1, 1)),
    ],
)
def test_factors_that_do_not_multiply(part: str, shape: tuple[int, ...]) -> None:
    layer = "lora_unet_mid_block_attentions_0_proj_in"
    state = {
        f"{layer}.lora_up.weight": torch.ones(24, 4),
        f"{layer}.lora_down.weight": torch.ones(4, 24),
    }
    read_lora(state, TARGETS, SHAPES)
    refused({**state, f"{layer}.{part}": torch.ones(shape)}, "is damaged", str(list(shape)))


def test_incomplete_layers() -> None:
    state = joined(kohya_reference(ATTENTION)[2], KOHYA_STYLES["kohya"])
    key = KOHYA_STYLES["kohya"](ATTENTION[0])
    down = state.pop(f"{key}.lora_down.weight")
    refused(state, "is incomplete", "only alpha, lora_up")
    refused({**state, f"{key}.lora_A.weight": down}, "is incomplete")
    del state[f"{key}.lora_up.weight"]
    refused(state, "is incomplete", "only alpha")


def test_a_layer_twice() -> None:
    saved = kohya_reference(ATTENTION)[2]
    state = joined(saved, KOHYA_STYLES["kohya"])
    refused({**state, **joined(saved, KOHYA_STYLES["kohya-ldm"])}, "twice")
    two = {f"{ATTENTION[0]}.lora_{x}.{n}.weight": torch.ones(1, 1) for x in "AB" for n in "ab"}
    refused(two, "twice")


def test_values_that_are_no_factors() -> None:
    state = joined(kohya_reference(ATTENTION)[2], KOHYA_STYLES["kohya"])
    key = KOHYA_STYLES["kohya"](ATTENTION[0])
    up = state[f"{key}.lora_up.weight"]
    refused({**state, f"{key}.lora_up.weight": up.to(torch.int8)}, "torch.int8")
    refused({**state, f"{key}.alpha": torch.ones(2)}, "no finite number")
    refused({**state, f"{key}.alpha": torch.tensor(float("inf"))}, "no finite number")
    refused({**state, f"{key}.alpha": "4"}, "is a str")  # type: ignore[dict-item]
    refused({**state, 4: up}, "4 is a Tensor", "under names")  # type: ignore[dict-item]
    refused({**state, f"{key}.alpha": torch.tensor(4j)}, "no finite number")
    refused({**state, f"{key}.alpha": 10**400}, "no finite number")  # type: ignore[dict-item]
    for plain in (up.to("meta"), up.to_sparse()):
        refused({**state, f"{key}.lora_up.weight": plain}, "lora_up", "without plain values")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2])
def test_values_that_are_not_finite(tmp_path: Path, dtype: torch.dtype, value: float) -> None:
    state = joined(kohya_reference(ATTENTION)[2], KOHYA_STYLES["kohya"])
    key = f"{KOHYA_STYLES['kohya'](ATTENTION[1])}.lora_down.weight"
    state[key] = state[key].to(dtype)
    read_lora(state, TARGETS, SHAPES)
    bad = state[key].float()
    bad[-1, 3] = value
    state[key] = bad.to(dtype)
    path = tmp_path / "diverged.safetensors"
    save_file(state, path)
    for source in (state, path):
        refused(source, f"{key!r} holds NaN or infinity")


def test_a_key_of_nothing_but_alphas() -> None:
    state = joined(kohya_reference(ATTENTION)[2], KOHYA_STYLES["kohya"])
    refused({**state, "lora_unet_x" + ".alpha" * 3000: torch.ones(1)}, "does not; choose")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InvalidFile):
        read_lora(tmp_path / "none.safetensors", TARGETS, SHAPES)


# ---- which model a LoRA was made for


def header(state: State) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in state.items()}


def test_fits_counts_names_and_shapes() -> None:
    _, _, saved = kohya_reference(list(LAYERS), tucker=True)
    names = header(joined(saved, KOHYA_STYLES["kohya-ldm"]))
    names |= {key: (4, 4) for key in TEXT_KEYS}
    total = len(LAYERS)
    assert fits(names, TARGETS, SHAPES) == (total, total)
    wider = {**SHAPES, f"{BLOCK}.attn2.to_k.weight": (32, 2048)}
    assert fits(names, TARGETS, wider) == (total - 1, total)
    assert fits(names, {}, {}) == (0, total)
    assert fits({}, TARGETS, SHAPES) == (0, 0)


def test_fits_leaves_other_formats_out() -> None:
    layer = KOHYA_STYLES["kohya"](ATTENTION[0])
    assert fits({f"{layer}.oft_diag": (4, 4, 4), f"{layer}.alpha": ()}, TARGETS, SHAPES) == (0, 0)


# ---- the real networks


FAMILY = {family.name: family for family in FAMILIES}

# What trainers write for SDXL and SD 1.5, and the layer that they mean.
PUBLISHED = {
    "sdxl": {
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q": (
            "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
        ),
        "lora_unet_input_blocks_8_1_proj_in": "down_blocks.2.attentions.1.proj_in",
        "lora_unet_middle_block_1_transformer_blocks_9_ff_net_0_proj": (
            "mid_block.attentions.0.transformer_blocks.9.ff.net.0.proj"
        ),
        "lora_unet_output_blocks_5_1_transformer_blocks_1_attn2_to_out_0": (
            "up_blocks.1.attentions.2.transformer_blocks.1.attn2.to_out.0"
        ),
        "lora_unet_input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
        "lora_unet_input_blocks_7_0_skip_connection": "down_blocks.2.resnets.0.conv_shortcut",
        "lora_unet_output_blocks_2_2_conv": "up_blocks.0.upsamplers.0.conv",
        "lora_unet_output_blocks_8_0_in_layers_2": "up_blocks.2.resnets.2.conv1",
        "lora_unet_middle_block_2_out_layers_3": "mid_block.resnets.1.conv2",
        "lora_unet_input_blocks_1_0_emb_layers_1": "down_blocks.0.resnets.0.time_emb_proj",
        "lora_unet_label_emb_0_2": "add_embedding.linear_2",
        "lora_unet_time_embed_0": "time_embedding.linear_1",
        "lora_unet_input_blocks_0_0": "conv_in",
        "lora_unet_out_2": "conv_out",
        "lora_unet_down_blocks_1_attentions_0_proj_out": "down_blocks.1.attentions.0.proj_out",
    },
    "sd15": {
        "lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn2_to_k": (
            "down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_k"
        ),
        "lora_unet_up_blocks_3_resnets_2_conv_shortcut": "up_blocks.3.resnets.2.conv_shortcut",
        "diffusion_model.input_blocks.1.1.proj_in": "down_blocks.0.attentions.0.proj_in",
        "lora_unet_output_blocks_11_1_proj_out": "up_blocks.3.attentions.2.proj_out",
        "lora_unet_output_blocks_5_2_conv": "up_blocks.1.upsamplers.0.conv",
    },
    "sd15-controlnet": {
        "lora_unet_down_blocks_0_attentions_0_proj_in": "down_blocks.0.attentions.0.proj_in",
        "control_model.zero_convs.3.0": "controlnet_down_blocks.3",
    },
}


def shapes_of(family: Family) -> dict[str, tuple[int, ...]]:
    return {name: parameter.shape for name, parameter in parameters(family.config).items()}


def factors(shape: tuple[int, ...], rank: int = 1) -> tuple[Tensor, Tensor]:
    """Factors for a parameter, of zeros that take no memory."""
    zero = torch.zeros(())
    return zero.expand(shape[0], rank, *(1 for _ in shape[2:])), zero.expand(rank, *shape[1:])


@pytest.mark.parametrize("family", PUBLISHED)
def test_published_spellings(family: str) -> None:
    shapes = shapes_of(FAMILY[family])
    targets = adapter_names(FAMILY[family].config)
    for spelling, layer in PUBLISHED[family].items():
        up, down = factors(shapes[f"{layer}.weight"])
        state = {f"{spelling}.lora_up.weight": up, f"{spelling}.lora_down.weight": down}
        assert list(read_lora(state, targets, shapes).patches) == [f"{layer}.weight"]


@pytest.mark.parametrize("style", ["diffusers", "ldm"])
@pytest.mark.parametrize("family", FAMILY)
def test_every_layer_of_every_family_is_its_own_target(family: str, style: str) -> None:
    config = FAMILY[family].config
    state: State = {}
    layers = {n: p for n, p in parameters(config).items() if len(p.shape) > 1}
    for name, parameter in layers.items():
        path = (name if style == "diffusers" else parameter.ldm_name).removesuffix(".weight")
        up, down = factors(parameter.shape)
        state[f"lora_unet_{path.replace('.', '_')}.lora_up.weight"] = up
        state[f"lora_unet_{path.replace('.', '_')}.lora_down.weight"] = down
    lora = read_lora(state, adapter_names(config), shapes_of(FAMILY[family]))
    assert list(lora.patches) == list(layers)


def test_the_family_of_a_lora_is_found() -> None:
    unets = [family for family in FAMILIES if family.config.kind == "unet"]
    for made_for in unets:
        names = {}
        for name, shape in shapes_of(made_for).items():
            if "attentions" in name and len(shape) > 1:
                up, down = factors(shape)
                layer = f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}"
                names[f"{layer}.lora_up.weight"] = tuple(up.shape)
                names[f"{layer}.lora_down.weight"] = tuple(down.shape)
        whole = set()
        for family in unets:
            matched, total = fits(names, adapter_names(family.config), shapes_of(family))
            if matched == total:
                whole.add(family.name.removesuffix("-inpaint"))
        assert made_for.name.removesuffix("-inpaint") in whole
        # SSD-1B is a subset of SDXL by name and shape; all others are told apart.
        assert whole <= {made_for.name.removesuffix("-inpaint"), "sdxl"}
        assert "sdxl" not in whole or made_for.name.startswith(("sdxl", "ssd1b"))


@pytest.mark.parametrize("stabilised", [False, True])
def test_file_saved_by_diffusers(tmp_path: Path, stabilised: bool) -> None:
    from diffusers import UNet2DConditionModel

    unet: Any = UNet2DConditionModel(
        block_out_channels=(16, 32),
        norm_num_groups=4,
        cross_attention_dim=24,
        attention_head_dim=2,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    config = config_of_module(unet)
    shapes = {name: parameter.shape for name, parameter in parameters(config).items()}
    own = {name: value.clone() for name, value in unet.state_dict().items()}
    layers = ["to_q", "to_out.0", "proj_in", "conv1", "time_emb_proj"]
    unet.add_adapter(
        peft.LoraConfig(
            r=4,
            lora_alpha=6,
            target_modules=layers,
            alpha_pattern={"conv1": 3},
            use_rslora=stabilised,
        )
    )
    for name, parameter in unet.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    unet.save_lora_adapter(tmp_path)
    lora = read_lora(tmp_path / "pytorch_lora_weights.safetensors", adapter_names(config), shapes)
    unet.fuse_lora()
    unet.unload_lora()
    changed = {n: v for n, v in unet.state_dict().items() if not torch.equal(v, own[n])}
    assert changed and set(lora.patches) == set(changed)
    for name, want in changed.items():
        error = (own[name] + lora.patches[name].delta(own[name]) - want).norm() / want.norm()
        assert error <= 1e-6, f"{name}: {error:.1e}"
