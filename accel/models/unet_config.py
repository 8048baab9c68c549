"""The architecture of a Stable Diffusion UNet or ControlNet as plain data, and its parameter names.

One walk over the architecture (`_Walk`) yields every parameter under both of its names: the
canonical one (diffusers) and the one of single-file checkpoints (ldm). Everything else here, such
as reading an architecture back from a file or the spellings of LoRA targets, rests on that walk.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from typing import Any, Literal

from ..errors import UnsupportedModel

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Parameter:
    """One parameter: its shape and its name in ldm files, without the prefix of the network."""

    shape: Shape
    ldm_name: str


@dataclass(frozen=True)
class UNetConfig:
    """Normalised architecture, equal for the same network in diffusers, ComfyUI and a file.

    Levels are resolutions, finest first. `down_depths[level][i]` is the number of transformer
    blocks after resnet `i` (0: none); `up_depths` is in order of execution, coarsest level first.
    `mid_depth` is -1 where the middle is one resnet without attention. `heads` is None where a
    file cannot tell. `pooled_dim` is the width of SDXL's pooled vector, whose sinusoidal part has
    `addition_time_embed_dim` channels per number. Fields that have no effect (heads of a level
    without attention, the context width of a network without any) are set to fixed values, so
    that equal networks compare equal.

    Raises ValueError where the fields contradict each other.
    """

    kind: Literal["unet", "controlnet"]
    in_channels: int
    out_channels: int
    block_out_channels: tuple[int, ...]
    layers_per_block: tuple[int, ...]
    down_depths: tuple[tuple[int, ...], ...]
    mid_depth: int
    up_depths: tuple[tuple[int, ...], ...]
    heads: tuple[int, ...] | None
    context_dim: int
    linear_projection: bool
    pooled_dim: int | None
    time_embed_dim: int
    addition_time_embed_dim: int | None = None
    norm_groups: int = 32
    norm_eps: float = 1e-5
    act: str = "silu"
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    hint_channels: int | None = None
    hint_block_channels: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        levels = len(self.block_out_channels)
        layers = self.layers_per_block
        if levels == 0 or len(layers) != levels or len(self.down_depths) != levels:
            raise ValueError("channels, layers and depths must be given for each level")
        if any(len(d) != n for d, n in zip(self.down_depths, layers, strict=True)):
            raise ValueError("down_depths needs one depth per resnet")
        if self.mid_depth != -1 and self.mid_depth < 1:
            raise ValueError("mid_depth is -1, or the depth of one transformer")
        if self.kind == "unet":
            if [len(d) for d in self.up_depths] != [n + 1 for n in reversed(layers)]:
                raise ValueError("up_depths needs one depth per resnet of the up path")
        elif self.up_depths or self.hint_channels is None or len(self.hint_block_channels) < 1:
            raise ValueError("a ControlNet has a hint block and no up path")
        if self.heads is not None and len(self.heads) != levels:
            raise ValueError("heads needs one number per level")
        self._normalise()

    def _normalise(self) -> None:
        attended = [self.has_attention(level) for level in range(len(self.block_out_channels))]
        if not any(attended):
            object.__setattr__(self, "heads", tuple(1 for _ in attended))
            object.__setattr__(self, "context_dim", 0)
            object.__setattr__(self, "linear_projection", False)
        elif self.heads is not None:
            # A level without attention takes the head width of the nearest level that has it.
            known = [level for level, has in enumerate(attended) if has]
            heads = []
            for level, channels in enumerate(self.block_out_channels):
                near = min(known, key=lambda other: (abs(other - level), other))
                width = self.block_out_channels[near] // self.heads[near]
                heads.append(self.heads[level] if attended[level] else max(1, channels // width))
            object.__setattr__(self, "heads", tuple(heads))
        if self.kind == "controlnet":
            object.__setattr__(self, "out_channels", self.in_channels)
        if self.pooled_dim is None:
            object.__setattr__(self, "addition_time_embed_dim", None)
        elif self.addition_time_embed_dim is None:
            object.__setattr__(self, "addition_time_embed_dim", 256)

    def has_attention(self, level: int) -> bool:
        """Whether any transformer runs at this resolution, the middle block included."""
        last = len(self.block_out_channels) - 1
        depths = list(self.down_depths[level])
        if self.up_depths:
            depths += self.up_depths[last - level]
        if level == last:
            depths.append(self.mid_depth)
        return any(depth > 0 for depth in depths)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; `from_json` gives an equal object."""
        return {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> UNetConfig:
        """Inverse of `to_json`. Raises ValueError for unknown, missing or contradictory fields."""
        try:
            return cls(**{name: _frozen(value) for name, value in data.items()})
        except TypeError as error:
            raise ValueError(f"not an architecture: {error}") from None


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, (list, tuple)) else value


