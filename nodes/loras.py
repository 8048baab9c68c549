"""Loading a LoRA with a strength for each block of the UNet."""

from __future__ import annotations

from typing import Any

import folder_paths
from comfy_api.latest import io

from .schema import schema


class LoadLoraByBlock(io.ComfyNode):  # type: ignore[misc]
    """MODEL to MODEL, with a LoRA on it whose strength differs by block."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return schema(
            node_id="SwitchyardLoadLoraByBlock",
            display_name="Load LoRA by Block",
            category="Switchyard",
            description="Load LoRA (Model), with a weight for each block of the UNet as A1111's "
            "LoRA Block Weight has them. Works with and without an engine.",
            search_aliases=["switchyard", "lora block weight", "lbw", "lora by layer"],
            inputs=[
                io.Model.Input("model"),
                io.Combo.Input("lora_name", options=folder_paths.get_filename_list("loras")),
                io.Float.Input(
                    "strength_model", default=1.0, min=-100.0, max=100.0, step=0.01, optional=True
                ),
                io.String.Input(
                    "block_weights",
                    default="ALL",
                    optional=True,
                    tooltip="17 or 26 numbers for SD1.5, 12 or 20 for SDXL, between commas, the "
                    "first of them unused; or NONE, ALL, INS, IND, INALL, MIDD, OUTD, OUTS, "
                    "OUTALL or ALL0.5.",
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(
        cls, model: Any, lora_name: str, strength_model: float = 1.0, block_weights: str = "ALL"
    ) -> io.NodeOutput:
        """MODEL."""
        from ..accel.hosts.comfyui.loras import load_by_block

        path = folder_paths.get_full_path_or_raise("loras", lora_name)
        return io.NodeOutput(load_by_block(model, path, strength_model, block_weights))
