"""Loading files for the engine: by the host's own loaders, but without a copy of the weights."""

from __future__ import annotations

import logging
from typing import Any

import comfy.sd
import comfy.utils
import folder_paths
import torch
from torch import nn

from ...errors import SwitchyardError
from ...structure import canonical_names
from ...tensorfile import TensorFile, fingerprint_of
from .patcher import accelerate
from .run import KEY, Options, structure_of_model
from .weights import FILE, contents

logger = logging.getLogger(__name__)


def load_checkpoint(path: str, options: Options) -> tuple[Any, Any, Any]:
    """MODEL (accelerated where it can be), CLIP and VAE of a checkpoint file."""
    model, clip, vae = comfy.sd.load_checkpoint_guess_config(
        path,
        output_vae=True,
        output_clip=True,
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
    )[:3]
    return _accelerated(model, path, options), clip, vae


def load_diffusion_model(path: str, weight_dtype: str, options: Options) -> Any:
    """MODEL (accelerated where it can be) of a diffusion model file.

    weight_dtype: "default", or the name of a float8 type that the weights are kept in. With "_fast"
    the host multiplies in it as well, where the device can; such a MODEL is not accelerated.
    """
    model_options: dict[str, Any] = {}
    if weight_dtype != "default":
        model_options["dtype"] = getattr(torch, f"float8_{weight_dtype.split('_')[1]}")
    if weight_dtype.endswith("_fast"):
        model_options["fp8_optimizations"] = True
    model = comfy.sd.load_diffusion_model(path, model_options=model_options)
    return _accelerated(model, path, options)


def state_of(folder: str, name: str | None) -> str:
    """Changes where a file does: the host then loads it anew, and does not use what it kept.

    A MODEL may be the mapped file. What is written over that changes half of it (its text encoders
    are copies), and of a file that was cut short a mapping cannot be read: that ends the process.

    name: None where another node gives it, and it is not known yet.
    """
    path = None if name is None else folder_paths.get_full_path(folder, name)
    if path is None:
        return ""
    try:
        return str(fingerprint_of(path))
    except OSError:
        return ""


def _accelerated(model: Any, path: str, options: Options) -> Any:
    result = accelerate(model, options)
    if result.get_attachment(KEY) is not None:
        result.set_attachments(FILE, path)
        if path.endswith(".safetensors"):
            try:
                _map_weights(result, path)
            except SwitchyardError as error:  # the copies that the host made serve as well
                logger.debug("%s stays a copy in RAM: %s", path, error)
    return result


def _map_weights(model: Any, path: str) -> None:
    """Put the mapped file's tensors in place of the host's copies of them, which are then freed.

    Only where they are equal: the host may have cast or changed some while loading.
    """
    module: nn.Module = model.model.diffusion_model
    config = structure_of_model(model).config
    assert config is not None
    file = TensorFile(path)
    theirs = canonical_names(file.tensors, config)
    ours = canonical_names({n: tuple(p.shape) for n, p in module.named_parameters()}, config)
    for name, own in ours.items():
        copy = module.get_parameter(own)
        mapped = file.read(theirs[name])
        if copy.device.type == "cpu" and contents(copy) == contents(mapped):
            comfy.utils.set_attr_param(module, own, mapped)
