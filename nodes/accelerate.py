"""The nodes that put an engine behind a MODEL or a CONTROL_NET."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .schema import schema

WAITING = ["don't wait", "wait"]

FIRST_RUN = {
    "options": WAITING,
    "default": WAITING[0],
    "optional": True,  # prompts written by hand may leave it out
    "tooltip": "What happens when this network structure has no engine yet: render on ComfyUI's "
    "own path while it is built in the background, or wait for it.",
}


class AccelerateModel(io.ComfyNode):  # type: ignore[misc]
    """MODEL to MODEL: samplings of what comes out run on an engine."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return schema(
            node_id="SwitchyardAccelerate",
            display_name="Accelerate Model",
            category="Switchyard",
            description="Runs the sampling on an engine that all checkpoints of this structure "
            "share. LoRAs, ControlNets and sizes may change at any time. Put it anywhere between "
            "the loader and the sampler.",
            search_aliases=["switchyard", "speed up", "faster", "accelerate", "engine", "tensorrt"],
            inputs=[
                io.Model.Input("model"),
                io.Combo.Input("first_run", **FIRST_RUN),
                io.Boolean.Input(
                    "compare_once",
                    default=False,
                    optional=True,
                    tooltip="Repeat the next sampling on ComfyUI's own path, and say how close "
                    "the engine is.",
                ),
            ],
            outputs=[io.Model.Output()],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
        )

    @classmethod
    def execute(
        cls, model: Any, first_run: str = WAITING[0], compare_once: bool = False
    ) -> io.NodeOutput:
        """The accelerated MODEL; the same MODEL where it is not supported, with the reason."""
        from ..accel.hosts.comfyui.patcher import accelerate
        from ..accel.hosts.comfyui.run import Options

        options = Options(
            wait=first_run == WAITING[1],
            compare=compare_once,
            node_id=cls.hidden.unique_id,
            title=title_of(cls.hidden.prompt, cls.hidden.unique_id, "model"),
        )
        return io.NodeOutput(accelerate(model, options))


class AccelerateControlNet(io.ComfyNode):  # type: ignore[misc]
    """CONTROL_NET to CONTROL_NET: the net runs on an engine of its own."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return schema(
            node_id="SwitchyardAccelerateControlNet",
            display_name="Accelerate ControlNet",
            category="Switchyard",
            description="Runs the ControlNet on an engine. Put it between its loader and Apply "
            "ControlNet.",
            search_aliases=["switchyard", "speed up", "faster", "controlnet"],
            inputs=[
                io.ControlNet.Input("control_net"),
                io.Combo.Input("first_run", **FIRST_RUN),
            ],
            outputs=[io.ControlNet.Output()],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
        )

    @classmethod
    def execute(cls, control_net: Any, first_run: str = WAITING[0]) -> io.NodeOutput:
        """The accelerated CONTROL_NET; the same where it is not supported, with the reason."""
        from ..accel.hosts.comfyui.controlnet import accelerate_controlnet
        from ..accel.hosts.comfyui.run import Options

        options = Options(
            wait=first_run == WAITING[1],
            node_id=cls.hidden.unique_id,
            title=title_of(cls.hidden.prompt, cls.hidden.unique_id, "control_net"),
        )
        return io.NodeOutput(accelerate_controlnet(control_net, options))


def title_of(prompt: Any, node_id: str | None, name: str) -> str:
    """The file behind an input, found upstream in the prompt; the input's name if there is none."""
    seen: set[str] = set()
    while prompt and node_id in prompt and node_id not in seen:
        seen.add(node_id)
        inputs = prompt[node_id].get("inputs", {})
        for key in ("ckpt_name", "unet_name", "control_net_name"):
            if isinstance(inputs.get(key), str):
                return str(inputs[key])
        link = inputs.get(name)
        node_id = str(link[0]) if isinstance(link, list) and link else None
    return name
