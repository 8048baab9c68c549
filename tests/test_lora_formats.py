"""LoRA formats beyond a product of factors, against the merged weights of peft and lycoris."""

from __future__ import annotations

import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from lora_layers import (
    ATTENTION,
    BLOCK,
    KOHYA_STYLES,
    LAYERS,
    NORMS,
    SHAPES,
    TARGETS,
    Merged,
    Net,
    State,
    assert_merged,
    configured,
    joined,
    lycoris_reference,
    peft_reference,
    refused,
)
from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.full import FullModule
from lycoris.modules.glora import GLoRAModule
from lycoris.modules.ia3 import IA3Module
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from lycoris.modules.norms import NormModule
from safetensors.torch import save_file
from torch import Tensor, nn

from accel.errors import InvalidLora
from accel.lora import LowRank, fits, is_lora, read_lora
from accel.models import FAMILIES, parameters

KOHYA = KOHYA_STYLES["kohya"]
CONV = "mid_block.resnets.0.conv1"
LINEAR = f"{BLOCK}.attn1.to_q"


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(11)
        yield


def trained(
    kind: Callable[..., Any],
    names: list[str],
    multiplier: float = 1.0,
    scatter: float = 0.3,
    **options: Any,
) -> tuple[Net, Merged, dict[str, State]]:
    """lycoris-lora's merged weights of a module that it merges right, and what it saves."""
    net, merged, saved = Net(names), {}, {}
    for name in names:
        module = kind(name, net.get_submodule(name), **options)
        for parameter in module.parameters():
            parameter.data.add_(torch.randn_like(parameter) * scatter)
        merged[f"{name}.weight"] = module.get_merged_weight(multiplier)[0].detach()
        saved[name] = state_of(module)
    return net, merged, saved


def state_of(module: Any) -> State:
    """What lycoris saves of a module."""
    parts = module.custom_state_dict() or module.state_dict()
    return {k: v.detach().clone() for k, v in parts.items() if k in module.weight_list}


def assert_every_style(
    form: str, net: Net, merged: Merged, saved: dict[str, State], strength: float = 1.0
) -> None:
    """All layers in one style of keys, and in each other style a third of them."""
    for place, spell in enumerate(KOHYA_STYLES.values()):
        names = list(saved)[place % 3 :: 3] if place else list(saved)
        state = joined({name: saved[name] for name in names}, spell)
        lora = read_lora(state, TARGETS, SHAPES)
        assert lora.format == form
        wanted = {f"{name}.weight": merged[f"{name}.weight"] for name in names}
        assert_merged(lora, net, wanted, strength=strength)


# ---- DoRA


def decomposed(
    kind: Callable[..., Any], on_outputs: bool, **options: Any
) -> tuple[Net, Merged, dict[str, State]]:
    """What lycoris trains with: its magnitudes over the weight and the change together."""
    net, merged, saved = Net(list(LAYERS)), {}, {}
    for name in LAYERS:
        layer = net.get_submodule(name)
        module = kind(
            name, layer, lora_dim=3, alpha=2, weight_decompose=True, wd_on_out=on_outputs, **options
        )
        for part, parameter in module.named_parameters():
            scatter = torch.randn_like(parameter)
            parameter.data.add_(scatter * parameter.data if part == "dora_scale" else scatter)
        if kind is LoConModule:
            change = module.make_weight() * module.scale
        else:
            change = module.get_weight(layer.weight.shape) * module.scalar
        merged[f"{name}.weight"] = module.apply_weight_decompose(layer.weight + change).detach()
        saved[name] = state_of(module)
        assert saved[name]["dora_scale"].shape[0 if on_outputs else 1] > 1
    return net, merged, saved


@pytest.mark.parametrize("on_outputs", [True, False])
@pytest.mark.parametrize(
    ("kind", "form"), [(LoConModule, "kohya"), (LohaModule, "LoHa"), (LokrModule, "LoKr")]
)
def test_dora_equals_lycoris(kind: Callable[..., Any], form: str, on_outputs: bool) -> None:
    net, merged, saved = decomposed(kind, on_outputs)
    assert_every_style(f"{form} + DoRA", net, merged, saved)


PEFT_STYLES: dict[str, Callable[[str], str]] = {
    "peft": lambda key: key,
    "unet": lambda key: key.replace("base_model.model.", "unet."),
    "adapter-name": lambda key: re.sub(r"(\.weight)?$", r".my-style\1", key, count=1),
}


