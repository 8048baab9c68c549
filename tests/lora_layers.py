"""Layers of a UNet in small, spellings of their keys, and merged weights to compare LoRAs with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from accel.errors import InvalidLora
from accel.lora import Lora, read_lora
from accel.runtime.adapters import InRam, Near, tensors_of
from accel.runtime.lowrank import change_of
from accel.runtime.transfer import transfer_for

BLOCK = "mid_block.attentions.0.transformer_blocks.0"
LDM_BLOCK = "middle_block.1.transformer_blocks.0"

# diffusers path -> (ldm path, layer): every kind of layer that a UNet has
LAYERS: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    f"{BLOCK}.attn1.to_q": (f"{LDM_BLOCK}.attn1.to_q", lambda: nn.Linear(24, 32)),
    f"{BLOCK}.attn2.to_k": (f"{LDM_BLOCK}.attn2.to_k", lambda: nn.Linear(40, 32)),
    f"{BLOCK}.attn1.to_out.0": (f"{LDM_BLOCK}.attn1.to_out.0", lambda: nn.Linear(32, 24)),
    f"{BLOCK}.ff.net.0.proj": (f"{LDM_BLOCK}.ff.net.0.proj", lambda: nn.Linear(24, 64)),
    "mid_block.attentions.0.proj_in": ("middle_block.1.proj_in", lambda: nn.Conv2d(24, 24, 1)),
    "mid_block.resnets.0.conv1": (
        "middle_block.0.in_layers.2",
        lambda: nn.Conv2d(24, 40, 3, padding=1),
    ),
    "down_blocks.0.downsamplers.0.conv": (
        "input_blocks.4.0.op",
        lambda: nn.Conv2d(16, 16, 3, stride=2, padding=1),
    ),
    "down_blocks.1.resnets.0.time_emb_proj": (
        "input_blocks.4.0.emb_layers.1",
        lambda: nn.Linear(64, 16),
    ),
}
NORMS: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "mid_block.resnets.0.norm1": ("middle_block.0.in_layers.0", lambda: nn.GroupNorm(4, 24)),
    f"{BLOCK}.norm1": (f"{LDM_BLOCK}.norm1", lambda: nn.LayerNorm(24)),
}
ATTENTION = [name for name in LAYERS if ".to_" in name]

TARGETS = {
    spelling: f"{name}.weight"
    for name, (ldm, _) in {**LAYERS, **NORMS}.items()
    for path in (name, ldm)
    for spelling in (path, path.replace(".", "_"))
}

Merged = dict[str, Tensor]
State = dict[str, Tensor]


class Net(nn.Module):
    """Layers of LAYERS and NORMS under their dotted names."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        for name in names:
            *parents, leaf = name.split(".")
            at: nn.Module = self
            for parent in parents:
                if not hasattr(at, parent):
                    at.add_module(parent, nn.Module())
                at = at.get_submodule(parent)
            at.add_module(leaf, {**LAYERS, **NORMS}[name][1]())

    def forward(self) -> None:
        raise NotImplementedError


SHAPES = {name: tuple(value.shape) for name, value in Net(list(LAYERS)).named_parameters()}


def by_products(patch: Any, strength: float, base: Tensor) -> Tensor | None:
    """The change as one launch makes it for many parameters; None where it cannot."""
    change = change_of(patch, strength, base.device)
    if change is None:
        return None
    products = [left.double() @ right.double() for left, right in change.pairs]
    return (torch.stack(products).prod(0) * change.scale).view(base.shape).float()


def assert_merged(
    lora: Lora, net: nn.Module, merged: Merged, tolerance: float = 1e-6, strength: float = 1.0
) -> None:
    """Every parameter of `merged`, and no other, is the net's own plus the LoRA's delta.

    It is the same bit for bit from the copy of its tensors that a device keeps.
    """
    own = dict(net.named_parameters())
    near = Near(lora, InRam(tensors_of(lora)).brought(transfer_for(torch.device("cpu"))))
    copied, given = ({tensor.data_ptr() for tensor in tensors_of(one)} for one in (near, lora))
    assert copied and copied.isdisjoint(given), "all of it is copied"
    assert set(lora.patches) == set(merged)
    for name, want in merged.items():
        base = own[name].detach().clone()
        delta = lora.patches[name].delta(base, strength)
        assert torch.equal(near.patches[name].delta(base, strength), delta)
        assert torch.equal(base, own[name]), f"{name}: the base was written to"
        assert delta.dtype == torch.float32 and delta.shape == base.shape
        assert (want - base).norm() > 0.1 * base.norm(), "the reference hardly differs"
        for change in (delta, by_products(lora.patches[name], strength, base)):
            error = 0.0 if change is None else (base + change - want).norm() / want.norm()
            assert error <= tolerance, f"{name}: {error:.1e}"


