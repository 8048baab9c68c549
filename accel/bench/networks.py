"""What is measured: published architectures with random weights, their inputs, their LoRA."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InvalidInput, SwitchyardError
from ..models import FAMILIES, UNetConfig, diffusers_kwargs, parameters

PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
TOKENS = 77
SEED = 1234
LORA_RANK = 32
LORA_STRENGTH = 0.8


@dataclass(frozen=True)
class Case:
    """A UNet at one size, in pixels, with what runs beside it.

    controlnets: how many ControlNets, all of `controlnet_config`. loras: 1 for a LoRA of rank 32
    over every projection of attention and feed-forward layers, 0 for none.
    """

    model: str
    config: UNetConfig
    width: int
    height: int
    batch: int = 2
    controlnets: int = 0
    loras: int = 0
    precision: str = "fp16"
    controlnet_config: UNetConfig | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and activations."""
        return PRECISIONS[self.precision]

    @property
    def facts(self) -> dict[str, Any]:
        """What tells its rows from those of other cases."""
        names = ("model", "width", "height", "batch", "controlnets", "loras", "precision")
        return {name: getattr(self, name) for name in names}

    def resized(self, width: int, height: int) -> Case:
        """The same at another size."""
        return replace(self, width=width, height=height)


def case_of(
    model: str,
    size: tuple[int, int],
    batch: int = 2,
    controlnets: int = 0,
    lora: bool = False,
    precision: str = "fp16",
) -> Case:
    """A published family at a size (width, height). Raises `InvalidInput` for what there is not."""
    configs = {family.name: family.config for family in FAMILIES}
    unets = [name for name, config in configs.items() if config.kind == "unet"]
    if model not in unets:
        raise InvalidInput(f"{model!r} is no model: use one of {', '.join(unets)}")
    control = configs.get(f"{model}-controlnet")
    if controlnets and control is None:
        having = [name for name in unets if f"{name}-controlnet" in configs]
        raise InvalidInput(f"{model} has no ControlNets: use one of {', '.join(having)}")
    if min(size) < 64 or any(side % 8 for side in size):
        raise InvalidInput(f"{size[0]}x{size[1]} is no size: sides are multiples of 8 from 64 up")
    return Case(model, configs[model], *size, batch, controlnets, int(lora), precision, control)


@dataclass(frozen=True)
class Networks:
    """The UNet and its ControlNets, as modules of diffusers."""

    unet: Any
    controlnets: tuple[Any, ...]

    def each(self, change: Callable[[Any], Any]) -> None:
        """Call `change` on every network."""
        for network in (self.unet, *self.controlnets):
            change(network)

    def in_float32(self) -> Networks:
        """Copies with the same, rounded, weights in float32."""
        unet, *controlnets = (
            nn.Module.to(copy.deepcopy(network), torch.float32)
            for network in (self.unet, *self.controlnets)
        )
        return Networks(unet, tuple(controlnets))