@pytest.mark.parametrize("style", PEFT_STYLES)
def test_dora_equals_peft(style: str) -> None:
    net, merged, saved, _ = peft_reference(list(LAYERS), use_dora=True, lora_alpha=4)
    lora = read_lora({PEFT_STYLES[style](k): v for k, v in saved.items()}, TARGETS, SHAPES)
    assert lora.format == "diffusers + DoRA"
    assert_merged(lora, net, merged)


def test_dora_scaled_by_rank_as_peft_does(tmp_path: Path) -> None:
    options = {"use_dora": True, "use_rslora": True, "alpha_pattern": {"conv1": 3}}
    net, merged, saved, config = peft_reference(list(LAYERS), **options)
    assert_merged(read_lora(configured(tmp_path, saved, config), TARGETS, SHAPES), net, merged)


def test_strength_of_dora_weighs_all_of_it() -> None:
    net, merged, saved = decomposed(LoConModule, True)
    own = {name: value.detach() for name, value in net.named_parameters()}
    halves = {name: own[name] + (want - own[name]) * -0.5 for name, want in merged.items()}
    lora = read_lora(joined(saved, KOHYA), TARGETS, SHAPES)
    assert_merged(lora, net, halves, strength=-0.5)
    for name, patch in lora.patches.items():
        assert patch.delta(own[name], 0.0).abs().max() == 0


def test_dora_of_a_row_of_zeros() -> None:
    state = {
        f"{LINEAR}.lora_A.weight": torch.zeros(2, 24),
        f"{LINEAR}.lora_B.weight": torch.zeros(32, 2),
        f"{LINEAR}.lora_magnitude_vector": torch.ones(32),
    }
    patch = read_lora(state, TARGETS, SHAPES).patches[f"{LINEAR}.weight"]
    assert patch.delta(torch.zeros(32, 24)).abs().max() == 0


@pytest.mark.parametrize("shape", [(24,), (31, 1), (1, 25), (32, 24), (2, 16), ()])
def test_magnitudes_that_do_not_fit(shape: tuple[int, ...]) -> None:
    _, _, saved = trained(LoConModule, [LINEAR], lora_dim=2)
    saved[LINEAR]["dora_scale"] = torch.ones(shape)
    refused(joined(saved, KOHYA), "attn1_to_q", f"magnitudes {list(shape)}", "[32, 24]")


def test_magnitudes_alone_or_on_other_formats() -> None:
    refused({f"{KOHYA(LINEAR)}.dora_scale": torch.ones(32, 1)}, "incomplete", "only dora_scale")
    _, _, saved = trained(DiagOFTModule, [LINEAR], lora_dim=4)
    saved[LINEAR]["dora_scale"] = torch.ones(32, 1)
    refused(joined(saved, KOHYA), "OFT with magnitudes", "not supported")


# ---- OFT and BOFT


@pytest.mark.parametrize("options", [{}, {"rescaled": True}, {"constraint": 0.1}])
@pytest.mark.parametrize("kind", [DiagOFTModule, ButterflyOFTModule])
def test_rotations_equal_lycoris(kind: Callable[..., Any], options: Any) -> None:
    net, merged, saved = trained(kind, list(LAYERS), lora_dim=12, **options)
    assert_every_style("OFT" if kind is DiagOFTModule else "BOFT", net, merged, saved)


@pytest.mark.parametrize("multiplier", [0.5, -0.7])
@pytest.mark.parametrize("kind", [DiagOFTModule, ButterflyOFTModule])
def test_strength_of_rotations_equals_lycoris(kind: Callable[..., Any], multiplier: float) -> None:
    net, merged, saved = trained(kind, list(LAYERS), multiplier, lora_dim=12)
    lora = read_lora(joined(saved, KOHYA), TARGETS, SHAPES)
    assert_merged(lora, net, merged, strength=multiplier)


@pytest.mark.parametrize("kind", [DiagOFTModule, ButterflyOFTModule])
def test_rotations_at_strength_zero_are_off(kind: Callable[..., Any]) -> None:
    net, _, saved = trained(kind, list(LAYERS), lora_dim=12, rescaled=True)
    for name, patch in read_lora(joined(saved, KOHYA), TARGETS, SHAPES).patches.items():
        assert patch.delta(net.get_parameter(name).detach(), 0.0).abs().max() <= 1e-6


