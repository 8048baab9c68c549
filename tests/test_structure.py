"""Structure keys: equal for the same network in any form, different for different networks."""

import dataclasses
import json
import math
import multiprocessing
import struct
import time

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from safetensors.torch import save_file

from accel.errors import InvalidFile, StructureMismatch, StructureUnknown, UnsupportedModel
from accel.models import FAMILIES, diffusers_kwargs, parameters
from accel.structure import canonical_names, structure_hash, structure_of
from accel.tensorfile import TensorFile

CONFIGS = {family.name: family.config for family in FAMILIES}
TINY = dataclasses.replace(
    CONFIGS["sd15"], block_out_channels=(32, 64, 128, 128), context_dim=32, time_embed_dim=128
)
# Of an ordinary single-file checkpoint, beside the UNet.
OTHERS = {
    "first_stage_model.encoder.conv_in.weight": (128, 3, 3, 3),
    "cond_stage_model.transformer.text_model.final_layer_norm.weight": (768,),
    "conditioner.embedders.1.model.ln_final.weight": (1280,),
    "model_ema.diffusion_modelinput_blocks00weight": (320, 4, 3, 3),
    "model_ema.decay": (),
    "alphas_cumprod": (1000,),
    "v_pred": (0,),
}


def diffusers_shapes(config):
    return {name: parameter.shape for name, parameter in parameters(config).items()}


def ldm_shapes(config, prefix=""):
    return {
        prefix + parameter.ldm_name: parameter.shape for parameter in parameters(config).values()
    }


def build(config):
    kind = UNet2DConditionModel if config.kind == "unet" else ControlNetModel
    with torch.device("meta"):
        return kind(**diffusers_kwargs(config))


def write_header(path, shapes, dtype="F16", size=None):
    """A file of the full size whose data are a hole; `size` adds a tensor that fills it up."""
    item = {"F16": 2, "BF16": 2, "F32": 4}[dtype]
    entries, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * item
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    if size is not None:
        entries["first_stage_model.rest"] = {
            "dtype": "U8",
            "shape": [size - end],
            "data_offsets": [end, size],
        }
        end = size
    header = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + end)
    return path


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_one_network_has_one_key(family, tmp_path):
    config = family.config
    prefix = "model.diffusion_model." if config.kind == "unet" else "control_model."
    sources = {
        "module": build(config),
        "compiled module": torch.compile(build(config)),
        "state dict": build(config).state_dict(),
        "diffusers names": diffusers_shapes(config),
        "diffusers names of a pipeline": {
            f"unet.{name}": shape for name, shape in diffusers_shapes(config).items()
        }
        | {"vae.encoder.conv_in.weight": (128, 3, 3, 3), "text_encoder.x": (1,)},
        "ldm names": ldm_shapes(config),
        "ldm names and others": ldm_shapes(config) | OTHERS,
        "single file": ldm_shapes(config, prefix) | OTHERS,
    }
    for dtype in ("F16", "BF16", "F32"):
        path = tmp_path / f"{dtype}.safetensors"
        sources[dtype] = write_header(path, ldm_shapes(config, prefix) | OTHERS, dtype)
    found = {name: structure_of(source) for name, source in sources.items()}
    for name, structure in found.items():
        assert structure == found["module"], name
        assert structure_hash(sources[name]) == structure.graph_key
    structure = found["module"]
    assert structure.family == family.name
    assert structure.kind == config.kind
    assert structure.config == config
    assert structure.shapes == diffusers_shapes(config)
    assert len(structure.graph_key) == len(structure.shape_key) == 32
    assert structure.graph_key != structure.shape_key


def test_families_differ():
    found = [structure_of(diffusers_shapes(family.config)) for family in FAMILIES]
    assert len({structure.graph_key for structure in found}) == len(FAMILIES)
    assert len({structure.shape_key for structure in found}) == len(FAMILIES)


def test_heads_are_in_the_graph_key_alone():
    four, eight = (
        structure_of(build(dataclasses.replace(CONFIGS["sd15"], heads=(heads,) * 4)))
        for heads in (4, 8)
    )
    assert four.shape_key == eight.shape_key
    assert four.graph_key != eight.graph_key
    assert (four.family, eight.family) == (None, "sd15")


