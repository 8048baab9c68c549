"""Graph optimisation: one rewrite a file, one signature, one ordered list."""

from __future__ import annotations

from collections.abc import Callable

from torch.fx import Graph

from .attention import fuse_attention
from .canonicalize import canonicalize
from .controlnet import fold_controlnet
from .dead_code import remove_dead_code
from .deduplicate import deduplicate
from .epilogue import fuse_epilogues
from .fold_constants import fold_constants
from .geglu import fuse_geglu
from .layout import to_channels_last
from .merge_linears import merge_linears
from .norm_activation import fuse_norm_activation
from .norm_shift import fuse_norm_shift
from .phases import partition_phases
from .pointwise import fuse_pointwise
from .upsample import fold_upsample
from .views import simplify_views

Pass = Callable[[Graph], None]

PASSES: tuple[Pass, ...] = (
    canonicalize,  # ATen as exported -> the small set that later passes know
    fold_constants,  # what depends on no input
    deduplicate,  # the same SiLU of the time embedding, once per residual block
    to_channels_last,  # images are [B, H, W, C] from here on
    simplify_views,
    fuse_attention,
    fuse_geglu,
    fuse_norm_activation,
    fuse_epilogues,  # bias, time embedding, residual
    fold_upsample,  # into the convolution that reads the large image
    merge_linears,  # QKV; every context K and V; every time-embedding projection
    fuse_norm_shift,  # what a convolution adds to every pixel, into the norm that reads it
    fold_controlnet,  # residual adds into the concatenations that read them
    simplify_views,
    fuse_pointwise,  # what is left over between the large operators
    remove_dead_code,
    partition_phases,  # prompt, timestep, step
)


def run_passes(graph: Graph, after: Callable[[str], None] | None = None) -> None:
    """Apply `PASSES` in order, in place. `after(name)` is told of each finished pass."""
    for rewrite in PASSES:
        rewrite(graph)
        graph.lint()
        if after is not None:
            after(rewrite.__name__)