def test_kohyas_own_oft() -> None:
    """sd-scripts: R of n blocks on the diagonal, R.T @ W, the norm held below alpha * outputs."""
    net, merged, state = Net(list(LAYERS)), {}, {}
    for name in LAYERS:
        weight = net.get_submodule(name).weight.detach()
        blocks = torch.randn(4, weight.shape[0] // 4, weight.shape[0] // 4)
        skew = (blocks - blocks.transpose(1, 2)).double()
        skew *= min(1.0, 0.02 * weight.shape[0] / float(skew.norm()))
        eye = torch.eye(skew.shape[-1], dtype=torch.float64)
        turned = torch.block_diag(*((eye + skew) @ (eye - skew).inverse()))
        merged[f"{name}.weight"] = torch.einsum("o...,op->p...", weight.double(), turned).float()
        key = f"oft_unet_{name.replace('.', '_')}"
        state |= {f"{key}.oft_blocks": blocks, f"{key}.alpha": torch.tensor(0.02)}
    assert_merged(read_lora(state, TARGETS, SHAPES), net, merged)


OFT_OPTIONS: list[dict[str, Any]] = [
    {},
    *({"num_cayley_neumann_terms": terms} for terms in (1, 2, 3, 4)),
    {"use_cayley_neumann": False},
    {"use_cayley_neumann": False, "coft": True, "eps": 2.0},
    {"block_share": True},
]


@pytest.mark.parametrize("options", OFT_OPTIONS)
def test_oft_equals_peft(tmp_path: Path, options: dict[str, Any]) -> None:
    net, merged, saved, config = peft_reference(
        list(LAYERS), peft.OFTConfig, oft_block_size=8, **options
    )
    if options.get("num_cayley_neumann_terms") == 1:
        assert not merged, "one term is the identity"
        lora = read_lora(configured(tmp_path, saved, config), TARGETS, SHAPES)
        own = net.get_parameter(f"{LINEAR}.weight").detach()
        assert lora.patches[f"{LINEAR}.weight"].delta(own).abs().max() == 0
        return
    for spell in PEFT_STYLES.values():
        state = {spell(key): value for key, value in saved.items()}
        lora = read_lora(configured(tmp_path, state, config, beside=bool(options)), TARGETS, SHAPES)
        assert lora.format == "OFT"
        assert_merged(lora, net, merged)


def test_oft_of_peft_needs_its_configuration() -> None:
    saved = peft_reference([LINEAR], peft.OFTConfig, oft_block_size=8)[2]
    refused(saved, "adapter_config.json")


@pytest.mark.parametrize("terms", [0, -1, 10**9, "5", None])
def test_oft_of_a_series_that_makes_no_sense(tmp_path: Path, terms: Any) -> None:
    _, _, saved, config = peft_reference([LINEAR], peft.OFTConfig, oft_block_size=8)
    config.num_cayley_neumann_terms = terms
    refused(configured(tmp_path, saved, config), "num_cayley_neumann_terms cannot be read")


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("style", PEFT_STYLES)
def test_boft_equals_peft(stages: int, style: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # peft has several stages only with its CUDA extension: this is what the extension computes.
    def forward(blocks: Tensor) -> list[Tensor]:
        return [torch.stack([torch.block_diag(*stage) for stage in blocks])]

    fake = SimpleNamespace(forward=forward)
    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: fake)
    names = [name for name in LAYERS if SHAPES[f"{name}.weight"][1] % 16 == 0]
    assert len(names) >= 3 and any(len(SHAPES[f"{name}.weight"]) == 4 for name in names)
    net, merged, saved, _ = peft_reference(
        names, peft.BOFTConfig, boft_block_size=4, boft_n_butterfly_factor=stages
    )
    assert all(v.shape[0] == stages for k, v in saved.items() if "boft_R" in k)
    lora = read_lora({PEFT_STYLES[style](k): v for k, v in saved.items()}, TARGETS, SHAPES)
    assert lora.format == "BOFT"
    assert_merged(lora, net, merged)


@pytest.mark.parametrize(
    ("kind", "part", "shape", "words"),
    [
        (DiagOFTModule, "oft_blocks", (4, 8, 9), ("damaged", "oft_blocks [4, 8, 9]")),
        (DiagOFTModule, "oft_blocks", (4, 9, 9), ("turns 36 outputs", "has 32")),
        (DiagOFTModule, "rescale", (31, 1), ("damaged", "rescale [31, 1] for 32")),
        (ButterflyOFTModule, "oft_blocks", (3, 6, 5, 5), ("turns 30 outputs",)),
        (ButterflyOFTModule, "oft_blocks", (9, 4, 8, 8), ("damaged", "9 stages do not halve 4")),
        (ButterflyOFTModule, "oft_blocks", (8, 8), ("incomplete", "oft_blocks")),
    ],
)
def test_rotations_that_do_not_fit(
    kind: Callable[..., Any], part: str, shape: tuple[int, ...], words: tuple[str, ...]
) -> None:
    _, _, saved = trained(kind, [LINEAR], lora_dim=8, rescaled=True)
    assert part in saved[LINEAR]
    saved[LINEAR][part] = torch.ones(shape)
    refused(joined(saved, KOHYA), "attn1_to_q", *words)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"oft_R.weight": (3, 27)}, ("damaged", "oft_R [3, 27] are no triangles")),
        ({"oft_R.weight": (2, 28)}, ("turns 16 inputs", "has 24")),
        ({"boft_R": (1, 4, 8, 8), "boft_s": (32, 1)}, ("turns 32 inputs",)),
        ({"boft_R": (1, 3, 8, 8), "boft_s": (31, 1)}, ("scales 31 outputs",)),
        ({"boft_R": (1, 3, 8, 7), "boft_s": (32, 1)}, ("damaged", "not square")),
        ({"boft_R": (2, 3, 8, 8), "boft_s": (32, 1)}, ("2 stages do not halve 3",)),
        ({"boft_R": (1, 3, 8, 8)}, ("incomplete", "only boft_R")),
    ],
)
def test_rotations_of_peft_that_do_not_fit(parts: dict[str, Any], words: tuple[str, ...]) -> None:
    refused({f"unet.{LINEAR}.{k}": torch.ones(v) for k, v in parts.items()}, "attn1.to_q", *words)