@dataclass(frozen=True)
class TransformerSite:
    """Where a transformer stands: its canonical and ldm path, its level and its depth."""

    name: str
    ldm_name: str
    level: int
    depth: int


class _Walk:
    """Visits every layer in the order of execution and collects parameters and transformers."""

    def __init__(self, config: UNetConfig) -> None:
        self.config = config
        self.parameters: dict[str, Parameter] = {}
        self.transformers: list[TransformerSite] = []
        self._embeddings()
        self._conv("conv_in", "input_blocks.0.0", config.in_channels, config.block_out_channels[0])
        skips = self._down()
        self._mid()
        if config.kind == "unet":
            self._up(skips)
            self._norm("conv_norm_out", "out.0", config.block_out_channels[0])
            self._conv("conv_out", "out.2", config.block_out_channels[0], config.out_channels)
        else:
            self._control(skips)

    def _add(self, name: str, ldm: str, shape: Shape, bias: bool = True) -> None:
        self.parameters[f"{name}.weight"] = Parameter(shape, f"{ldm}.weight")
        if bias:
            self.parameters[f"{name}.bias"] = Parameter(shape[:1], f"{ldm}.bias")

    def _linear(self, name: str, ldm: str, inner: int, outer: int, bias: bool = True) -> None:
        self._add(name, ldm, (outer, inner), bias)

    def _conv(self, name: str, ldm: str, inner: int, outer: int, kernel: int = 3) -> None:
        self._add(name, ldm, (outer, inner, kernel, kernel))

    def _norm(self, name: str, ldm: str, channels: int) -> None:
        self._add(name, ldm, (channels,))

    def _embeddings(self) -> None:
        config, width = self.config, self.config.time_embed_dim
        self._linear("time_embedding.linear_1", "time_embed.0", config.block_out_channels[0], width)
        self._linear("time_embedding.linear_2", "time_embed.2", width, width)
        if config.pooled_dim is not None:
            self._linear("add_embedding.linear_1", "label_emb.0.0", config.pooled_dim, width)
            self._linear("add_embedding.linear_2", "label_emb.0.2", width, width)

    def _resnet(self, name: str, ldm: str, inner: int, outer: int) -> None:
        self._norm(f"{name}.norm1", f"{ldm}.in_layers.0", inner)
        self._conv(f"{name}.conv1", f"{ldm}.in_layers.2", inner, outer)
        time = self.config.time_embed_dim
        self._linear(f"{name}.time_emb_proj", f"{ldm}.emb_layers.1", time, outer)
        self._norm(f"{name}.norm2", f"{ldm}.out_layers.0", outer)
        self._conv(f"{name}.conv2", f"{ldm}.out_layers.3", outer, outer)
        if inner != outer:
            self._conv(f"{name}.conv_shortcut", f"{ldm}.skip_connection", inner, outer, kernel=1)

    def _transformer(self, name: str, ldm: str, level: int, depth: int) -> None:
        channels, context = self.config.block_out_channels[level], self.config.context_dim
        self.transformers.append(TransformerSite(name, ldm, level, depth))
        projection = (
            (channels, channels) if self.config.linear_projection else (channels,) * 2 + (1, 1)
        )
        self._norm(f"{name}.norm", f"{ldm}.norm", channels)
        self._add(f"{name}.proj_in", f"{ldm}.proj_in", projection)
        for index in range(depth):
            # Inside a transformer block both namings agree.
            tail = f"transformer_blocks.{index}"
            for attention, source in (("attn1", channels), ("attn2", context)):
                layer = f"{tail}.{attention}"
                for part, width in (("to_q", channels), ("to_k", source), ("to_v", source)):
                    self._linear(
                        f"{name}.{layer}.{part}", f"{ldm}.{layer}.{part}", width, channels, False
                    )
                self._linear(
                    f"{name}.{layer}.to_out.0", f"{ldm}.{layer}.to_out.0", channels, channels
                )
            for norm in ("norm1", "norm2", "norm3"):
                self._norm(f"{name}.{tail}.{norm}", f"{ldm}.{tail}.{norm}", channels)
            # GEGLU: value and gate in one projection.
            gate, out = f"{tail}.ff.net.0.proj", f"{tail}.ff.net.2"
            self._linear(f"{name}.{gate}", f"{ldm}.{gate}", channels, 8 * channels)
            self._linear(f"{name}.{out}", f"{ldm}.{out}", 4 * channels, channels)
        self._add(f"{name}.proj_out", f"{ldm}.proj_out", projection)

    def _down(self) -> list[int]:
        """Returns the channels of every skip connection, in the order of execution."""
        config = self.config
        channels, block = config.block_out_channels[0], 1
        skips = [channels]
        for level, width in enumerate(config.block_out_channels):
            for index, depth in enumerate(config.down_depths[level]):
                name = f"down_blocks.{level}"
                self._resnet(f"{name}.resnets.{index}", f"input_blocks.{block}.0", channels, width)
                if depth:
                    ldm = f"input_blocks.{block}.1"
                    self._transformer(f"{name}.attentions.{index}", ldm, level, depth)
                channels = width
                skips.append(channels)
                block += 1
            if level + 1 < len(config.block_out_channels):
                name = f"down_blocks.{level}.downsamplers.0.conv"
                self._conv(name, f"input_blocks.{block}.0.op", channels, channels)
                skips.append(channels)
                block += 1
        return skips

    def _mid(self) -> None:
        level = len(self.config.block_out_channels) - 1
        channels = self.config.block_out_channels[level]
        self._resnet("mid_block.resnets.0", "middle_block.0", channels, channels)
        if self.config.mid_depth > 0:
            depth = self.config.mid_depth
            self._transformer("mid_block.attentions.0", "middle_block.1", level, depth)
            self._resnet("mid_block.resnets.1", "middle_block.2", channels, channels)

    def _up(self, skips: list[int]) -> None:
        config = self.config
        last = len(config.block_out_channels) - 1
        channels, block = config.block_out_channels[last], 0
        for step, depths in enumerate(config.up_depths):
            level = last - step
            width = config.block_out_channels[level]
            for index, depth in enumerate(depths):
                name, ldm = f"up_blocks.{step}", f"output_blocks.{block}"
                inner = channels + skips.pop()
                self._resnet(f"{name}.resnets.{index}", f"{ldm}.0", inner, width)
                if depth:
                    self._transformer(f"{name}.attentions.{index}", f"{ldm}.1", level, depth)
                channels = width
                if level and index + 1 == len(depths):
                    ldm = f"{ldm}.{2 if depth else 1}.conv"
                    self._conv(f"{name}.upsamplers.0.conv", ldm, channels, channels)
                block += 1

    def _control(self, skips: list[int]) -> None:
        config, name, ldm = self.config, "controlnet_cond_embedding", "input_hint_block"
        hint = config.hint_block_channels
        assert config.hint_channels is not None
        self._conv(f"{name}.conv_in", f"{ldm}.0", config.hint_channels, hint[0])
        inner, block = hint[0], 0
        for outer in hint[1:]:
            for width in (inner, outer):
                # The ldm list counts the activations between the convolutions as well.
                self._conv(f"{name}.blocks.{block}", f"{ldm}.{2 * block + 2}", inner, width)
                block += 1
            inner = outer
        outer = config.block_out_channels[0]
        self._conv(f"{name}.conv_out", f"{ldm}.{2 * block + 2}", inner, outer)
        for index, width in enumerate(skips):
            name, ldm = f"controlnet_down_blocks.{index}", f"zero_convs.{index}.0"
            self._conv(name, ldm, width, width, kernel=1)
        width = config.block_out_channels[-1]
        self._conv("controlnet_mid_block", "middle_block_out.0", width, width, kernel=1)


