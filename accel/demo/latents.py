"""Latents of SD1.5 and SDXL to pictures: by the checkpoint's own VAE, or a linear guess at it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ..tensorfile import TensorFile

# Published linear fits of what the VAEs make of a latent pixel: rows are its four channels, columns
# red, green and blue in -1..1. Colours and shapes come out, details do not.
_SD15 = torch.tensor(
    [
        [0.298, 0.207, 0.208],
        [0.187, 0.286, 0.173],
        [-0.158, 0.189, 0.264],
        [-0.184, -0.271, -0.473],
    ]
)
_SDXL = torch.tensor([[60, 60, 60], [-60, -5, 10], [25, 15, -5], [-70, -50, -35]]) / 127.5
_SDXL_OFFSET = torch.tensor([150, 140, 130]) / 127.5 - 1

_SCALE_SD15, _SCALE_SDXL = 0.18215, 0.13025  # latents are the VAE's times this
_PREFIX = "first_stage_model."

_LEVELS = 4
SD_VAE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * _LEVELS,
    "up_block_types": ("UpDecoderBlock2D",) * _LEVELS,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
}
"""Arguments of diffusers.AutoencoderKL for the VAE of SD1.5, which SDXL's has the structure of."""


class Decoder:
    """Latent [1, 4, H, W] to picture [3, 8H, 8W] in 0..1, float32 on the CPU.

    `about` says in one line how. The VAE, of the structure `vae` (arguments of AutoencoderKL), is
    read from the file at the first call, and runs on `device` while it fits there.
    """

    def __init__(
        self, file: TensorFile, sdxl: bool, device: torch.device, vae: Mapping[str, Any] = SD_VAE
    ) -> None:
        self._file, self._sdxl, self._device, self._structure = file, sdxl, device, vae
        self._vae: Any = None
        self._with_vae = f"{_PREFIX}decoder.conv_in.weight" in file.tensors
        self.about = (
            f"pictures are decoded by the VAE in {file.path.name}"
            if self._with_vae
            else f"{file.path.name} holds no VAE: pictures are a rough linear preview"
        )

    def __call__(self, latent: Tensor) -> Tensor:
        """The picture of a final latent."""
        if not self._with_vae:
            return self._preview(latent.float().cpu())
        if self._vae is None:
            self._vae = load_vae(self._file, self._structure)
        scale = _SCALE_SDXL if self._sdxl else _SCALE_SD15
        try:
            picture = self._decode(latent.float() / scale)
        except torch.OutOfMemoryError:
            self._device = torch.device("cpu")
            picture = self._decode(latent.float() / scale)
        return (picture[0] / 2 + 0.5).clamp(0, 1)

    def _decode(self, latent: Tensor) -> Tensor:
        torch.nn.Module.to(self._vae, self._device)
        with torch.no_grad():
            picture: Tensor = self._vae.decode(latent.to(self._device), return_dict=False)[0]
        return picture.cpu()

    def _preview(self, latent: Tensor) -> Tensor:
        colours = torch.einsum("blhw,lc->bchw", latent, _SDXL if self._sdxl else _SD15)
        if self._sdxl:
            colours = colours + _SDXL_OFFSET.view(1, 3, 1, 1)
        picture = (colours / 2 + 0.5).clamp(0, 1)
        return interpolate(picture, scale_factor=8, mode="bicubic")[0].clamp(0, 1)


def load_vae(file: TensorFile, structure: Mapping[str, Any]) -> Any:
    """The VAE of a single file, in float32 on the CPU. structure: arguments of AutoencoderKL."""
    from diffusers import AutoencoderKL

    vae: Any = AutoencoderKL(**structure)
    with tempfile.TemporaryDirectory() as folder:
        # Only the VAE's part of the file is handed on, and its configuration: no hub is asked.
        vae.save_config(folder)
        tensors = {name: file.read(name) for name in file.tensors if name.startswith(_PREFIX)}
        loaded: Any = AutoencoderKL.from_single_file(tensors, config=folder)
    torch.nn.Module.to(loaded, torch.float32)  # diffusers' own `to` warns about every cast
    return loaded.eval()
