"""The node that tells what a run did."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from .schema import schema


class EngineReport(io.ComfyNode):  # type: ignore[misc]
    """Passes anything through; its text says what the samplings before it ran on, and how fast."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return schema(
            node_id="SwitchyardReport",
            display_name="Engine Report",
            category="Switchyard",
            description="Wire it after the sampler: shows what ran on the engine, what fell back "
            "and why, times and memory.",
            search_aliases=["switchyard", "why slow", "speed", "report"],
            inputs=[io.AnyType.Input("anything")],
            outputs=[
                io.AnyType.Output(display_name="anything"),
                io.String.Output(display_name="report"),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, anything: Any) -> io.NodeOutput:
        """The same thing, and the report."""
        from ..accel.hosts.comfyui.panel import report

        text = report(cls.hidden.prompt, cls.hidden.unique_id)
        return io.NodeOutput(anything, text, ui=ui.PreviewText(text))
