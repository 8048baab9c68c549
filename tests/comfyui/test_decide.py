"""What is said before sampling about every way in which nodes and packs change the denoiser."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import sys

import comfy.lora
import comfy.model_base
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import comfy.utils
import pytest
import torch
from comfy.ldm.flux.model import FluxParams
from comfy.patcher_extension import WrappersMP

from accel.hosts.comfyui import decide
from accel.hosts.comfyui.decide import (
    Reason,
    learn,
    network_state,
    unsupported_model,
    why_host_call,
    why_host_run,
)
from accel.hosts.comfyui.journal import STATUS_EVENT, journal
from accel.hosts.comfyui.patcher import accelerate
from accel.hosts.comfyui.run import Options

from .checkpoints import checkpoint_state
from .host import call, conditioning, exists, sample
from .rows import CHANGED, HARMLESS, KIND, every
from .testpack import fakes


@pytest.fixture(scope="module")
def shared(load):
    return load(KIND)


@pytest.fixture
def model(shared):
    """A MODEL of the test's own; the network is shared and must come out as it went in."""
    assert network_state(shared.model.diffusion_model) is None
    return shared.clone()


def reasons(model, positive=None):
    conds = {"positive": positive or conditioning(KIND, 1), "negative": conditioning(KIND, 2)}
    return why_host_run(model, model.model_options, conds)


@every(CHANGED)
def test_a_change_is_named_before_sampling(row, model, tmp_path):
    changed = row.apply(model, tmp_path)
    found = reasons(changed, row.condition(conditioning(KIND, 1)))
    if row.name == "HypernetworkLoader":
        assert found[0].node in ("Load Hypernetwork", "HypernetworkLoader")
        assert [reason.text.removeprefix(f"{found[0].node} ") for reason in found] == [
            "changes the self-attention",
            "changes the cross-attention",
        ]
    else:
        assert "; ".join(reason.text for reason in found) == row.text
        assert found[0].node == row.node
    assert reasons(model) == []  # the clone that was not changed
    assert unsupported_model(changed) is None  # it is the run that is, not the MODEL


@every(HARMLESS)
def test_what_leaves_the_network_alone_is_no_reason(row, model, tmp_path):
    changed = row.apply(model, tmp_path)
    assert changed is not model or row.cond is not None
    assert reasons(changed, row.condition(conditioning(KIND, 1))) == []


def test_a_compiled_model_is_no_reason(model):
    if not exists("comfy_extras.nodes_torch_compile", "TorchCompileModel"):
        pytest.skip("this version has no TorchCompileModel")
    inputs = {"model": model, "backend": "inductor"}
    (compiled,) = call("comfy_extras.nodes_torch_compile", "TorchCompileModel", **inputs)
    assert reasons(compiled) == []


def test_a_compute_dtype_of_the_users_choice(model):
    model.set_model_compute_dtype(torch.bfloat16)
    assert reasons(model) == [
        Reason("the model is set to compute in torch.bfloat16", "ModelComputeDtype")
    ]


def test_a_call_names_the_patch_that_came_with_it(model, tmp_path):
    assert why_host_call({"sigmas": torch.ones(1), "cond_or_uncond": [0, 1]}, {}) is None
    (freeu,) = (row for row in CHANGED if row.name == "FreeU")
    options = freeu.apply(model, tmp_path).model_options["transformer_options"]
    assert why_host_call(options, {}) == Reason("FreeU changes the up blocks", "FreeU")
    assert "num_video_frames" in why_host_call({}, {"num_video_frames": 4}).text


class Holder:
    """A pack's object that keeps what it is given."""

    def __init__(self, kept):
        self.kept = kept

    def __call__(self, apply, arguments):
        raise AssertionError("not to be called")

    def wrap(self, apply, arguments):
        raise AssertionError("not to be called")


def _holding(kept):
    """Functions that hold something, in every way in which it shows."""

    def closure(apply, arguments):
        return kept

    def default(apply, arguments, layer=kept):
        return layer

    def argument(layer, apply, arguments):
        return layer

    return [
        closure,
        default,
        functools.partial(argument, kept),
        Holder(kept),
        Holder(kept).wrap,
    ]


def test_functions_that_hold_a_layer_of_the_network(model):
    network = model.model.diffusion_model
    text = "another pack works on the network's layers itself"
    for kept in (network, network.out[1], network.out[1].forward):
        for function in _holding(kept):
            model.set_model_unet_function_wrapper(function)
            assert [reason.text for reason in reasons(model)] == [text], function
    for kept in (torch.nn.SiLU(), model.model.model_sampling, len):
        for function in _holding(kept):
            model.set_model_unet_function_wrapper(function)
            assert reasons(model) == [], function


# Guidance that shows in mid-run only.