# ---- GLoRA


@pytest.mark.parametrize("multiplier", [1.0, -0.7])
def test_glora_equals_lycoris(multiplier: float) -> None:
    net, merged, saved = trained(GLoRAModule, list(LAYERS), multiplier, lora_dim=3, alpha=2)
    assert_every_style("GLoRA", net, merged, saved, multiplier)


def test_glora_of_more_ranks_than_inputs() -> None:
    net, merged, saved = trained(GLoRAModule, list(LAYERS), lora_dim=70)
    assert_merged(read_lora(joined(saved, KOHYA), TARGETS, SHAPES), net, merged)


def test_glora_of_the_first_files_has_its_factors_turned_round() -> None:
    net, merged, saved = trained(GLoRAModule, ATTENTION, lora_dim=3, alpha=2)
    turned = {"a1": "a2", "a2": "a1", "b1": "b2", "b2": "b1"}
    old = {
        name: {f"{turned.get(k[:2], k[:2])}{k[2:]}": v for k, v in parts.items() if k != "alpha"}
        | {"alpha": parts["alpha"]}
        for name, parts in saved.items()
    }
    assert old[LINEAR]["b2.weight"].shape == (32, 3)
    assert_merged(read_lora(joined(old, KOHYA), TARGETS, SHAPES), net, merged)


@pytest.mark.parametrize(
    ("part", "shape", "words"),
    [
        ("a1.weight", (25, 3), ("damaged", "a1 [25, 3]")),
        ("a1.weight", (24, 3, 3, 3), ("damaged", "a1 [24, 3, 3, 3]")),
        ("b1.weight", (33, 3), ("24 -> 33 features",)),
        ("b2.weight", (4, 24), ("damaged",)),
        ("a2.weight", None, ("incomplete",)),
    ],
)
def test_glora_that_does_not_fit(part: str, shape: Any, words: tuple[str, ...]) -> None:
    _, _, saved = trained(GLoRAModule, [LINEAR], lora_dim=3)
    del saved[LINEAR][part]
    if shape:
        saved[LINEAR][part] = torch.ones(shape)
    refused(joined(saved, KOHYA), "attn1_to_q", *words)


# ---- IA3


@pytest.mark.parametrize("on_input", [False, True])
def test_ia3_equals_lycoris(on_input: bool) -> None:
    net, merged, saved = trained(IA3Module, list(LAYERS), -0.7, train_on_input=on_input)
    assert_every_style("IA3", net, merged, saved, -0.7)