@lru_cache(maxsize=64)
def _walk(config: UNetConfig) -> _Walk:
    return _Walk(config)


def parameters(config: UNetConfig) -> dict[str, Parameter]:
    """Every parameter of the network: canonical (diffusers) name -> shape and ldm name."""
    return dict(_walk(config).parameters)


def transformers(config: UNetConfig) -> tuple[TransformerSite, ...]:
    """Every transformer of the network in the order of execution."""
    return tuple(_walk(config).transformers)


def adapter_names(config: UNetConfig) -> dict[str, str]:
    """Spellings under which LoRA files name a target layer -> its canonical weight name.

    For every linear, convolution and norm: the dotted diffusers path, the dotted ldm path, and both
    with `_` for `.`; the output projection of an attention also without its trailing `.0`.
    """
    names: dict[str, str] = {}
    for name, parameter in _walk(config).parameters.items():
        if not name.endswith(".weight"):
            continue
        for path in (name, parameter.ldm_name):
            path = path.removesuffix(".weight")
            spellings = [path]
            if path.endswith(".to_out.0"):
                spellings.append(path.removesuffix(".0"))
            for spelling in spellings:
                names[spelling] = name
                names[spelling.replace(".", "_")] = name
    return names


_BLOCK = re.compile(r"(input|middle|output)_blocks?\.(\d+)")
_BLOCK_LETTERS = {"input": "IN", "middle": "M", "output": "OUT"}


