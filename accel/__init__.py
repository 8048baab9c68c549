"""Switchyard: one compiled engine, every checkpoint.

In use:

    import accel

    session = accel.Session(device="cuda", precision="fp16")
    engine = session.engine(unet)
    noise = engine(latent, timestep, context)
    engine.load_weights("other.safetensors")
    engine.set_loras([("style.safetensors", 0.8)])
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .session import Engine, Session
    from .structure import structure_hash

__all__ = ["Engine", "Session", "structure_hash"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """The public names, imported when first asked for: a host's start must not wait for them."""
    if name in ("Session", "Engine"):
        from . import session

        return getattr(session, name)
    if name == "structure_hash":
        from .structure import structure_hash

        return structure_hash
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
