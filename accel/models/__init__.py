"""The networks this package knows: architecture, names of parameters, live modules, families."""

from .families import FAMILIES, Family, family_of
from .unet import (
    Blocks,
    Parameter,
    TransformerSite,
    UNetConfig,
    adapter_names,
    blocks,
    config_of_module,
    diffusers_kwargs,
    infer_config,
    parameters,
    transformers,
    unsupported_state,
)

__all__ = [
    "FAMILIES",
    "Blocks",
    "Family",
    "Parameter",
    "TransformerSite",
    "UNetConfig",
    "adapter_names",
    "blocks",
    "config_of_module",
    "diffusers_kwargs",
    "family_of",
    "infer_config",
    "parameters",
    "transformers",
    "unsupported_state",
]