@dataclass(frozen=True)
class Blocks:
    """The blocks of a network as single-file checkpoints count them: IN00, IN01, …, M00, OUT00, …

    of:        canonical parameter name -> its block; not of parameters outside of all
    names:     all blocks in the order of execution
    attention: those with attention
    """

    of: Mapping[str, str]
    names: tuple[str, ...]
    attention: tuple[str, ...]


@lru_cache(maxsize=32)
def blocks(config: UNetConfig) -> Blocks:
    """The blocks of a network."""
    of: dict[str, str] = {}
    inside = set()
    for name, parameter in _walk(config).parameters.items():
        match = _BLOCK.match(parameter.ldm_name)
        if match:
            number = 0 if match[1] == "middle" else int(match[2])
            of[name] = f"{_BLOCK_LETTERS[match[1]]}{number:02}"
            if "transformer_blocks" in name:
                inside.add(of[name])
    names = tuple(dict.fromkeys(of.values()))
    return Blocks(of, names, tuple(name for name in names if name in inside))


def infer_config(shapes: Mapping[str, Shape]) -> UNetConfig | None:
    """Reads the architecture from the names and shapes of a diffusers- or ldm-named network.

    `shapes` must hold exactly the network's tensors, its prefix stripped. Returns None for
    anything else, also where one tensor is missing, superfluous or of another shape. Heads are
    None, and groups, eps and activation keep the defaults: a file does not say.
    """
    ldm = "input_blocks.0.0.weight" in shapes
    try:
        config = _infer_ldm(shapes) if ldm else _infer_diffusers(shapes)
    except (KeyError, IndexError, ValueError):
        return None
    found = _walk(config).parameters
    if len(found) != len(shapes):
        return None
    for name, parameter in found.items():
        if tuple(shapes.get(parameter.ldm_name if ldm else name, ())) != parameter.shape:
            return None
    return config