@dataclass(frozen=True)
class Inputs:
    """One call: arguments of the UNet's forward, which ControlNets take too, and their images."""

    arguments: dict[str, Any]
    hints: tuple[Tensor, ...] = ()

    def map(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        """The same with every tensor changed."""
        return Inputs(_map(self.arguments, change), tuple(map(change, self.hints)))

    def cast(self, dtype: torch.dtype) -> Inputs:
        """The same in another floating-point dtype."""
        return self.map(lambda t: t.to(dtype) if t.is_floating_point() else t)

    def tensors(self) -> list[Tensor]:
        """Every tensor, in one order."""
        found: list[Tensor] = []

        def note(tensor: Tensor) -> Tensor:
            found.append(tensor)
            return tensor

        self.map(note)
        return found


def forward(unet: Any, controlnets: Sequence[Any], inputs: Inputs) -> Tensor:
    """ControlNets, then the UNet with the sum of their residuals, as diffusers' pipelines do it.

    The networks are called as diffusers' own are, with `return_dict=False`.
    """
    skips: list[Tensor] = []
    middle: Tensor | None = None
    for controlnet, hint in zip(controlnets, inputs.hints, strict=True):
        more, last = controlnet(**inputs.arguments, controlnet_cond=hint, return_dict=False)
        if middle is None:
            skips, middle = list(more), last
        else:
            skips = [one + other for one, other in zip(skips, more, strict=True)]
            middle = middle + last
    residuals: dict[str, Any] = {}
    if middle is not None:
        residuals["down_block_additional_residuals"] = skips
        residuals["mid_block_additional_residual"] = middle
    result: Tensor = unet(**inputs.arguments, **residuals, return_dict=False)[0]
    return result


def make_networks(case: Case, device: torch.device) -> Networks:
    """The case's networks with seeded random weights, made in float32 and rounded once."""
    nets: list[nn.Module] = []
    if case.controlnets:
        assert case.controlnet_config is not None
        for index in range(case.controlnets):
            nets.append(make_module(case.controlnet_config, SEED + 1 + index, device, case.dtype))
    networks = Networks(make_module(case.config, SEED, device, case.dtype), tuple(nets))
    release_memory(device)
    return networks


def make_module(
    config: UNetConfig, seed: int, device: torch.device, dtype: torch.dtype
) -> nn.Module:
    """A UNet or ControlNet of diffusers whose random weights make every path of it matter."""
    try:
        from diffusers import ControlNetModel, UNet2DConditionModel
    except ImportError:
        raise SwitchyardError("the benchmark needs diffusers: pip install diffusers") from None
    network: Any = UNet2DConditionModel if config.kind == "unet" else ControlNetModel
    torch.manual_seed(seed)
    with torch.device(device):
        module: nn.Module = network(**diffusers_kwargs(config)).eval().requires_grad_(False)
    for name, parameter in module.named_parameters():
        if "norm" in name:
            parameter.add_(torch.randn_like(parameter) * 0.1)
        elif not parameter.any():  # a ControlNet's zero convolutions would hide everything
            scale = parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.1
            parameter.copy_(torch.randn_like(parameter) * scale)
    # Not diffusers' own `to`, which has its say on some dtypes.
    return nn.Module.to(module, dtype)


def release_memory(device: torch.device) -> None:
    """Give back what making left behind on a GPU, so that no variant's memory counts it."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def make_inputs(case: Case, seed: int, device: torch.device, tokens: int = TOKENS) -> Inputs:
    """Random arguments in the case's dtype; each seed is another step of a schedule too."""
    config, batch = case.config, case.batch
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(case.dtype)

    height, width = case.height // 8, case.width // 8
    arguments: dict[str, Any] = {
        "sample": normal(batch, config.in_channels, height, width),
        "timestep": torch.tensor((981 - 300 * seed) % 1000, device=device),
        "encoder_hidden_states": normal(batch, tokens, config.context_dim),
    }
    if config.pooled_dim is not None:
        assert config.addition_time_embed_dim is not None
        # The refiner has five numbers and a wider text: the sum is the same, and so is the work.
        ids = [case.height, case.width, 0, 0, case.height, case.width]
        text = config.pooled_dim - len(ids) * config.addition_time_embed_dim
        arguments["added_cond_kwargs"] = {
            "text_embeds": normal(batch, text),
            "time_ids": torch.tensor([ids] * batch, device=device).to(case.dtype),
        }
    hints: list[Tensor] = []
    if case.controlnets:
        assert case.controlnet_config is not None
        factor = 2 ** (len(case.controlnet_config.hint_block_channels) - 1)
        shape = (batch, 3, factor * height, factor * width)
        for _ in range(case.controlnets):
            hint = torch.rand(shape, generator=generator, device=device)
            hints.append(hint.to(case.dtype))
    return Inputs(arguments, tuple(hints))


def random_lora(config: UNetConfig, rank: int = LORA_RANK, seed: int = 5) -> dict[str, Tensor]:
    """A kohya LoRA over every projection of the attention and feed-forward layers, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    lora: dict[str, Tensor] = {}
    for name, parameter in parameters(config).items():
        if not _adapted(name) or len(parameter.shape) != 2:
            continue
        layer, (rows, columns) = _kohya(name), parameter.shape
        lora[f"{layer}.lora_up.weight"] = torch.randn(rows, rank, generator=generator) * 0.02
        lora[f"{layer}.lora_down.weight"] = torch.randn(rank, columns, generator=generator) * 0.02
        lora[f"{layer}.alpha"] = torch.tensor(rank / 2)
    return lora


def merge_lora(unet: nn.Module, lora: Mapping[str, Tensor], strength: float) -> None:
    """Add a LoRA of `random_lora` to a UNet's weights, in float32, rounded once to their dtype."""
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            layer = _kohya(name)
            if not _adapted(name) or f"{layer}.alpha" not in lora:
                continue
            up, down = (
                lora[f"{layer}.lora_{part}.weight"].to(parameter.device) for part in ("up", "down")
            )
            scale = strength * float(lora[f"{layer}.alpha"]) / down.shape[0]
            parameter.copy_(parameter.float() + scale * (up @ down))


def _adapted(name: str) -> bool:
    return "transformer_blocks" in name and name.endswith(".weight")


def _kohya(name: str) -> str:
    return "lora_unet_" + name.removesuffix(".weight").replace(".", "_")


def _map(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _map(item, change) for key, item in value.items()}
    return value