@pytest.mark.parametrize("inner", [[], [LINEAR, CONV], r".*(conv1|proj_in|ff\.net\.0\.proj)"])
def test_ia3_equals_peft(tmp_path: Path, inner: Any) -> None:
    # peft takes expressions for both or for none.
    targets: Any = (
        r".*(to_[qk]|to_out\.0|proj|conv1|proj_in)" if isinstance(inner, str) else list(LAYERS)
    )
    net, merged, saved, config = peft_reference(
        list(LAYERS), peft.IA3Config, target_modules=targets, feedforward_modules=inner
    )
    assert any(name.endswith(".bias") for name in merged), "biases of scaled outputs are scaled"
    for spell in PEFT_STYLES.values():
        state = {spell(key): value for key, value in saved.items()}
        lora = read_lora(configured(tmp_path, state, config), TARGETS, shapes_of(net))
        assert lora.format == "IA3"
        assert_merged(lora, net, merged)


def test_ia3_of_a_linear_layer_needs_no_configuration() -> None:
    net, merged, saved, _ = peft_reference(
        ATTENTION, peft.IA3Config, feedforward_modules=ATTENTION[:1]
    )
    assert_merged(read_lora(saved, TARGETS, shapes_of(net)), net, merged)
    refused(peft_reference([CONV], peft.IA3Config, feedforward_modules=[])[2], "adapter_config")


def test_ia3_that_does_not_fit() -> None:
    key = KOHYA(LINEAR)
    refused({f"{key}.on_input": torch.tensor(0)}, "incomplete", "only on_input")
    for size, on_input in ((31, 0), (32, 1), (24, 0)):
        state = {f"{key}.weight": torch.ones(size), f"{key}.on_input": torch.tensor(on_input)}
        refused(state, "attn1_to_q", f"scales [{size}] channels", "[32, 24]")
    for shape in ((1, 32), (24, 1), (1, 31)):
        refused({f"unet.{LINEAR}.ia3_l": torch.ones(shape)}, "attn1.to_q", f"scales {list(shape)}")


@pytest.mark.parametrize(
    ("inner", "words"),
    [
        ([], "scales [1, 24, 1, 1] channels"),
        (["conv1"], None),
        (3, "feedforward_modules cannot be read"),
        ("(", "feedforward_modules cannot be read"),
        ([None, 3], "scales [1, 24, 1, 1] channels"),
    ],
)
def test_ia3_of_a_convolution_goes_by_its_configuration(
    tmp_path: Path, inner: Any, words: str | None
) -> None:
    path = tmp_path / "adapter_model.safetensors"
    save_file({f"base_model.model.{CONV}.ia3_l": torch.ones(1, 24, 1, 1)}, path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"feedforward_modules": inner}))
    if words:
        refused(path, words)
    else:
        assert read_lora(path, TARGETS, SHAPES).format == "IA3"


# ---- full differences, norms, biases


def with_norms() -> Net:
    net = Net([*LAYERS, *NORMS])
    for name in NORMS:
        nn.init.normal_(net.get_parameter(f"{name}.weight"))
        nn.init.normal_(net.get_parameter(f"{name}.bias"))
    return net


def shapes_of(net: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in net.named_parameters()}


def test_full_differences_equal_lycoris() -> None:
    net = with_norms()
    merged: Merged = {}
    saved: dict[str, State] = {}
    for name in [*LAYERS, *NORMS]:
        layer = net.get_submodule(name)
        module = NormModule(name, layer) if name in NORMS else FullModule(name, layer)
        for parameter in module.parameters():
            nn.init.normal_(parameter)
        weight, bias = module.get_merged_weight(-0.6)
        merged[f"{name}.weight"], merged[f"{name}.bias"] = weight.detach(), bias.detach()
        parts = module.custom_state_dict() if name in LAYERS else module.state_dict()
        if name in LAYERS:  # its own goes by what it trained from, which is not what it merges here
            parts = {"diff": module.weight, "diff_b": module.bias}
        saved[name] = {k: v.detach().clone() for k, v in parts.items()}
    assert saved[LINEAR].keys() == {"diff", "diff_b"}
    assert saved[f"{BLOCK}.norm1"].keys() == {"w_norm", "b_norm"}
    for spell in KOHYA_STYLES.values():
        lora = read_lora(joined(saved, spell), TARGETS, shapes_of(net))
        assert lora.format == "full difference"
        assert_merged(lora, net, merged, strength=-0.6)


