"""Each mechanism by which packs change a denoiser, in its smallest form.

A fake takes a patcher that is already a clone, and changes it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy.patcher_extension import CallbacksMP, PatcherInjection, WrappersMP
from torch import Tensor


def attention_replace(model: Any) -> None:
    """Another attention in one block, as IPAdapter puts it there."""

    def replaced(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        return 0.5 * optimized_attention(q, k, v, options["n_heads"])

    for block in (("input", 4), ("middle", 0)):
        model.set_model_attn2_replace(replaced, *block)


def attention_patch(model: Any) -> None:
    """Another query, key and value in every self-attention."""

    def patch(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> tuple[Tensor, ...]:
        return q * 0.9, k, v

    model.set_model_attn1_patch(patch)


def block_patch(model: Any) -> None:
    """What every up block computes, changed."""

    def patch(h: Tensor, skip: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
        return h * 0.9, skip

    model.set_model_output_block_patch(patch)


class _Halved(torch.nn.Module):
    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = self.inner(*args, **kwargs) * 0.9
        return result


def object_patch(model: Any) -> None:
    """One layer of the network replaced by another object."""
    path = "diffusion_model.out.1"
    model.add_object_patch(path, _Halved(model.get_model_object(path)))


def forward_patch(model: Any) -> None:
    """One layer's `forward` replaced."""
    path = "diffusion_model.out.1.forward"
    forward = model.get_model_object(path)
    model.add_object_patch(path, lambda *args, **kwargs: forward(*args, **kwargs) * 0.9)


def injection(model: Any) -> None:
    """Hooks on modules, set while the model samples and taken off after."""
    handles: list[Any] = []

    def inject(patcher: Any) -> None:
        layer = patcher.model.diffusion_model.middle_block[0]
        handles.append(layer.register_forward_hook(lambda module, args, result: result * 0.9))

    def eject(patcher: Any) -> None:
        while handles:
            handles.pop().remove()

    model.set_injections("fake", [PatcherInjection(inject, eject)])


def late_hook(model: Any) -> None:
    """A hook on a layer, set when sampling begins, by names that nobody sees beforehand."""
    handles: list[Any] = []

    def begin(patcher: Any) -> None:
        network = getattr(patcher.model, "_".join(("diffusion", "model")))
        halve = getattr(network.out[1], "_".join(("register", "forward", "hook")))
        handles.append(halve(lambda module, args, result: result * 0.9))

    def end(patcher: Any) -> None:
        while handles:
            handles.pop().remove()

    model.add_callback_with_key(CallbacksMP.ON_PRE_RUN, "fake", begin)
    model.add_callback_with_key(CallbacksMP.ON_CLEANUP, "fake", end)


_layers: dict[str, Any] = {}


def hook_between_steps(model: Any) -> None:
    """A hook on a layer, set by a wrapper at the second call; the layer is found in a table."""
    _layers["out"] = model.model.diffusion_model.out[1]
    calls: list[int] = []

    def wrap(executor: Any, *args: Any, **kw: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            halve = getattr(_layers["out"], "_".join(("register", "forward", "hook")))
            _layers["handle"] = halve(lambda module, args, result: result * 0.5)
        result: Tensor = executor(*args, **kw)
        return result

    def end(patcher: Any) -> None:
        _layers.pop("handle").remove()

    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "fake", wrap)
    model.add_callback_with_key(CallbacksMP.ON_CLEANUP, "fake", end)


def wrapper_context(model: Any) -> None:
    """A wrapper around the network that gives it another prompt at each step."""

    def wrap(
        executor: Any, x: Tensor, timesteps: Tensor, context: Tensor, *args: Any, **kw: Any
    ) -> Tensor:
        scale = 1 + timesteps.float().mean() / 4000
        result: Tensor = executor(x, timesteps, context * scale.to(context.dtype), *args, **kw)
        return result

    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "fake_context", wrap)


def apply_context(model: Any) -> None:
    """The same one level further out."""

    def wrap(executor: Any, x: Tensor, t: Tensor, c_concat: Any = None, c_crossattn: Any = None,
             *args: Any, **kw: Any) -> Tensor:  # fmt: skip
        scale = 1 + t.float().mean().to(c_crossattn.device) / 40
        result: Tensor = executor(x, t, c_concat, c_crossattn * scale, *args, **kw)
        return result

    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "fake_context", wrap)


