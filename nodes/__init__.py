"""ComfyUI's nodes. Importing this costs little: what the nodes do is imported when they run."""

from __future__ import annotations

import sys
from pathlib import Path

from comfy_api.latest import ComfyExtension, io

from .accelerate import AccelerateControlNet, AccelerateModel
from .audition import AuditionCheckpoints
from .loaders import LoadCheckpoint, LoadDiffusionModel
from .loras import LoadLoraByBlock
from .report import EngineReport


class SwitchyardExtension(ComfyExtension):  # type: ignore[misc]
    """The pack's nodes, and the routes behind its panel."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """All nodes, in the order of the menu. The routes start here: older hosts call no more."""
        try:
            from ..accel.hosts.comfyui import panel
        except ModuleNotFoundError as error:
            file = Path(__file__).parents[1] / "requirements.txt"
            text = f'{error}; to install it: "{sys.executable}" -m pip install -r "{file}"'
            raise ModuleNotFoundError(text, name=error.name) from None
        panel.start()
        return [
            AccelerateModel,
            LoadCheckpoint,
            LoadDiffusionModel,
            LoadLoraByBlock,
            AccelerateControlNet,
            AuditionCheckpoints,
            EngineReport,
        ]
