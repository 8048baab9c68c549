"""Nodes for tests: seeded conditioning, samplers that record, a look inside, fake packs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.patcher_extension
import comfy.sample
import comfy.samplers
import folder_paths
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from . import fakes

Ui = dict[str, Any]
# Every option of a type that a workflow may wire to anything.
_ANY = type("_Any", (str,), {"__ne__": lambda self, other: False})("*")


def _save(name: str, tensors: dict[str, Tensor]) -> None:
    path = Path(folder_paths.get_output_directory()) / f"{name}.safetensors"
    part = path.with_suffix(".part")
    save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, part)
    part.replace(path)


_RUN = (
    *("mode", "engine_calls", "host_calls", "reasons", "loras", "controlnets", "graphs", "dims"),
    *("captures", "compiling"),
)


def _last_run() -> dict[str, Any] | None:
    """What the pack under test says of the last sampling, if it is there and has seen one."""
    for name, module in list(sys.modules.items()):
        if name.endswith("accel.hosts.comfyui.journal"):
            runs = module.journal().runs
            return {field: getattr(runs[-1], field) for field in _RUN} if runs else None
    return None


class TestConditioning:
    """A prompt of any length, drawn from a seed: no text encoder is needed."""

    CATEGORY = "Switchyard tests"
    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        numbers = {"seed": 0, "tokens": 77, "width": 32, "pooled": 0}
        return {
            "required": {
                name: ("INT", {"default": value, "min": 0, "max": 2**31})
                for name, value in numbers.items()
            }
        }

    def run(self, seed: int, tokens: int, width: int, pooled: int) -> tuple[list[Any]]:
        generator = torch.Generator().manual_seed(seed)
        context = torch.randn(1, tokens, width, generator=generator)
        extra: dict[str, Any] = {"pooled_output": None}
        if pooled:
            extra["pooled_output"] = torch.randn(1, pooled, generator=generator)
        return ([[context, extra]],)


class TestImage:
    """A smooth picture and a mask with a disc, drawn from a seed."""

    CATEGORY = "Switchyard tests"
    RETURN_TYPES = ("IMAGE", "MASK")
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        size = {"default": 128, "min": 16, "max": 4096}
        return {
            "required": {"seed": ("INT", {"default": 0}), "width": ("INT", size),
                         "height": ("INT", size)}
        }  # fmt: skip

    def run(self, seed: int, width: int, height: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        coarse = torch.rand(1, 3, 4, 4, generator=generator)
        image = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
        rows = torch.linspace(-1, 1, height)[:, None]
        columns = torch.linspace(-1, 1, width)[None]
        mask = (rows**2 + columns**2 < 0.5).float()
        return image.permute(0, 2, 3, 1).contiguous(), mask[None]


class _Calls:
    """What a sampler function calls for the denoiser: it records each call.

    follow: a record whose noisy latents the denoiser gets in place of the sampler's own, so that
    an error at one call does not carry over to the next.
    """

    def __init__(self, model: Any, recorded: dict[str, Tensor], follow: dict[str, Tensor]) -> None:
        self._model, self._recorded, self._follow = model, recorded, follow
        self._count = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, x: Tensor, sigma: Tensor, **extra: Any) -> Tensor:
        if self._follow:
            x = self._follow[f"x_{self._count}"].to(x)
        self._recorded[f"x_{self._count}"] = x.clone()
        options = dict(extra.get("model_options") or {})
        after = "sampler_post_cfg_function"
        options[after] = [self._keep, *options.get(after, ())]
        denoised: Tensor = self._model(x, sigma, **{**extra, "model_options": options})
        self._recorded[f"denoised_{self._count}"] = denoised.clone()
        self._count += 1
        return denoised

    def _keep(self, args: dict[str, Any]) -> Tensor:
        """The predictions for both prompts, before guidance, which multiplies what they differ."""
        for name in ("cond", "uncond"):
            found = args.get(f"{name}_denoised")
            # Without guidance there is no second prompt, but zeros in its place.
            if isinstance(found, Tensor) and args.get(name, True) is not None:
                self._recorded[f"{name}_{self._count}"] = found.clone()
        denoised: Tensor = args["denoised"]
        return denoised


def _inputs(positive: Any, negative: Any, latent: Tensor) -> dict[str, Tensor]:
    """What text encoders and autoencoder have made for a sampling."""
    found = {"input_latent": latent}
    for name, conditioning in (("positive", positive), ("negative", negative)):
        for index, (context, extra) in enumerate(conditioning):
            found[f"input_{name}_{index}"] = context
            if "concat_latent_image" in extra:
                found[f"input_concat_{name}_{index}"] = extra["concat_latent_image"]
    # Several entries may be one tensor, which safetensors does not store twice.
    return {name: tensor.clone() for name, tensor in found.items()}


class TestSampler:
    """KSampler, which also saves what it computed to `<record>.safetensors` in the output folder:

    the noisy latent and the denoised one of every call of the denoiser (`x_0`, `denoised_0`, …),
    what it is for either prompt (`cond_0`, `uncond_0`, …), the last (`latent`), and what was
    encoded for it (`input_…`). follow: the path of such a file, along whose `sigmas` and noisy
    latents the denoiser is called. `ui.run` is the journal's entry.
    """

    CATEGORY = "Switchyard tests"
    RETURN_TYPES = ("LATENT",)
    FUNCTION = "run"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL",),
                "seed": ("INT", {"default": 0, "min": 0, "max": 2**31}),
                "steps": ("INT", {"default": 4, "min": 1}),
                "cfg": ("FLOAT", {"default": 5.0}),
                "sampler_name": (comfy.samplers.KSampler.SAMPLERS, {"default": "euler"}),
                "scheduler": (comfy.samplers.KSampler.SCHEDULERS, {"default": "normal"}),
                "positive": ("CONDITIONING",),
                "negative": ("CONDITIONING",),
                "latent_image": ("LATENT",),
                "denoise": ("FLOAT", {"default": 1.0}),
                "record": ("STRING", {"default": "record"}),
            },
            "optional": {"follow": ("STRING", {"default": ""})},
        }

    def run(
        self,
        model: Any,
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        positive: Any,
        negative: Any,
        latent_image: dict[str, Any],
        denoise: float,
        record: str,
        follow: str = "",
    ) -> Ui:
        latent = comfy.sample.fix_empty_latent_channels(model, latent_image["samples"])
        noise = comfy.sample.prepare_noise(latent, seed, latent_image.get("batch_index"))
        recorded = _inputs(positive, negative, latent)
        followed = load_file(follow) if follow else {}
        sampler = comfy.samplers.sampler_object(sampler_name)
        function = sampler.sampler_function

        def recording(model_k: Any, *args: Any, **kwargs: Any) -> Tensor:
            result: Tensor = function(_Calls(model_k, recorded, followed), *args, **kwargs)
            return result

        sampler.sampler_function = recording
        sigmas = comfy.samplers.KSampler(
            model,
            steps=steps,
            device=model.load_device,
            sampler=sampler_name,
            scheduler=scheduler,
            denoise=denoise,
            model_options=model.model_options,
        ).sigmas
        # The host makes them where its own tables lie at that moment, so that they differ in the
        # last bit between a checkpoint's runs: halfway between two timesteps, that is a timestep.
        sigmas = recorded["sigmas"] = followed.get("sigmas", sigmas).clone()
        samples = comfy.sample.sample_custom(
            model,
            noise,
            cfg,
            sampler,
            sigmas,
            positive,
            negative,
            latent,
            noise_mask=latent_image.get("noise_mask"),
            disable_pbar=True,
            seed=seed,
        )
        recorded["latent"] = samples
        _save(record, recorded)
        return {
            "ui": {"record": [record], "run": [_last_run()]},
            "result": ({**latent_image, "samples": samples},),
        }


class TestProbe:
    """A sampler that asks the denoiser at every sigma about a latent of its own.

    What it saves (`denoised_0`, …) has no history: a difference at one step is that step's.
    """

    CATEGORY = "Switchyard tests"
    RETURN_TYPES = ("SAMPLER",)
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "seed": ("INT", {"default": 0}),
                "record": ("STRING", {"default": "probe"}),
            }
        }

    def run(self, seed: int, record: str) -> tuple[Any]:
        def sample(
            model: Any,
            x: Tensor,
            sigmas: Tensor,
            extra_args: dict[str, Any] | None = None,
            callback: Any = None,
            disable: Any = None,
        ) -> Tensor:
            generator = torch.Generator().manual_seed(seed)
            recorded = {}
            denoised = x
            for step, sigma in enumerate(sigmas[:-1]):
                noise = torch.randn(x.shape, generator=generator).to(x)
                at = noise * torch.sqrt(sigma**2 + 1)
                denoised = model(at, sigma * x.new_ones([x.shape[0]]), **(extra_args or {}))
                recorded[f"denoised_{step}"] = denoised.clone()
                if callback is not None:
                    callback({"x": at, "i": step, "sigma": sigma, "denoised": denoised})
            _save(record, recorded)
            return denoised

        return (comfy.samplers.KSAMPLER(sample),)


class TestSave:
    """Saves a latent as `latent` in `<record>.safetensors`."""

    CATEGORY = "Switchyard tests"
    RETURN_TYPES = ()
    FUNCTION = "run"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"samples": ("LATENT",), "record": ("STRING", {"default": "record"})}}

    def run(self, samples: dict[str, Any], record: str) -> Ui:
        _save(record, {"latent": samples["samples"]})
        return {"ui": {"record": [record]}}


class TestInfo:
    """What a MODEL and the host's memory look like when the node runs, as JSON in `ui.info`."""

    CATEGORY = "Switchyard tests"
    RETURN_TYPES = ("STRING",)
    FUNCTION = "run"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",)}, "optional": {"after": (_ANY,)}}

    @classmethod
    def IS_CHANGED(cls, **kwargs: Any) -> float:
        return float("nan")  # runs every time

    def run(self, model: Any, after: Any = None) -> Ui:
        management = comfy.model_management
        info = {
            "class": type(model).__name__,
            "bases": [base.__name__ for base in type(model).__mro__],
            "size": model.model_size(),
            "loaded_size": model.loaded_size(),
            "patches": len(model.patches),
            "object_patches": sorted(model.object_patches),
            "parent": type(model.parent).__name__,
            "loaded_models": [
                {
                    "class": type(loaded.model).__name__,
                    "module": type(getattr(loaded.model, "model", None)).__name__,
                    "loaded": loaded.model_loaded_memory(),
                    "memory": loaded.model_memory(),
                }
                for loaded in management.current_loaded_models
                if loaded.model is not None
            ],
            "free_memory": management.get_free_memory(management.get_torch_device()),
            "device": str(management.get_torch_device()),
        }
        text = json.dumps(info)
        return {"ui": {"info": [text]}, "result": (text,)}


