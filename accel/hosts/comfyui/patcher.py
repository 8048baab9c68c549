"""The accelerated MODEL: a clone of the host's patcher that lets an engine do the denoising.

It stays a patcher of the host's own class in everything: LoRAs, merges, saving, unloading. Only
while a sampling is set up that runs on the engine does it keep its own weights off the device,
since the engine has them there.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP

from .decide import unsupported_model
from .journal import journal
from .run import KEY, Acceleration, Options

logger = logging.getLogger(__name__)

CPU = torch.device("cpu")


class EngineMixin:
    """A patcher whose weights stay on the CPU for the samplings of its `Acceleration`."""

    @property
    def acceleration(self: Any) -> Acceleration | None:
        """How it is accelerated; shared by all clones."""
        # Older hosts ask for the size while a clone is made, before it has attachments.
        return getattr(self, "attachments", {}).get(KEY)

    def _on_engine(self: Any) -> bool:
        acceleration = self.acceleration
        return acceleration is not None and acceleration.loading_for_engine

    def model_size(self: Any) -> int:
        """Bytes of the weights; none are needed while the engine has them."""
        if self._on_engine():
            return 0
        return super().model_size()  # type: ignore[misc]

    def partially_load(
        self: Any, device_to: Any, extra_memory: float = 0, force_patch_weights: bool = False
    ) -> Any:
        """As the host does, or without weights where the engine has them."""
        if not self._on_engine() or force_patch_weights:
            return super().partially_load(  # type: ignore[misc]
                device_to, extra_memory, force_patch_weights=force_patch_weights
            )
        with self.use_ejected(skip_and_inject_on_exit_only=True):
            self.unload_weights()
            # What a clone that shares the network put in place of its objects.
            self.unpatch_model(self.offload_device, unpatch_weights=False)
            self.patch_model(load_weights=False)
            # All but the network: from tables on the CPU the sampler would wait in every step.
            for child in self.model.children():
                if child is not self.model.diffusion_model:
                    child.to(device_to)
        return 0

    def detach(self: Any, unpatch_all: bool = True) -> Any:
        """As the host does, but what the engine took off the device stays off.

        With --highvram the device is also where the host puts weights that it unloads.
        """
        offload_device = self.offload_device
        if unpatch_all and not self.weights_loaded():
            self.offload_device = CPU
        try:
            return super().detach(unpatch_all)  # type: ignore[misc]
        finally:
            self.offload_device = offload_device

    def weights_loaded(self: Any) -> bool:
        """Whether weights are on the device, or patched."""
        model = self.model
        loaded = model.model_loaded_weight_memory > 0 or model.model_lowvram or self.backup
        return bool(loaded) or next(model.diffusion_model.parameters()).device != CPU

    def unload_weights(self: Any) -> None:
        """Take the weights off the device, unpatched, wherever the host would leave them."""
        if hasattr(self, "is_dynamic") and self.is_dynamic():
            # Pages of the device, and the small weights beside them; the file stays mapped.
            self.partially_unload(None, 1e32)
        elif self.weights_loaded():
            self.unpatch_model(CPU, unpatch_weights=True)


@lru_cache(maxsize=16)
def _engine_class(base: type) -> type:
    return type(f"Engine{base.__name__}", (EngineMixin, base), {})


def accelerate(model: Any, options: Options) -> Any:
    """A clone of a MODEL whose samplings run on an engine wherever they can.

    A MODEL that is not supported comes back itself, untouched; the reason is said on the node.
    """
    reason = unsupported_model(model)
    if reason is not None:
        line = f"not accelerated: {reason}"
        logger.info("%s: %s", options.title, line)
        journal().status(options.node_id, "off", line)
        return model
    return accelerated(model, Acceleration(options))


def accelerated(model: Any, acceleration: Acceleration) -> Any:
    """A clone of a supported MODEL with the wrappers of `acceleration` on it."""
    clone = model.clone()
    if not isinstance(clone, EngineMixin):
        kind: Any = type(clone)
        clone.__class__ = _engine_class(kind)
    clone.set_attachments(KEY, acceleration)
    for kind, wrapper in (
        (WrappersMP.OUTER_SAMPLE, acceleration.outer_sample),
        (WrappersMP.PREPARE_SAMPLING, acceleration.prepare_sampling),
        (WrappersMP.SAMPLER_SAMPLE, acceleration.sampler_sample),
        (WrappersMP.CALC_COND_BATCH, acceleration.calc_cond_batch),
        (WrappersMP.APPLY_MODEL, acceleration.apply_model),
        (WrappersMP.DIFFUSION_MODEL, acceleration.diffusion_model),
    ):
        clone.remove_wrappers_with_key(kind, KEY)
        clone.add_wrapper_with_key(kind, KEY, wrapper)
    return clone
