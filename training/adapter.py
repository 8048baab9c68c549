"""A LoRA to train: low-rank factors beside layers of a UNet, and their names in kohya's files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

RANK = 8
ALPHA = 8.0


class Adapter(nn.Module):
    """The two factors that kohya's LoRA adds to a linear layer or a convolution."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        if isinstance(layer, nn.Conv2d):
            self.down: nn.Module = nn.Conv2d(
                layer.in_channels,
                RANK,
                layer.kernel_size,  # type: ignore[arg-type]
                layer.stride,  # type: ignore[arg-type]
                layer.padding,  # type: ignore[arg-type]
                bias=False,
            )
            self.up: nn.Module = nn.Conv2d(RANK, layer.out_channels, 1, bias=False)
        else:
            assert isinstance(layer, nn.Linear)
            self.down = nn.Linear(layer.in_features, RANK, bias=False)
            self.up = nn.Linear(RANK, layer.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """What the adapter adds to the layer's output for the input `x`."""
        added: Tensor = self.up(self.down(x))
        return ALPHA / RANK * added


def adapters(unet: nn.Module) -> nn.ModuleDict:
    """One for each layer of the transformers, and for the up path's convolutions.

    Keys are the layers' paths in kohya's spelling.
    """
    found = nn.ModuleDict()
    for path, layer in unet.named_modules():
        linear = isinstance(layer, nn.Linear) and ".transformer_blocks." in path
        projection = path.endswith((".proj_in", ".proj_out"))
        convolution = "up_blocks." in path and path.endswith((".conv1", ".conv2"))
        if linear or projection or convolution:
            found[_kohya(path)] = Adapter(layer)
    return found


@contextmanager
def adapted(unet: nn.Module, with_adapters: nn.ModuleDict) -> Iterator[None]:
    """The UNet with LoRA adapters at work while the block runs."""

    def adding(adapter: nn.Module) -> Callable[..., Tensor]:
        return lambda layer, inputs, output: output + adapter(inputs[0])

    hooks = [
        layer.register_forward_hook(adding(with_adapters[_kohya(path)]))
        for path, layer in unet.named_modules()
        if _kohya(path) in with_adapters
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def kohya(factors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A trained ModuleDict's state as a LoRA file's tensors."""
    names = {"down.weight": "lora_down.weight", "up.weight": "lora_up.weight"}
    found = {}
    for name, tensor in factors.items():
        layer, _, factor = name.partition(".")
        found[f"{layer}.{names[factor]}"] = tensor
        found[f"{layer}.alpha"] = torch.tensor(ALPHA)
    return found


def _kohya(path: str) -> str:
    return "lora_unet_" + path.replace(".", "_")
