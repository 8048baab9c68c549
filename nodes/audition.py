"""The node that compares checkpoints."""

from __future__ import annotations

from typing import Any

import comfy.samplers
from comfy_api.latest import io, ui

from .accelerate import FIRST_RUN, WAITING
from .schema import schema

LARGEST = 16384
"""Pixels of a side, as the host's own nodes have it."""


class AuditionCheckpoints(io.ComfyNode):  # type: ignore[misc]
    """One prompt and seed by many checkpoints: their pictures, and a contact sheet of them."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return schema(
            node_id="SwitchyardAuditionCheckpoints",
            display_name="Audition Checkpoints (Accelerated)",
            category="Switchyard",
            description="Paints one prompt and seed with every checkpoint of a folder. Those of "
            "one structure share an engine, and the next is read while one paints.",
            search_aliases=["switchyard", "compare checkpoints", "xy plot", "contact sheet"],
            inputs=[
                io.String.Input(
                    "checkpoints",
                    default="*",
                    tooltip="A folder in the checkpoints folder, names, or patterns such as "
                    "sdxl/*, between commas.",
                ),
                io.String.Input("positive", multiline=True, dynamic_prompts=True, default=""),
                io.String.Input(
                    "negative", multiline=True, dynamic_prompts=True, default="", optional=True
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    optional=True,
                ),
                io.Int.Input("steps", default=20, min=1, max=10000, optional=True),
                io.Float.Input("cfg", default=7.0, min=0.0, max=100.0, step=0.1, optional=True),
                io.Combo.Input(
                    "sampler_name",
                    options=comfy.samplers.KSampler.SAMPLERS,
                    default="euler",
                    optional=True,
                ),
                io.Combo.Input(
                    "scheduler",
                    options=comfy.samplers.KSampler.SCHEDULERS,
                    default="normal",
                    optional=True,
                ),
                io.Int.Input("width", default=1024, min=16, max=LARGEST, step=8, optional=True),
                io.Int.Input("height", default=1024, min=16, max=LARGEST, step=8, optional=True),
                io.Combo.Input("first_run", **FIRST_RUN),
                io.Latent.Input(
                    "latent_image",
                    optional=True,
                    tooltip="Takes the place of width and height. A batch gives several pictures "
                    "by each checkpoint.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="images"),
                io.Image.Output(display_name="sheet"),
                io.String.Output(display_name="report"),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, checkpoints: str | None, **others: Any) -> str:
        """Files come and go while the inputs stay the same."""
        from ..accel.hosts.comfyui.audition import state_of

        return state_of(checkpoints)

    @classmethod
    def execute(
        cls,
        checkpoints: str,
        positive: str,
        negative: str = "",
        seed: int = 0,
        steps: int = 20,
        cfg: float = 7.0,
        sampler_name: str = "euler",
        scheduler: str = "normal",
        width: int = 1024,
        height: int = 1024,
        first_run: str = WAITING[0],
        latent_image: Any = None,
    ) -> io.NodeOutput:
        """The pictures, the sheet, and a line about each checkpoint."""
        from ..accel.hosts.comfyui.audition import Request, audition, blank
        from ..accel.hosts.comfyui.run import Options

        latent = blank(width, height) if latent_image is None else latent_image
        request = Request(positive, negative, seed, steps, cfg, sampler_name, scheduler, latent)
        options = Options(wait=first_run == WAITING[1], node_id=cls.hidden.unique_id)
        result = audition(checkpoints, request, options)
        shown = ui.PreviewImage(result.sheet, cls=cls)
        return io.NodeOutput(result.pictures, result.sheet, result.text, ui=shown)