def test_a_difference_of_the_bias_beside_a_lora() -> None:
    net, merged, saved = trained(LoConModule, ATTENTION, lora_dim=2, alpha=1)
    for name in ATTENTION:
        change = torch.randn_like(net.get_parameter(f"{name}.bias"))
        saved[name]["diff_b"] = change
        merged[f"{name}.bias"] = net.get_parameter(f"{name}.bias").detach() + change
    lora = read_lora(joined(saved, KOHYA), TARGETS, shapes_of(net))
    assert lora.format == "kohya + full difference"
    assert_merged(lora, net, merged)


def test_whole_parameters_are_set() -> None:
    net = with_norms()
    own = dict(net.named_parameters())
    values = {name: torch.randn_like(own[f"{name}.weight"]) for name in (LINEAR, *NORMS)}
    state = {f"{KOHYA(name)}.set_weight": value for name, value in values.items()}
    lora = read_lora(state, TARGETS, shapes_of(net))
    assert_merged(lora, net, {f"{name}.weight": value for name, value in values.items()})
    patch = lora.patches[f"{LINEAR}.weight"]
    half = own[f"{LINEAR}.weight"].detach()
    torch.testing.assert_close(half + patch.delta(half, 0.5), (half + values[LINEAR]) / 2)


@pytest.mark.parametrize("options", [{"bias": "lora_only"}, {"lora_bias": True}, {"saved": True}])
def test_what_peft_trains_beside_its_factors(tmp_path: Path, options: dict[str, Any]) -> None:
    net = with_norms()
    if options.pop("saved", False):
        options["modules_to_save"] = ["norm1"]
    names = list(LAYERS)
    merged, saved, config = with_extras(net, names, options)
    assert any("lora_" not in key or key.endswith("bias") for key in saved)
    lora = read_lora(configured(tmp_path, saved, config), TARGETS, shapes_of(net))
    assert_merged(lora, net, merged)


def with_extras(net: Net, names: list[str], options: dict[str, Any]) -> tuple[Merged, State, Any]:
    import copy

    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=names, **options)
    wrapped = peft.get_peft_model(copy.deepcopy(net), config)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    saved = {k: v.detach().clone() for k, v in peft.get_peft_model_state_dict(wrapped).items()}
    merged = wrapped.merge_and_unload().state_dict()
    own = net.state_dict()
    return {n: v.clone() for n, v in merged.items() if not torch.equal(v, own[n])}, saved, config


@pytest.mark.parametrize(
    ("key", "shape", "words"),
    [
        (f"{KOHYA(LINEAR)}.diff", (32, 25), ("[32, 25]", "[32, 24]")),
        (f"{KOHYA(CONV)}.diff", (40, 24), ("[40, 24]", "[40, 24, 3, 3]")),
        (f"{KOHYA(LINEAR)}.diff_b", (31,), ("attn1_to_q.bias", "[31]", "[32]")),
        (f"{KOHYA(LINEAR)}.b_norm", (32, 1), ("[32, 1]", "[32]")),
        (f"{KOHYA(f'{BLOCK}.norm1')}.w_norm", (25,), ("norm1", "[25]", "[24]")),
        (f"{KOHYA(f'{BLOCK}.norm1')}.oft_blocks", (4, 6, 6), ("norm1", "is no matrix")),
        (f"unet.{BLOCK}.norm9.w_norm", (24,), ("norm9", "does not")),
        (f"unet.{LINEAR}.lora_B.bias", (32,), ("incomplete",)),
    ],
)
def test_differences_that_do_not_fit(key: str, shape: Any, words: tuple[str, ...]) -> None:
    net = with_norms()
    refused({key: torch.ones(shape)}, *words, targets=TARGETS, shapes=shapes_of(net))


def test_a_bias_that_the_model_does_not_have() -> None:
    state = {f"{KOHYA(LINEAR)}.diff_b": torch.ones(32)}
    weights = {name: shape for name, shape in SHAPES.items() if name.endswith("weight")}
    refused(state, "attn1_to_q.bias' does not", shapes=weights)
    factors = {
        f"unet.{LINEAR}.lora_A.weight": torch.ones(2, 24),
        f"unet.{LINEAR}.lora_B.weight": torch.ones(32, 2),
        f"unet.{LINEAR}.lora_B.bias": torch.ones(32),
    }
    refused(factors, "a bias [32] where the model's has none", shapes=weights)


def test_one_bias_changed_twice() -> None:
    net = with_norms()
    state = {
        f"unet.{LINEAR}.ia3_l": torch.ones(32, 1),
        f"unet.{LINEAR}.diff_b": torch.ones(32),
    }
    refused(state, "attn1.to_q.bias' twice", shapes=shapes_of(net))