def function_wrapper(model: Any) -> None:
    """The one slot around `apply_model`, with a changed prompt and the sizes of one image."""

    def wrap(apply: Any, arguments: dict[str, Any]) -> Tensor:
        c = dict(arguments["c"])
        c["c_crossattn"] = c["c_crossattn"] * 1.1
        result: Tensor = apply(arguments["input"], arguments["timestep"], **c)
        return result

    model.set_model_unet_function_wrapper(wrap)


def forward_around(model: Any) -> None:
    """The network's own `forward` replaced around each call, past the wrappers in it."""
    network = model.model.diffusion_model

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = network._forward(*args, **kwargs) * 0.9
        return result

    def wrap(apply: Any, arguments: dict[str, Any]) -> Tensor:
        with mock.patch.object(network, "forward", forward):
            result: Tensor = apply(arguments["input"], arguments["timestep"], **arguments["c"])
        return result

    model.set_model_unet_function_wrapper(wrap)


_calls: dict[str, Callable[..., Tensor]] = {}


def _look_up_call(apply: Any, arguments: dict[str, Any]) -> Tensor:
    return _calls["around"](apply, arguments)


def hidden_forward_around(model: Any) -> None:
    """The same, found in a table when it runs."""

    class Catch:
        def __init__(self) -> None:
            self.model = model.model

        def set_model_unet_function_wrapper(self, function: Any) -> None:
            _calls["around"] = function

    forward_around(Catch())
    model.set_model_unet_function_wrapper(_look_up_call)


def reentering(model: Any) -> None:
    """Perturbed guidance of an unknown pack: a third pass with a patched attention."""
    import comfy.samplers

    def guidance(args: dict[str, Any]) -> Tensor:
        options = args["model_options"].copy()
        options = comfy.model_patcher.set_model_options_patch_replace(
            options, lambda q, k, v, extra: v, "attn1", "middle", 0
        )
        (perturbed,) = comfy.samplers.calc_cond_batch(
            args["model"], [args["cond"]], args["input"], args["sigma"], options
        )
        result: Tensor = args["denoised"] + 0.5 * (args["cond_denoised"] - perturbed)
        return result

    model.set_model_sampler_post_cfg_function(guidance)


_guidances: dict[str, Callable[[dict[str, Any]], Tensor]] = {}


def _look_up(args: dict[str, Any]) -> Tensor:
    return _guidances["perturbed"](args)


def hidden_reentering(model: Any) -> None:
    """The same, found in a table when it runs: it shows in mid-run only."""

    class Catch:
        def set_model_sampler_post_cfg_function(self, function: Any) -> None:
            _guidances["perturbed"] = function

    reentering(Catch())
    model.set_model_sampler_post_cfg_function(_look_up)


def harmless_cfg(model: Any) -> None:
    """A post-CFG function that only computes."""
    model.set_model_sampler_post_cfg_function(lambda args: args["denoised"] * 0.98)


def callbacks(model: Any) -> None:
    """Every callback that packs register, doing nothing to the network."""
    model.switchyard_test_calls = calls = []
    for kind in (CallbacksMP.ON_LOAD, CallbacksMP.ON_DETACH, CallbacksMP.ON_CLEANUP):
        model.add_callback_with_key(kind, "fake", lambda *args, kind=kind: calls.append(kind))


def attention_override(model: Any) -> None:
    """An attention of the user's choice, as SageAttention's node sets it."""

    def override(function: Any, *args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = function(*args, **kwargs) * 0.9
        return result

    model.model_options.setdefault("transformer_options", {})["optimized_attention_override"] = (
        override
    )


def unknown_option(model: Any) -> None:
    """A key of `transformer_options` that nobody knows."""
    model.model_options.setdefault("transformer_options", {})["someones_setting"] = {"scale": 2}


def foreign_class(model: Any) -> None:
    """A patcher of a class of its own, as GGUF loaders make."""
    model.__class__ = type("GGUFModelPatcher", (type(model),), {})


FAKES: dict[str, Callable[[Any], None]] = {
    function.__name__: function
    for function in (
        apply_context,
        attention_override,
        attention_patch,
        attention_replace,
        block_patch,
        callbacks,
        forward_around,
        foreign_class,
        forward_patch,
        function_wrapper,
        harmless_cfg,
        hidden_forward_around,
        hidden_reentering,
        hook_between_steps,
        injection,
        late_hook,
        object_patch,
        reentering,
        unknown_option,
        wrapper_context,
    )
}