def diffusers_kwargs(config: UNetConfig) -> dict[str, Any]:
    """Constructor arguments of diffusers' UNet2DConditionModel or ControlNetModel.

    Raises UnsupportedModel where that class cannot express the architecture, or heads are None.
    """
    if config.heads is None:
        raise UnsupportedModel("the number of attention heads is unknown: give the module itself")
    last = len(config.block_out_channels) - 1
    down = [_block_depth(depths, f"down block {i}") for i, depths in enumerate(config.down_depths)]
    up = [_block_depth(depths, f"up block {i}") for i, depths in enumerate(config.up_depths)]
    # The middle block reads its depth from the coarsest level, which may itself have no attention.
    per_level = [depth or 1 for depth in down]
    if down[last] == 0:
        per_level[last] = config.mid_depth if config.mid_depth > 0 else 1
    first = per_level[last] if isinstance(per_level[last], int) else config.down_depths[last][0]
    if config.mid_depth > 0 and first != config.mid_depth:
        raise UnsupportedModel(
            f"diffusers has no UNet whose middle is {config.mid_depth} and last level {first} deep"
        )
    kwargs: dict[str, Any] = {
        "in_channels": config.in_channels,
        "block_out_channels": config.block_out_channels,
        "layers_per_block": config.layers_per_block,
        "down_block_types": tuple("CrossAttnDownBlock2D" if d else "DownBlock2D" for d in down),
        "mid_block_type": "UNetMidBlock2DCrossAttn" if config.mid_depth > 0 else "UNetMidBlock2D",
        "transformer_layers_per_block": tuple(per_level),
        # Despite its name this is the number of heads.
        "attention_head_dim": config.heads,
        "cross_attention_dim": config.context_dim or 1,
        "use_linear_projection": config.linear_projection,
        "norm_num_groups": config.norm_groups,
        "norm_eps": config.norm_eps,
        "act_fn": config.act,
        "flip_sin_to_cos": config.flip_sin_to_cos,
        "freq_shift": config.freq_shift,
    }
    if config.pooled_dim is not None:
        kwargs["addition_embed_type"] = "text_time"
        kwargs["addition_time_embed_dim"] = config.addition_time_embed_dim
        kwargs["projection_class_embeddings_input_dim"] = config.pooled_dim
    usual_width = 4 * config.block_out_channels[0]
    if config.kind == "controlnet":
        if len(set(config.layers_per_block)) > 1 or config.time_embed_dim != usual_width:
            raise UnsupportedModel("diffusers has no ControlNet of this architecture")
        kwargs["layers_per_block"] = config.layers_per_block[0]
        kwargs["conditioning_channels"] = config.hint_channels
        kwargs["conditioning_embedding_out_channels"] = config.hint_block_channels
        return kwargs
    kwargs["out_channels"] = config.out_channels
    kwargs["up_block_types"] = tuple("CrossAttnUpBlock2D" if d else "UpBlock2D" for d in up)
    if config.time_embed_dim != usual_width:
        kwargs["time_embedding_dim"] = config.time_embed_dim
    mirrored = [per_level[last - i] if depth else 0 for i, depth in enumerate(up)]
    if up != mirrored:
        kwargs["reverse_transformer_layers_per_block"] = tuple(depth or 1 for depth in up)
    return kwargs


def _block_depth(depths: tuple[int, ...], where: str) -> int | tuple[int, ...]:
    """One depth for a whole block where all are equal, as diffusers' configurations have it."""
    if len(set(depths)) == 1:
        return depths[0]
    if 0 in depths:
        raise UnsupportedModel(
            f"diffusers has no block with attention in some layers only: {where}"
        )
    return depths


def _count(shapes: Mapping[str, Shape], pattern: str) -> int:
    """How many consecutive numbers from 0 give an existing name."""
    number = 0
    while pattern.format(number) in shapes:
        number += 1
    return number


def _depth(shapes: Mapping[str, Shape], prefix: str) -> int:
    return _count(shapes, prefix + ".transformer_blocks.{}.norm1.weight")