# ---- merged projections


@pytest.mark.parametrize("kind", [LoConModule, LohaModule, LokrModule, FullModule])
@pytest.mark.parametrize("spell", [KOHYA, lambda name: f"unet.{name}"])
def test_merged_projections_are_taken_apart(
    kind: Callable[..., Any], spell: Callable[[str], str]
) -> None:
    attention = f"{BLOCK}.attn1"
    layers = {f"{attention}.to_{x}": nn.Linear(24, 32, bias=False) for x in "qkv"}
    whole = nn.Linear(24, 96, bias=False)
    module = kind("to_qkv", whole, lora_dim=2, alpha=1)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    if kind is FullModule:
        parts = {"diff": module.weight.detach()}
        change = parts["diff"]
    else:
        parts = {k: v.detach() for k, v in module.custom_state_dict().items()}
        make = module.make_weight if kind is LoConModule else lambda: module.get_weight((96, 24))
        change = (make() * (module.scale if kind is LoConModule else 1.0)).detach()
    state = {f"{spell(f'{attention}.to_qkv')}.{k}": v for k, v in parts.items()}
    targets = {s: f"{n}.weight" for n in layers for s in (n, n.replace(".", "_"))}
    shapes = {f"{name}.weight": (32, 24) for name in layers}
    lora = read_lora(state, targets, shapes)
    assert list(lora.patches) == list(shapes)
    for patch, want in zip(lora.patches.values(), change.split(32), strict=True):
        assert (kind is LoConModule) == isinstance(patch, LowRank)
        delta = patch.delta(torch.zeros(32, 24), -0.5)
        assert (delta + 0.5 * want).norm() <= 1e-6 * want.norm()


def test_merged_projections_are_set_to_values() -> None:
    attention = f"{BLOCK}.attn1"
    shapes = {f"{attention}.to_{x}.weight": (32, 24) for x in "qkv"}
    targets = {name.removesuffix(".weight"): name for name in shapes}
    whole, base = torch.randn(96, 24), torch.randn(32, 24)
    lora = read_lora({f"unet.{attention}.to_qkv.set_weight": whole}, targets, shapes)
    for patch, want in zip(lora.patches.values(), whole.split(32), strict=True):
        torch.testing.assert_close(base + patch.delta(base, 0.5), (base + want) / 2)


def test_merged_projections_beside_their_own_or_of_other_inputs() -> None:
    attention = f"{BLOCK}.attn1"
    shapes = {f"{attention}.to_{x}.weight": (32, 24) for x in "qkv"}
    targets = {name.removesuffix(".weight"): name for name in shapes}
    factors = {"lora_A.weight": (2, 24), "lora_B.weight": (96, 2)}
    whole = {f"unet.{attention}.to_qkv.{k}": torch.ones(v) for k, v in factors.items()}
    read_lora(whole, targets, shapes)
    one = {f"unet.{attention}.to_k.{k}": torch.ones(v) for k, v in factors.items()}
    refused({**whole, **one}, "twice", targets=targets, shapes=shapes)
    other = {**shapes, f"{attention}.to_k.weight": (32, 40)}
    refused(whole, "to_qkv' does not", targets=targets, shapes=other)
    turned = {f"unet.{attention}.to_qkv.oft_blocks": torch.ones(4, 24, 24)}
    refused(turned, "OFT on merged projections", targets=targets, shapes=shapes)


# ---- peft's LoHa and LoKr


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (peft.LoHaConfig, {"r": 4, "alpha": 6}),
        (peft.LoHaConfig, {"r": 4, "alpha": 6, "alpha_pattern": {"conv1": 3}}),
        (peft.LoKrConfig, {"r": 2, "alpha": 6}),
        (peft.LoKrConfig, {"r": 2, "alpha": 6, "decompose_both": True}),
        (peft.LoKrConfig, {"r": 64, "alpha": 6, "alpha_pattern": {"conv1": 3}}),
    ],
)
def test_lycoris_formats_of_peft(tmp_path: Path, kind: Any, options: dict[str, Any]) -> None:
    net, merged, saved, config = peft_reference(list(LAYERS), kind, **options)
    assert (options["r"] == 64) == all("_a" not in key for key in saved)
    for style in ("peft", "unet"):
        state = {PEFT_STYLES[style](key): value for key, value in saved.items()}
        assert_merged(read_lora(configured(tmp_path, state, config), TARGETS, SHAPES), net, merged)


