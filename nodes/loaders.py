"""Loaders whose MODEL is accelerated, and whose weights stay in the mapped file."""

from __future__ import annotations

from typing import Any

import folder_paths
from comfy_api.latest import io

from .accelerate import FIRST_RUN, WAITING
from .schema import schema

PRECISIONS = ["default", "fp8_e4m3fn", "fp8_e4m3fn_fast", "fp8_e5m2"]


class LoadCheckpoint(io.ComfyNode):  # type: ignore[misc]
    """A checkpoint file's MODEL, CLIP and VAE, the MODEL accelerated."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return schema(
            node_id="SwitchyardLoadCheckpoint",
            display_name="Load Checkpoint (Accelerated)",
            category="Switchyard",
            description="Load Checkpoint and Accelerate Model in one. The weights of a "
            ".safetensors file go straight to the engine.",
            search_aliases=["switchyard", "load checkpoint", "faster", "model loader"],
            inputs=[
                io.Combo.Input("ckpt_name", options=folder_paths.get_filename_list("checkpoints")),
                io.Combo.Input("first_run", **FIRST_RUN),
            ],
            outputs=[io.Model.Output(), io.Clip.Output(), io.Vae.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, ckpt_name: str | None, **others: Any) -> str:
        """The MODEL has its weights from the file itself: a file that was replaced is another."""
        return _state_of("checkpoints", ckpt_name)

    @classmethod
    def execute(cls, ckpt_name: str, first_run: str = WAITING[0]) -> io.NodeOutput:
        """MODEL, CLIP, VAE."""
        from ..accel.hosts.comfyui.loaders import load_checkpoint

        path = folder_paths.get_full_path_or_raise("checkpoints", ckpt_name)
        options = _options(cls, ckpt_name, first_run)
        return io.NodeOutput(*load_checkpoint(path, options))


class LoadDiffusionModel(io.ComfyNode):  # type: ignore[misc]
    """A diffusion model file's MODEL, accelerated."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return schema(
            node_id="SwitchyardLoadDiffusionModel",
            display_name="Load Diffusion Model (Accelerated)",
            category="Switchyard",
            description="Load Diffusion Model and Accelerate Model in one. The weights of a "
            ".safetensors file go straight to the engine.",
            search_aliases=["switchyard", "unet loader", "faster", "model loader"],
            inputs=[
                io.Combo.Input(
                    "unet_name", options=folder_paths.get_filename_list("diffusion_models")
                ),
                io.Combo.Input(
                    "weight_dtype", options=PRECISIONS, default=PRECISIONS[0], optional=True
                ),
                io.Combo.Input("first_run", **FIRST_RUN),
            ],
            outputs=[io.Model.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, unet_name: str | None, **others: Any) -> str:
        """The MODEL has its weights from the file itself: a file that was replaced is another."""
        return _state_of("diffusion_models", unet_name)

    @classmethod
    def execute(
        cls, unet_name: str, weight_dtype: str = PRECISIONS[0], first_run: str = WAITING[0]
    ) -> io.NodeOutput:
        """MODEL."""
        from ..accel.hosts.comfyui.loaders import load_diffusion_model

        path = folder_paths.get_full_path_or_raise("diffusion_models", unet_name)
        options = _options(cls, unet_name, first_run)
        return io.NodeOutput(load_diffusion_model(path, weight_dtype, options))


def _state_of(folder: str, name: str | None) -> str:
    from ..accel.hosts.comfyui.loaders import state_of

    return state_of(folder, name)


def _options(node: Any, title: str, first_run: str) -> Any:
    from ..accel.hosts.comfyui.run import Options

    return Options(wait=first_run == WAITING[1], node_id=node.hidden.unique_id, title=title)
