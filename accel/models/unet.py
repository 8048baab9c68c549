"""Stable Diffusion UNets and ControlNets: SD 1.x, SD 2.x, SDXL, its refiner and distillations."""

from .unet_config import (
    Blocks,
    Parameter,
    TransformerSite,
    UNetConfig,
    adapter_names,
    blocks,
    diffusers_kwargs,
    infer_config,
    parameters,
    transformers,
)
from .unet_live import config_of_module, unsupported_state

__all__ = [
    "Blocks",
    "Parameter",
    "TransformerSite",
    "UNetConfig",
    "adapter_names",
    "blocks",
    "config_of_module",
    "diffusers_kwargs",
    "infer_config",
    "parameters",
    "transformers",
    "unsupported_state",
]