@pytest.mark.parametrize(
    "change",
    [
        {"norm_eps": 1e-6},
        {"norm_groups": 16},
        {"flip_sin_to_cos": False},
        {"freq_shift": 1},
    ],
    ids=str,
)
def test_every_setting_is_in_the_graph_key(change):
    plain, changed = (structure_of(build(c)) for c in (TINY, dataclasses.replace(TINY, **change)))
    assert plain.shape_key == changed.shape_key
    assert plain.graph_key != changed.graph_key


def test_weights_and_dtype_play_no_part(tmp_path):
    torch.manual_seed(0)
    module = UNet2DConditionModel(**diffusers_kwargs(TINY))
    key = structure_hash(module)
    assert structure_hash(module.half()) == key
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        path = tmp_path / f"{dtype}.safetensors"
        save_file({name: value.to(dtype) for name, value in module.state_dict().items()}, path)
        structure = structure_of(path)
        assert structure.shape_key == structure_of(module).shape_key
        assert structure.family is None and structure.config is None
        with pytest.raises(StructureUnknown, match="a module is needed"):
            structure_hash(path)


def test_no_tensor_of_a_file_is_read(tmp_path, monkeypatch):
    path = write_header(tmp_path / "a.safetensors", ldm_shapes(CONFIGS["sd15"]))
    monkeypatch.setattr(TensorFile, "read", None)
    monkeypatch.setattr("safetensors.safe_open", None)
    assert structure_of(path).family == "sd15"


def test_seven_gigabytes_in_fifty_milliseconds(tmp_path):
    shapes = ldm_shapes(CONFIGS["sdxl"], "model.diffusion_model.") | OTHERS
    shapes |= {f"conditioner.embedders.0.layer.{index}.weight": (768,) for index in range(820)}
    path = write_header(tmp_path / "xl.safetensors", shapes, size=7 * 10**9)
    assert path.stat().st_size > 7 * 10**9
    assert len(TensorFile(path).tensors) > 2500
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        key = structure_hash(path)
        seconds.append(time.perf_counter() - start)
    assert key == structure_hash(diffusers_shapes(CONFIGS["sdxl"]))
    assert min(seconds) < 0.05


def test_files_that_cannot_be_used(tmp_path):
    whole = write_header(tmp_path / "whole.safetensors", ldm_shapes(CONFIGS["sd15"]))
    content = whole.open("rb").read(4096)
    cases = {
        tmp_path / "absent.safetensors": None,
        tmp_path / "empty.safetensors": b"",
        tmp_path / "header.safetensors": content,
        tmp_path / "model.ckpt": content,
        tmp_path / "model.pt": content,
    }
    for path, data in cases.items():
        if data is not None:
            path.write_bytes(data)
    with whole.open("r+b") as file:
        file.truncate(whole.stat().st_size - 1)
    for path in (*cases, whole, tmp_path):
        for function in (structure_of, structure_hash):
            with pytest.raises(InvalidFile) as caught:
                function(path)
            assert "\n" not in str(caught.value) and path.name in str(caught.value)


def test_other_files_have_no_graph_key():
    lora = {"lora_unet_mid_block.lora_down.weight": (4, 320)}
    structure = structure_of(lora)
    assert (structure.kind, structure.family, structure.graph_key) == ("module", None, None)
    with pytest.raises(StructureUnknown):
        structure_hash(lora)
    unknown = diffusers_shapes(CONFIGS["sd15"]) | {"time_embedding.cond_proj.weight": (320, 256)}
    assert structure_of(unknown).graph_key is None


def test_unsupported_networks_say_so():
    with torch.device("meta"):
        module = UNet2DConditionModel(**diffusers_kwargs(TINY), time_cond_proj_dim=256)
    with pytest.raises(UnsupportedModel, match="time_cond_proj_dim=256"):
        structure_of(module)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "_orig_mod."])
def test_canonical_names_of_ldm_files(prefix):
    config = CONFIGS["ssd1b"]
    found = canonical_names(ldm_shapes(config, prefix) | OTHERS, config)
    assert found == {
        name: prefix + parameter.ldm_name for name, parameter in parameters(config).items()
    }


