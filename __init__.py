"""Root of the pack as ComfyUI loads it: a custom node folder is imported under its own path.

Importing it costs nothing and pulls in neither torch nor the host.
"""

from __future__ import annotations

from typing import Any

WEB_DIRECTORY = "./web"


async def comfy_entrypoint() -> Any:
    """The extension that ComfyUI asks for its nodes."""
    from .nodes import SwitchyardExtension

    return SwitchyardExtension()