def test_what_a_run_finds_out_is_known_before_the_next(model):
    fakes.hidden_reentering(model)
    fakes.harmless_cfg(model)
    assert reasons(model) == []
    refused = []

    def wrap(executor, *args, **kwargs):
        options = args[5]
        if why_host_call(options, {}) is not None:
            refused.append(options)
            learn(model, model.model_options)
        return executor(*args, **kwargs)

    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", wrap)
    fakes.apply_context(model)  # is around every call, and not to blame
    try:
        sample(model, conditioning(KIND, 1), conditioning(KIND, 2), size=(8, 8), steps=1)
        assert refused
        model.remove_wrappers_with_key(WrappersMP.DIFFUSION_MODEL, "test")
        text = "another pack runs the network again with patches"
        assert reasons(model) == [Reason(text)]  # once: the harmless function was not blamed
        harmless = model.clone()
        harmless.model_options["sampler_post_cfg_function"] = [
            function
            for function in harmless.model_options["sampler_post_cfg_function"]
            if function is not fakes._look_up
        ]
        assert reasons(harmless) == []
    finally:
        decide._learned.clear()


# Changes to the network itself.


def test_hooks_on_a_layer_come_and_go(model):
    layer = model.model.diffusion_model.middle_block[0]
    handle = layer.register_forward_pre_hook(lambda *args: None)
    (reason,) = reasons(model)
    assert "middle_block.0" in reason.text and "hooks" in reason.text
    handle.remove()
    assert reasons(model) == []


@pytest.mark.parametrize("name", ["forward", "_forward", "_conv_forward"])
def test_a_method_of_one_layer(model, name):
    layer = model.model.diffusion_model.input_blocks[1][0].in_layers[2]
    layer.__dict__[name] = lambda x: x
    try:
        found = reasons(model)
        assert found == [] if name == "_forward" else "input_blocks.1.0" in found[0].text
    finally:
        del layer.__dict__[name]
    assert reasons(model) == []


def test_a_layer_that_was_exchanged(model):
    network = model.model.diffusion_model
    network.out[1], layer = torch.nn.Tanh(), network.out[1]
    try:
        assert "out.1 (Tanh)" in reasons(model)[0].text
    finally:
        network.out[1] = layer
    assert reasons(model) == []


def test_a_picture_made_seamless(model):
    layer = model.model.diffusion_model.out[2]
    layer.padding_mode = "circular"
    try:
        assert "padding_mode='circular'" in reasons(model)[0].text
    finally:
        layer.padding_mode = "zeros"
    assert reasons(model) == []


def foreign(*args, **kwargs):
    raise AssertionError("not to be called")


@pytest.mark.parametrize(
    ("module", "owner", "name"),
    [
        ("torch.nn", "GroupNorm", "forward"),
        ("comfy.ops", "disable_weight_init.GroupNorm", "forward_comfy_cast_weights"),
        ("comfy.ldm.modules.diffusionmodules.openaimodel", "UNetModel", "_forward"),
        ("comfy.ldm.modules.diffusionmodules.openaimodel", "", "forward_timestep_embed"),
        ("comfy.ldm.modules.attention", "CrossAttention", "forward"),
        ("comfy.ldm.modules.attention", "", "optimized_attention"),
    ],
)
def test_a_function_replaced_for_all_models(model, monkeypatch, module, owner, name):
    target = sys.modules[module]
    for part in owner.split(".") if owner else ():
        target = getattr(target, part)
    with monkeypatch.context() as patch:
        patch.setattr(target, name, foreign)
        (reason,) = reasons(model)
        assert "replaced" in reason.text and name in reason.text
    assert reasons(model) == []


def test_an_unchanged_network_is_not_read_again(model, monkeypatch):
    assert reasons(model) == []
    monkeypatch.setattr(decide, "unsupported_state", foreign)
    assert reasons(model) == []
    model.model.diffusion_model.out[1].register_forward_hook(lambda *args: None).remove()
    assert reasons(model) == []


# Whole MODELs.


def comes_back_itself(model, text):
    """Whether a MODEL is left alone, in one line on the node."""
    said = []
    stop = journal().subscribe(lambda event, data: said.append((event, data)))
    try:
        assert accelerate(model, Options(node_id="4")) is model
    finally:
        stop()
    line = {"node_id": "4", "state": "off", "text": f"not accelerated: {text}"}
    return said == [(STATUS_EVENT, line)] and unsupported_model(model) == text


def test_a_plain_model_of_every_supported_family(load):
    for kind in ("tiny-sd15", "tiny-sdxl", "tiny-sd15-inpaint", "tiny-sdxl-inpaint"):
        assert unsupported_model(load(kind)) is None