def test_lycoris_reference_differs_from_what_lycoris_merges() -> None:
    """Should lycoris mend its doubled scale, these tests may use its merged weights."""
    _, merged, _ = lycoris_reference(LohaModule, [LINEAR])
    layer = nn.Linear(24, 32)
    module = LohaModule("x", layer, lora_dim=2, alpha=1.5)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    change = module.get_weight((32, 24))
    twice = module.get_merged_weight()[0] - layer.weight
    torch.testing.assert_close(twice, change * module.scale)
    assert math.isclose(module.scale, 0.75) and len(merged) == 1


# ---- damage of any kind


def one_layer_of_each(name: str) -> list[State]:
    """One layer's keys in every format."""
    plain, dora = trained(LoConModule, [name], lora_dim=2)[2], decomposed(LohaModule, True)[2]
    found = [plain, {name: dora[name]}, trained(LoConModule, [name], use_tucker=True)[2]]
    for kind in (LohaModule, LokrModule):
        found.append(lycoris_reference(kind, [name], use_tucker=True)[2])
    for kind in (DiagOFTModule, ButterflyOFTModule):
        found.append(trained(kind, [name], lora_dim=12, rescaled=True)[2])
    found += [trained(GLoRAModule, [name], lora_dim=3)[2], trained(IA3Module, [name])[2]]
    return [joined(state, KOHYA) for state in found]


@pytest.mark.parametrize("name", [LINEAR, CONV])
def test_whatever_is_damaged_is_refused_or_has_a_delta(name: str) -> None:
    rng, kinds, layer = random.Random(5), one_layer_of_each(name), KOHYA(name)
    parts = sorted({key.removeprefix(f"{layer}.") for state in kinds for key in state})
    sizes = (0, 1, 1, 2, 3, 4, 8, 12, 24, 32, 40)
    base, outcomes = torch.randn(SHAPES[f"{name}.weight"]), Counter[bool]()
    for _ in range(2000):
        state = dict(rng.choice(kinds))
        for _ in range(rng.choice((1, 1, 2))):
            key = rng.choice(list(state))
            shape = list(state[key].shape)
            match rng.choice(("lost", "renamed", "more", "reshaped", "resized", "transposed")):
                case "lost" if len(state) > 1:
                    del state[key]
                case "renamed":
                    state[f"{layer}.{rng.choice(parts)}"] = state.pop(key)
                case "more":
                    state[f"{layer}.{rng.choice(parts)}"] = state[key]
                case "reshaped":
                    state[key] = torch.ones([rng.choice(sizes) for _ in range(rng.randrange(6))])
                case "resized" if shape:
                    shape[rng.randrange(len(shape))] = rng.choice(sizes)
                    state[key] = torch.ones(shape)
                case "transposed" if len(shape) > 1:
                    state[key] = state[key].transpose(0, 1)
        try:
            lora = read_lora(state, TARGETS, SHAPES)
        except InvalidLora:
            outcomes[False] += 1
            continue
        for patch in lora.patches.values():
            assert patch.delta(base, 0.7).shape == base.shape
        outcomes[True] += 1
    assert min(outcomes[True], outcomes[False]) > 20


# ---- telling a LoRA from other files


@pytest.mark.parametrize(
    "parts",
    [
        *(
            {"lora_up.weight", "alpha"},
            {"lora_A.weight"},
            {"hada_w1_a"},
            {"lokr_w1"},
            {"a1.weight"},
        ),
        *({"a1.weight"}, {"oft_blocks"}, {"oft_R.weight"}, {"boft_R"}, {"ia3_l"}),
        *({"diff"}, {"diff_b"}, {"w_norm"}, {"set_weight"}, {"oft_diag"}, {"lora_E"}),
        {"weight", "on_input"},
    ],
)
def test_one_layer_makes_a_lora(parts: set[str]) -> None:
    for spell in KOHYA_STYLES.values():
        assert is_lora([f"{spell(LINEAR)}.{part}" for part in parts])


def test_checkpoints_are_no_loras() -> None:
    for family in FAMILIES:
        names = [parameter.ldm_name for parameter in parameters(family.config).values()]
        for keys in (
            list(parameters(family.config)),
            [f"model.diffusion_model.{n}" for n in names],
        ):
            assert not is_lora(keys)
            assert fits(dict.fromkeys(keys, (4, 4)), TARGETS, SHAPES) == (0, 0)