@pytest.mark.parametrize("prefix", ["", "unet.", "_orig_mod."])
def test_canonical_names_of_diffusers_files(prefix):
    source = {prefix + name: shape for name, shape in diffusers_shapes(TINY).items()}
    found = canonical_names(source | {"vae.conv_in.weight": (1,)}, TINY)
    assert found == {name: prefix + name for name in parameters(TINY)}


def test_canonical_names_takes_tensors():
    assert canonical_names(build(TINY).state_dict(), TINY) == {
        name: name for name in parameters(TINY)
    }


def test_a_file_of_two_networks_serves_both():
    unet, control = CONFIGS["sd15"], CONFIGS["sd15-controlnet"]
    source = ldm_shapes(unet, "model.diffusion_model.") | ldm_shapes(control, "control_model.")
    assert structure_of(source).family == "sd15-controlnet"
    assert canonical_names(source, unet)["conv_in.weight"].startswith("model.diffusion_model.")
    assert canonical_names(source, control)["conv_in.weight"].startswith("control_model.")


def test_canonical_names_say_what_the_source_holds():
    xl = structure_hash(diffusers_shapes(CONFIGS["sdxl"]))
    cases = [
        (ldm_shapes(CONFIGS["sdxl"], "model.diffusion_model.") | OTHERS, f"SDXL (structure {xl})"),
        (diffusers_shapes(TINY), "a UNet of no published family"),
        ({"lora_unet_x.alpha": ()}, "holds no UNet"),
        (
            diffusers_shapes(CONFIGS["sd15"]) | {"encoder_hid_proj.weight": (4, 4)},
            "has encoder_hid_proj.weight, which the network does not have",
        ),
        (
            {
                name: shape
                for name, shape in diffusers_shapes(CONFIGS["sd15"]).items()
                if name != "conv_out.bias"
            },
            "lacks conv_out.bias",
        ),
        (
            diffusers_shapes(CONFIGS["sd15"]) | {"conv_out.bias": (5,)},
            "has conv_out.bias in shape (5,) instead of (4,)",
        ),
    ]
    for source, message in cases:
        with pytest.raises(StructureMismatch) as caught:
            canonical_names(source, CONFIGS["sd15"])
        assert message in str(caught.value)
        assert "needed is Stable Diffusion 1.5 (structure " in str(caught.value)
        assert "\n" not in str(caught.value)


class Block(torch.nn.Module):
    """A module that is neither UNet nor ControlNet."""

    def __init__(self, width=8, scale=2.0, device=None):
        super().__init__()
        self.scale = scale
        self.options = {"b": 1, "a": {2, 1}}
        self.linear = torch.nn.Linear(4, width, device=device)
        self.register_buffer("table", torch.zeros(3, device=device), persistent=False)
        self.register_buffer("mean", torch.zeros(width, device=device))

    def forward(self, x):
        return self.linear(x) * self.scale


def _changed_forward(self, x):
    return self.linear(x) + self.scale


def test_other_modules(monkeypatch):
    structure = structure_of(Block())
    assert structure.kind == "module" and structure.config is None
    assert structure.shapes == {"linear.weight": (8, 4), "linear.bias": (8,), "mean": (8,)}
    assert structure.graph_key == structure_hash(Block(device="meta"))
    assert structure.shape_key == structure_of(Block().state_dict()).shape_key
    assert structure_hash(Block(width=9)) != structure.graph_key
    assert structure_of(Block(scale=3.0)).shape_key == structure.shape_key
    assert structure_hash(Block(scale=3.0)) != structure.graph_key
    assert structure_hash(Block().eval()) != structure.graph_key
    wide = Block()
    wide.table = torch.zeros(4)
    assert structure_hash(wide) != structure.graph_key
    loose = Block()
    loose.bias = torch.zeros(3)
    with pytest.raises(UnsupportedModel, match="bias is a tensor outside"):
        structure_of(loose)
    monkeypatch.setattr(Block, "forward", _changed_forward)
    assert structure_hash(Block()) != structure.graph_key


def _key_of_block(_):
    return structure_hash(Block())


def test_the_key_of_a_module_is_the_same_in_every_process():
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_key_of_block, (None,)) == structure_hash(Block())