class TestHost:
    """What the server runs with: `ui.dynamic_vram`."""

    CATEGORY = "Switchyard tests"
    RETURN_TYPES = ()
    FUNCTION = "run"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {}}

    def run(self) -> Ui:
        memory = sys.modules.get("comfy.memory_management")  # older versions have none
        return {"ui": {"dynamic_vram": [bool(getattr(memory, "aimdo_enabled", False))]}}


class TestUnload:
    """Unloads every model, as the button in the front end does, and passes its input on."""

    CATEGORY = "Switchyard tests"
    RETURN_TYPES = (_ANY,)
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"value": (_ANY,)}}

    def run(self, value: Any) -> tuple[Any]:
        comfy.model_management.unload_all_models()
        comfy.model_management.soft_empty_cache()
        return (value,)


class TestFake:
    """Changes a MODEL in the way of another pack (see `fakes`)."""

    CATEGORY = "Switchyard tests"
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",), "kind": (sorted(fakes.FAKES),)}}

    def run(self, model: Any, kind: str) -> tuple[Any]:
        model = model.clone()
        fakes.FAKES[kind](model)
        return (model,)


NODE_CLASS_MAPPINGS = {
    node.__name__: node
    for node in (
        TestConditioning,
        TestFake,
        TestHost,
        TestImage,
        TestInfo,
        TestProbe,
        TestSampler,
        TestSave,
        TestUnload,
    )
}
