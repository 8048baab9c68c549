"""Twenty steps of DDIM with classifier-free guidance, the same whoever runs the network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Forward = Callable[..., Any]
"""A network called as diffusers' modules are; an engine is called alike."""


@dataclass(frozen=True)
class Conditioning:
    """What is wished for and what guidance moves away from, a batch of 2: nothing, then the prompt.

    context: [2, tokens, width]. added: diffusers' `added_cond_kwargs` of SDXL, a batch of 2 too.
    """

    context: Tensor
    added: dict[str, Tensor] | None = None

    def to(self, device: torch.device, dtype: torch.dtype) -> Conditioning:
        """On a device, in the network's dtype."""
        added = self.added and {name: t.to(device, dtype) for name, t in self.added.items()}
        return Conditioning(self.context.to(device, dtype), added)


def scheduler() -> Any:
    """Diffusers' DDIM with the noise schedule that SD1.5 and SDXL were trained with."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        timestep_spacing="trailing",
    )


def sample(
    unet: Forward,
    controlnet: Forward | None,
    noise: Tensor,
    conditioning: Conditioning,
    hint: Tensor | None,
    steps: int,
    guidance: float,
    step_done: Callable[[], None] = lambda: None,
) -> Tensor:
    """The final latent [1, 4, H, W] in float32, from `noise` of that shape.

    The networks run in the dtype and on the device of `conditioning`. hint: [1, 3, 8H, 8W].
    """
    ddim = scheduler()
    ddim.set_timesteps(steps)
    context = conditioning.context
    latent = noise.to(context.device, torch.float32) * ddim.init_noise_sigma
    hints = None if hint is None else torch.cat([hint, hint]).to(context)
    for number in ddim.timesteps.tolist():
        timestep = torch.tensor(number, device=context.device)
        inputs = torch.cat([latent, latent]).to(context.dtype)
        extra: dict[str, Any] = {}
        if conditioning.added is not None:
            extra["added_cond_kwargs"] = conditioning.added
        if controlnet is not None:
            skips, middle = controlnet(
                inputs,
                timestep,
                encoder_hidden_states=context,
                controlnet_cond=hints,
                return_dict=False,
                **extra,
            )
            extra["down_block_additional_residuals"] = skips
            extra["mid_block_additional_residual"] = middle
        result = unet(inputs, timestep, encoder_hidden_states=context, return_dict=False, **extra)
        # Diffusers' modules return a tuple, an engine the tensor itself.
        noise_guess = result if isinstance(result, Tensor) else result[0]
        away, wished = noise_guess.float().chunk(2)
        guess = away + guidance * (wished - away)
        latent = ddim.step(guess, number, latent).prev_sample
        step_done()
    return latent