def _infer_diffusers(shapes: Mapping[str, Shape]) -> UNetConfig:
    def depths(block: str) -> tuple[int, ...]:
        layers = _count(shapes, block + ".resnets.{}.conv1.weight")
        return tuple(_depth(shapes, f"{block}.attentions.{index}") for index in range(layers))

    levels = _count(shapes, "down_blocks.{}.resnets.0.conv1.weight")
    widths = [shapes[f"down_blocks.{level}.resnets.0.conv1.weight"][0] for level in range(levels)]
    single = "mid_block.resnets.1.conv1.weight" not in shapes
    hint, name = None, "controlnet_cond_embedding"
    if "controlnet_mid_block.weight" in shapes:
        blocks = _count(shapes, name + ".blocks.{}.weight")
        hint = [shapes[f"{name}.conv_in.weight"]]
        hint += [shapes[f"{name}.blocks.{index}.weight"] for index in range(1, blocks, 2)]
    return _assemble(
        shapes,
        conv_in=shapes["conv_in.weight"],
        conv_out=shapes.get("conv_out.weight"),
        time=shapes["time_embedding.linear_1.weight"],
        pooled=shapes.get("add_embedding.linear_1.weight"),
        widths=widths,
        down=[depths(f"down_blocks.{level}") for level in range(levels)],
        mid=-1 if single else _depth(shapes, "mid_block.attentions.0"),
        up=[depths(f"up_blocks.{step}") for step in range(levels)],
        hint=hint,
    )


def _infer_ldm(shapes: Mapping[str, Shape]) -> UNetConfig:
    widths: list[int] = []
    down: list[tuple[int, ...]] = [()]
    for block in count(1):
        name = f"input_blocks.{block}"
        if f"{name}.0.op.weight" in shapes:
            down.append(())
        elif f"{name}.0.in_layers.2.weight" in shapes:
            if not down[-1]:
                widths.append(shapes[f"{name}.0.in_layers.2.weight"][0])
            down[-1] += (_depth(shapes, f"{name}.1"),)
        else:
            break
    flat = [
        _depth(shapes, f"output_blocks.{block}.1")
        for block in range(_count(shapes, "output_blocks.{}.0.in_layers.2.weight"))
    ]
    up: list[tuple[int, ...]] = []
    for layers in (len(depths) + 1 for depths in reversed(down)):
        up.append(tuple(flat[:layers]))
        flat = flat[layers:]
    single = "middle_block.2.in_layers.2.weight" not in shapes
    hint, name = None, "input_hint_block"
    if "middle_block_out.0.weight" in shapes:
        # Every second entry of the list is a convolution: first, pairs (same, wider), last.
        pairs = sum(key.startswith(f"{name}.") for key in shapes) // 4 - 1
        hint = [shapes[f"{name}.{4 * index}.weight"] for index in range(pairs + 1)]
    return _assemble(
        shapes,
        conv_in=shapes["input_blocks.0.0.weight"],
        conv_out=shapes.get("out.2.weight"),
        time=shapes["time_embed.0.weight"],
        pooled=shapes.get("label_emb.0.0.weight"),
        widths=widths,
        down=down,
        mid=-1 if single else _depth(shapes, "middle_block.1"),
        up=up,
        hint=hint,
    )


def _assemble(
    shapes: Mapping[str, Shape],
    conv_in: Shape,
    conv_out: Shape | None,
    time: Shape,
    pooled: Shape | None,
    widths: list[int],
    down: list[tuple[int, ...]],
    mid: int,
    up: list[tuple[int, ...]],
    hint: list[Shape] | None,
) -> UNetConfig:
    projection = next((s for n, s in shapes.items() if n.endswith(".proj_in.weight")), ())
    context = next((s for n, s in shapes.items() if n.endswith(".attn2.to_k.weight")), (0, 0))
    return UNetConfig(
        kind="unet" if hint is None else "controlnet",
        in_channels=conv_in[1],
        out_channels=conv_out[0] if conv_out is not None else conv_in[1],
        block_out_channels=tuple(widths),
        layers_per_block=tuple(len(depths) for depths in down),
        down_depths=tuple(down),
        mid_depth=mid,
        up_depths=tuple(up) if hint is None else (),
        heads=None,
        context_dim=context[1],
        linear_projection=len(projection) == 2,
        pooled_dim=pooled[1] if pooled is not None else None,
        time_embed_dim=time[0],
        hint_channels=hint[0][1] if hint else None,
        hint_block_channels=tuple(shape[0] for shape in hint) if hint else (),
    )