def test_other_families_are_refused_by_name():
    settings = {
        "in_channels": 16, "out_channels": 16, "patch_size": 2, "vec_in_dim": 16,
        "context_in_dim": 16, "hidden_size": 64, "mlp_ratio": 4.0, "num_heads": 2, "depth": 1,
        "depth_single_blocks": 1, "axes_dim": [8, 12, 12], "theta": 10000, "qkv_bias": True,
        "guidance_embed": False, "txt_ids_dims": [],
    }  # fmt: skip
    known = {field.name for field in dataclasses.fields(FluxParams)}
    settings = {name: value for name, value in settings.items() if name in known}
    config = comfy.supported_models.Flux(
        {"image_model": "flux", "dtype": torch.float32, **settings}
    )
    cpu = torch.device("cpu")
    flux = comfy.model_patcher.ModelPatcher(config.get_model({}, "", device=cpu), cpu, cpu)
    assert comes_back_itself(flux, "Flux is not supported: Stable Diffusion 1, 2 and XL are")


def test_the_transformer_of_sd3_is_refused_by_name():
    settings = {"in_channels": 16, "depth": 1, "input_size": None, "pos_embed_max_size": 8}
    config = comfy.supported_models.SD3({**settings, "dtype": torch.float32})
    cpu = torch.device("cpu")
    sd3 = comfy.model_patcher.ModelPatcher(config.get_model({}, "", device=cpu), cpu, cpu)
    assert comes_back_itself(sd3, "SD3 is not supported: Stable Diffusion 1, 2 and XL are")


def test_patchers_and_models_of_other_packs(model, tmp_path):
    folder = tmp_path / "custom_nodes" / "ComfyUI-GGUF"
    folder.mkdir(parents=True)
    path = folder / "nodes.py"
    path.write_text(
        "import comfy.model_patcher\n"
        "class GGUFModelPatcher(comfy.model_patcher.ModelPatcher):\n    pass\n",
        "utf-8",
    )
    spec = importlib.util.spec_from_file_location("test_gguf_pack", path)
    pack = importlib.util.module_from_spec(spec)
    sys.modules["test_gguf_pack"] = pack
    try:
        spec.loader.exec_module(pack)
        model.__class__ = pack.GGUFModelPatcher
        assert comes_back_itself(model, "ComfyUI-GGUF has its own way with it: GGUFModelPatcher")
    finally:
        del sys.modules["test_gguf_pack"]


def test_devices_without_an_engine(model):
    text = "device 'mps' is not supported: use 'cuda' or 'cpu'"
    assert unsupported_model(model) is None
    model.load_device = torch.device("mps")
    assert comes_back_itself(model, text)
    assert reasons(model) == [Reason(text)]  # one that was accelerated for another device


def test_quantised_weights(tmp_path):
    if not hasattr(comfy.utils, "detect_layer_quantization"):
        pytest.skip("this version has no quantised layers")
    state = checkpoint_state(KIND, "quantised")
    layer = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q"
    state[f"{layer}.weight"] = state[f"{layer}.weight"].to(torch.float8_e4m3fn)
    state[f"{layer}.weight_scale"] = torch.tensor(1.0)
    form = b'{"format": "float8_e4m3fn"}'
    state[f"{layer}.comfy_quant"] = torch.frombuffer(bytearray(form), dtype=torch.uint8)
    path = tmp_path / "quantised.safetensors"
    comfy.utils.save_torch_file(state, str(path))
    patcher = comfy.sd.load_checkpoint_guess_config(str(path), output_vae=False, output_clip=False)[
        0
    ]
    assert comes_back_itself(patcher, "its weights are quantised")


# Names.


@pytest.mark.parametrize(
    ("registered", "expected"), [(True, "Warm Attention"), (False, "some-pack")]
)
def test_the_name_is_that_of_the_node_or_of_its_pack(model, tmp_path, registered, expected):
    folder = tmp_path / "custom_nodes" / "some-pack"
    folder.mkdir(parents=True)
    path = folder / "warm.py"
    source = """
class WarmAttention:
    def apply(self, model):
        model = model.clone()
        def patch(q, k, v, options):
            return q, k, v
        model.set_model_attn2_patch(patch)
        return model
"""
    if registered:
        source += """
NODE_CLASS_MAPPINGS = {"WarmAttn": WarmAttention}
NODE_DISPLAY_NAME_MAPPINGS = {"WarmAttn": "Warm Attention"}
"""
    path.write_text(source, "utf-8")
    spec = importlib.util.spec_from_file_location("test_warm_pack", path)
    pack = importlib.util.module_from_spec(spec)
    sys.modules["test_warm_pack"] = pack
    try:
        spec.loader.exec_module(pack)
        changed = pack.WarmAttention().apply(model)
        assert reasons(changed) == [Reason(f"{expected} changes the cross-attention", expected)]
    finally:
        del sys.modules["test_warm_pack"]
