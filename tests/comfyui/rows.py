"""What ComfyUI's own nodes, and fakes of other packs, do to a MODEL or its conditioning.

`CHANGED` need the host's own path, `HARMLESS` run on the engine. test_decide.py looks at what is
said of them before sampling, test_table.py at what comes out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.gligen
import comfy.hooks
import comfy.ldm.modules.attention as attention
import comfy.model_patcher
import folder_paths
import pytest
import torch

from .checkpoints import CONFIGS, lora_state
from .host import call, exists, inputs_of
from .testpack import fakes

KIND = "tiny-sd15"

Conditioning = list[Any]


@dataclass(frozen=True)
class Row:
    """One change.

    module: the node's module, "" for one that is no node. name: its class. inputs: its own. text:
    the reasons, shortened. node: the name that goes with the first. cond: the change, where it is
    to the positive conditioning. label: tells two of a node apart. idle: SD1.5 pays no heed to it.
    """

    name: str
    module: str = ""
    inputs: dict[str, Any] | Callable[[Path], dict[str, Any]] | None = None
    text: str = ""
    node: str | None = None
    model: Callable[[Any], Any] | None = None
    cond: Callable[[Conditioning], Conditioning] | None = None
    label: str = ""
    idle: bool = False

    @property
    def exists(self) -> bool:
        """Whether this version of ComfyUI has the node."""
        return not self.module or exists(self.module, self.name)

    def apply(self, model: Any, folder: Path) -> Any:
        """The MODEL with the change; the same if it is to the conditioning."""
        if self.model is not None:
            return self.model(model)
        if not self.module:
            return model
        inputs = self.inputs(folder) if callable(self.inputs) else self.inputs or {}
        known = inputs_of(self.module, self.name)
        given = {name: value for name, value in inputs.items() if name in known}
        return call(self.module, self.name, model=model, **given)[0]

    def condition(self, positive: Conditioning) -> Conditioning:
        """The positive conditioning with the change."""
        return self.cond(positive) if self.cond is not None else positive


def _fake(name: str) -> Callable[[Any], Any]:
    def apply(model: Any) -> Any:
        model = model.clone()
        fakes.FAKES[name](model)
        return model

    return apply


def _hypernetwork(folder: Path) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(5)

    def half() -> dict[str, torch.Tensor]:
        return {
            "linear.0.weight": torch.randn(64, 32, generator=generator) * 0.1,
            "linear.0.bias": torch.zeros(64),
            "linear.1.weight": torch.randn(32, 64, generator=generator) * 0.1,
            "linear.1.bias": torch.zeros(32),
        }

    torch.save({32: [half(), half()], "activation_func": "relu"}, folder / "tiny.pt")
    folder_paths.add_model_folder_path("hypernetworks", str(folder), is_default=True)
    folder_paths.filename_list_cache.clear()
    return {"hypernetwork_name": "tiny.pt", "strength": 1.0}


def _gligen(positive: Conditioning) -> Conditioning:
    """A GLIGEN for the tiny SD1.5, in a box of its own."""
    widths = [32, 32, 64, 64, 128, 128, 128, 128, 128, 128, 64, 64, 64, 32, 32, 32]
    torch.manual_seed(6)
    blocks = [comfy.gligen.GatedSelfAttentionDense(w, 768, 8, w // 8) for w in widths]
    model = comfy.gligen.Gligen(blocks, comfy.gligen.PositionNet(768, 768), 768)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape)
        fan = parameter[0].numel() if parameter.dim() > 1 else 1
        parameter.data = noise / fan**0.5 if parameter.dim() > 1 else noise * 0.1
        if "alpha" in name:
            parameter.data.fill_(1.0)
        parameter.requires_grad_(False)
    cpu = torch.device("cpu")
    patcher = comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)

    class Clip:
        """Stands for the text encoder: the box's label is drawn from a seed."""

        def tokenize(self, text: str) -> str:
            return text

        def encode_from_tokens(self, tokens: str, return_pooled: str) -> tuple[None, torch.Tensor]:
            return None, torch.randn(1, 768, generator=torch.Generator().manual_seed(7))

    return call(
        "nodes",
        "GLIGENTextBoxApply",
        conditioning_to=positive,
        clip=Clip(),
        gligen_textbox_model=patcher,
        text="a cat",
        width=64,
        height=64,
        x=32,
        y=32,
    )[0]


def _hook_lora(positive: Conditioning) -> Conditioning:
    hooks = comfy.hooks.create_hook_lora(lora_state(KIND, "hooked"), 1.0, 0.0)
    return comfy.hooks.set_hooks_for_conditioning(positive, hooks)


def _bypass_lora(model: Any) -> Any:
    import comfy.sd

    return comfy.sd.load_bypass_lora_for_models(model, None, lora_state(KIND, "by"), 1.0, 0.0)[0]


def _attention(name: str) -> Callable[[Any], Any]:
    """One of ComfyUI's own attentions, as its node for that sets it."""

    def apply(model: Any) -> Any:
        model = model.clone()
        model.set_model_optimized_attention(attention.REGISTERED_ATTENTION_FUNCTIONS[name])
        return model

    return apply


