"""LoRAs by block, as patches of the host's own: they work on any MODEL, accelerated or not."""

from __future__ import annotations

from inspect import signature
from typing import Any

import comfy.sd
import comfy.utils

from ...lora import BlockWeights, block_weights
from ...models import blocks, parameters
from .run import structure_of_model
from .weights import PREFIX


def load_by_block(model: Any, path: str, strength: float, given: BlockWeights) -> Any:
    """The MODEL with a LoRA on its denoiser, `strength` multiplied by the weight of each block.

    given: see `accel.lora.blocks`. Where the weight is 0 nothing is added, not even by formats that
    have no strength. Raises `InvalidInput` for other weights than the model takes, and
    `UnsupportedModel` for networks whose blocks are not known.
    """
    config = structure_of_model(model).config
    assert config is not None
    known = blocks(config)
    weights = block_weights(given, known.names, known.attention)
    by_key = {
        PREFIX + parameter.ldm_name: weights[known.of[name]]
        for name, parameter in parameters(config).items()
        if name in known.of
    }
    state, metadata = comfy.utils.load_torch_file(path, safe_load=True, return_metadata=True)
    # Older hosts do not keep what a file says of itself.
    kept = "lora_metadata" in signature(comfy.sd.load_lora_for_models).parameters
    more = {"lora_metadata": metadata} if kept else {}
    patched, _ = comfy.sd.load_lora_for_models(model, None, state, strength, 0, **more)
    for key, patches in list(patched.patches.items()):
        before, weight = len(model.patches.get(key, ())), by_key.get(key, 1.0)
        added = [(weight * own, *rest) for own, *rest in patches[before:] if weight != 0]
        patched.patches[key] = [*patches[:before], *added]
        if not patched.patches[key]:
            del patched.patches[key]
    return patched
