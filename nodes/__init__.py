"""ComfyUI's nodes. Importing this costs little: what the nodes do is imported when they run."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .accelerate import AccelerateControlNet, AccelerateModel
from .loaders import LoadCheckpoint, LoadDiffusionModel
from .report import EngineReport


class SwitchyardExtension(ComfyExtension):  # type: ignore[misc]
    """The pack's nodes, and the routes behind its panel."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """All nodes, in the order of the menu. The routes start here: older hosts call no more."""
        from ..accel.hosts.comfyui import panel

        panel.start()
        return [
            AccelerateModel,
            LoadCheckpoint,
            LoadDiffusionModel,
            AccelerateControlNet,
            EngineReport,
        ]