def _inexact(q: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    result: torch.Tensor = attention.optimized_attention(q * 0.9, *args, **kwargs)
    return result


def _own_attention(model: Any) -> Any:
    model = model.clone()
    model.set_model_optimized_attention(_inexact)
    return model


def _weight_wrapper(model: Any) -> Any:
    model = model.clone()
    model.add_weight_wrapper("diffusion_model.out.2.weight", lambda weight: weight * 1.1)
    return model


def _area(positive: Conditioning) -> Conditioning:
    return call("nodes", "ConditioningSetArea", conditioning=positive, width=64, height=64, x=32,
                y=32, strength=0.8)[0]  # fmt: skip


def _regions(positive: Conditioning) -> Conditioning:
    mask = torch.zeros(1, 128, 128)
    mask[:, :, :64] = 1
    other = [[torch.randn_like(positive[0][0]), dict(positive[0][1])]]
    set_mask = {"strength": 1.0, "set_cond_area": "default"}
    left = call("nodes", "ConditioningSetMask", conditioning=positive, mask=mask, **set_mask)[0]
    right = call("nodes", "ConditioningSetMask", conditioning=other, mask=1 - mask, **set_mask)[0]
    return call("nodes", "ConditioningCombine", conditioning_1=left, conditioning_2=right)[0]


def _scheduled(positive: Conditioning) -> Conditioning:
    generator = torch.Generator().manual_seed(8)
    context = torch.randn(1, 77, CONFIGS[KIND].context_dim, generator=generator)
    other = [[context, dict(positive[0][1])]]
    first, second = (
        call("nodes", "ConditioningSetTimestepRange", conditioning=cond, start=start, end=end)[0]
        for cond, start, end in ((positive, 0.0, 0.5), (other, 0.5, 1.0))
    )
    return call("nodes", "ConditioningCombine", conditioning_1=first, conditioning_2=second)[0]


_E = "comfy_extras.nodes_"
_FREEU = {"b1": 1.3, "b2": 1.4, "s1": 0.9, "s2": 0.2}
_WINDOWS = {
    "context_length": 4,
    "context_overlap": 0,
    "context_schedule": "standard_static",
    "context_stride": 1,
    "closed_loop": False,
    "fuse_method": "pyramid",
    "dim": 0,
    "freenoise": False,
}

CHANGED = [
    Row("FreeU", _E + "freelunch", _FREEU, "FreeU changes the up blocks", "FreeU"),
    Row("FreeU_V2", _E + "freelunch", _FREEU, "FreeU_V2 changes the up blocks", "FreeU_V2"),
    Row(
        "HyperTile",
        _E + "hypertile",
        {"tile_size": 64, "swap_size": 1, "max_depth": 0, "scale_depth": False},
        "HyperTile changes the self-attention",
        "HyperTile",
    ),
    Row(
        "TomePatchModel",
        _E + "tomesd",
        {"ratio": 0.5},
        "TomePatchModel changes the self-attention",
        "TomePatchModel",
    ),
    Row(
        "PerturbedAttentionGuidance",
        _E + "pag",
        {"scale": 3.0},
        "PerturbedAttentionGuidance runs the network again with patches",
        "PerturbedAttentionGuidance",
    ),
    Row(
        "SelfAttentionGuidance",
        _E + "sag",
        {"scale": 0.5, "blur_sigma": 2.0},
        "Self-Attention Guidance changes the self-attention",
        "Self-Attention Guidance",
    ),
    Row(
        "SkipLayerGuidanceDiT",
        _E + "slg",
        {"scale": 3.0, "start_percent": 0.0, "end_percent": 1.0, "double_layers": "1",
         "single_layers": ""},
        "SkipLayerGuidanceDiT runs the network again with patches",
        "SkipLayerGuidanceDiT",
        idle=True,
    ),
    Row(
        "SkipLayerGuidanceDiTSimple",
        _E + "slg",
        {"start_percent": 0.0, "end_percent": 1.0, "double_layers": "1", "single_layers": ""},
        "SkipLayerGuidanceDiTSimple runs the network again with patches",
        "SkipLayerGuidanceDiTSimple",
        idle=True,
    ),
    Row(
        "PatchModelAddDownscale",
        _E + "model_downscale",
        {"block_number": 3, "downscale_factor": 2.0, "start_percent": 0.0, "end_percent": 0.6,
         "downscale_after_skip": True, "downscale_method": "bicubic",
         "upscale_method": "bicubic"},
        "PatchModelAddDownscale (Kohya Deep Shrink) changes the down blocks; "
        "PatchModelAddDownscale (Kohya Deep Shrink) changes the up blocks",
        "PatchModelAddDownscale (Kohya Deep Shrink)",
    ),
    Row(
        "HypernetworkLoader",
        _E + "hypernetwork",
        _hypernetwork,
        "changes the self-attention; changes the cross-attention",
        None,  # "Load Hypernetwork", or its class in older versions
    ),
    Row(
        "NAGuidance",
        _E + "nag",
        {"nag_scale": 5.0, "nag_alpha": 0.5, "nag_tau": 1.5},
        "Normalized Attention Guidance changes the self-attention",
        "Normalized Attention Guidance",
    ),
    Row(
        "ScaleROPE",
        _E + "rope",
        {"scale_x": 1.0, "shift_x": 0.0, "scale_y": 1.0, "shift_y": 0.0, "scale_t": 1.0,
         "shift_t": 0.0},
        "a setting of another pack is not known: rope_options",
        idle=True,
    ),
    Row(
        "ContextWindowsManualNode",
        _E + "context_windows",
        _WINDOWS,
        "context windows cut the prompt up in mid-run",
        "Context Windows",
        idle=True,  # of one image there is one window
    ),
    Row("GLIGEN", cond=_gligen, text="GLIGEN changes the transformer blocks",
        node="GLIGENTextBoxApply"),
    Row("hook LoRA", cond=_hook_lora, node="Hook LoRA",
        text="LoRAs on parts of the prompt change the weights in mid-run"),
    Row("weight wrapper", model=_weight_wrapper,
        text="another pack changes weights while they are used"),
    *(
        Row(name, model=_fake(name), text=text, idle=name == "unknown_option")
        for name, text in {
            "attention_override": "a node has chosen another attention",
            "attention_patch": "another pack changes the self-attention",
            "attention_replace": "another pack changes the cross-attention",
            "block_patch": "another pack changes the up blocks",
            "forward_around": "another pack works on the network's layers itself",
            "forward_patch": "another pack replaces a part of the network (out.1)",
            "injection": "fake puts itself into the network's layers",
            "object_patch": "another pack replaces a part of the network (out.1)",
            "reentering": "another pack runs the network again with patches",
            "unknown_option": "a setting of another pack is not known: someones_setting",
        }.items()
    ),
]  # fmt: skip
if exists("comfy.sd", "load_bypass_lora_for_models"):
    CHANGED.append(
        Row("bypass LoRA", model=_bypass_lora, text="a LoRA is loaded in bypass mode",
            node="Load LoRA (Bypass)")
    )  # fmt: skip

# Newer versions choose an attention for each MODEL.
_CHOICE = hasattr(comfy.model_patcher.ModelPatcher, "set_model_optimized_attention")
if _CHOICE:
    CHANGED.append(
        Row("own attention", model=_own_attention, text="a node has chosen another attention")
    )

HARMLESS = [
    Row("RescaleCFG", _E + "model_advanced", {"multiplier": 0.7}),
    Row("ModelSamplingDiscrete", _E + "model_advanced",
        {"sampling": "v_prediction", "zsnr": True}, label="v-prediction"),
    Row("ModelSamplingDiscrete", _E + "model_advanced", {"sampling": "lcm", "zsnr": False},
        label="LCM"),
    Row("ModelSamplingContinuousEDM", _E + "model_advanced",
        {"sampling": "edm_playground_v2.5", "sigma_max": 80.0, "sigma_min": 0.002}),
    Row("EasyCacheNode", _E + "easycache",
        {"reuse_threshold": 0.2, "start_percent": 0.0, "end_percent": 1.0, "verbose": False}),
    Row("LazyCacheNode", _E + "easycache",
        {"reuse_threshold": 0.2, "start_percent": 0.0, "end_percent": 1.0, "verbose": False}),
    Row("DifferentialDiffusion", _E + "differential_diffusion"),
    Row("FreSca", _E + "fresca", {"scale_low": 1.0, "scale_high": 1.25, "freq_cutoff": 2}),
    Row("CFGZeroStar", _E + "cfg"),
    Row("CFGNorm", _E + "cfg", {"strength": 1.0}),
    Row("TCFG", _E + "tcfg"),
    Row("APG", _E + "apg", {"eta": 1.0, "norm_threshold": 5.0, "momentum": 0.0}),
    Row("Mahiro", _E + "mahiro"),
    Row("EpsilonScaling", _E + "eps", {"scaling_factor": 1.01}),
    Row("UNetSelfAttentionMultiply", _E + "attention_multiply",
        {"q": 1.1, "k": 1.0, "v": 0.9, "out": 1.0}),
    Row("area", cond=_area),
    Row("regions", cond=_regions),
    Row("scheduled prompts", cond=_scheduled),
    *(
        Row(name, model=_fake(name))
        for name in (
            "apply_context", "callbacks", "function_wrapper", "harmless_cfg", "wrapper_context",
        )
    ),
]  # fmt: skip
if _CHOICE:
    HARMLESS += [Row(f"{name} attention", model=_attention(name)) for name in ("pytorch", "split")]


def every(rows: list[Row]) -> pytest.MarkDecorator:
    """A test's parameter `row`: each that this version of ComfyUI has."""
    return pytest.mark.parametrize(
        "row",
        [row for row in rows if row.exists],
        ids=lambda row: f"{row.name} {row.label}".strip().replace(" ", "-"),
    )