def joined(saved: dict[str, State], spell: Callable[[str], str]) -> State:
    return {
        f"{spell(name)}.{part}": t for name, parts in saved.items() for part, t in parts.items()
    }


def ldm(name: str) -> str:
    return {**LAYERS, **NORMS}[name][0]


KOHYA_STYLES: dict[str, Callable[[str], str]] = {
    "kohya": lambda name: "lora_unet_" + name.replace(".", "_"),
    "kohya-ldm": lambda name: "lora_unet_" + ldm(name).replace(".", "_"),
    "lycoris": lambda name: "lycoris_" + name.replace(".", "_"),
    "dotted-ldm": lambda name: "diffusion_model." + ldm(name),
    "dotted-ldm-full": lambda name: "model.diffusion_model." + ldm(name),
    "dotted": lambda name: "unet." + name,
}


def lycoris_reference(
    kind: Callable[..., Any], names: list[str], **options: Any
) -> tuple[Net, Merged, dict[str, State]]:
    """As `kohya_reference`, of another of lycoris-lora's modules: the weights that it trains with.

    Its merged ones have the scale twice.
    """
    net, merged, saved = Net(names), {}, {}
    for place, name in enumerate(names):
        layer = net.get_submodule(name)
        module = kind(name, layer, **{"lora_dim": 2 + place % 3, "alpha": 1.5, **options})
        for parameter in module.parameters():
            nn.init.normal_(parameter)
        delta = module.get_weight(SHAPES[f"{name}.weight"]) * module.scalar
        merged[f"{name}.weight"] = (layer.weight + delta).detach()
        saved[name] = {k: v.detach().clone() for k, v in module.custom_state_dict().items()}
    return net, merged, saved


def twin_of(net: Net, names: list[str]) -> Net:
    twin = Net(names)
    twin.load_state_dict(net.state_dict())
    return twin


def peft_reference(
    names: list[str], kind: Any = peft.LoraConfig, net: Net | None = None, **options: Any
) -> tuple[Net, Merged, State, Any]:
    """peft's merged weights, and what it saves, as `base_model.model.….lora_A.weight`.

    Everything that an adapter trains is random.
    """
    net = net or Net(names)
    plain: dict[str, Any] = {"r": 4, "lora_alpha": 6} if kind is peft.LoraConfig else {}
    config = kind(**{**plain, "target_modules": names, **options})
    wrapped = peft.get_peft_model(twin_of(net, names), config)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    saved = {k: v.detach().clone() for k, v in peft.get_peft_model_state_dict(wrapped).items()}
    merged = wrapped.merge_and_unload().state_dict()
    own = net.state_dict()
    changed = {name: v.clone() for name, v in merged.items() if not torch.equal(v, own[name])}
    return net, changed, saved, config


def configured(path: Path, saved: State, config: Any, beside: bool = False) -> Path:
    """A file as peft saves it, its configuration in the header or beside it."""
    fields = {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
    file = path / "adapter_model.safetensors"
    if beside:
        (path / "adapter_config.json").write_text(json.dumps(fields))
    metadata = None if beside else {"lora_adapter_metadata": json.dumps(fields)}
    save_file(saved, file, metadata)
    return file


def refused(
    source: Path | dict[str, Tensor],
    *words: str,
    targets: dict[str, str] = TARGETS,
    shapes: dict[str, tuple[int, ...]] = SHAPES,
) -> None:
    """Reading `source` gives one sentence with all of `words`."""
    with pytest.raises(InvalidLora) as caught:
        read_lora(source, targets, shapes)
    message = str(caught.value)
    assert "\n" not in message and not message.endswith(".")
    for word in words:
        assert word in message
