"""Workflows through a real server's /prompt: what comes out of the engine is the host's own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from .checkpoints import CONFIGS
from .host import relative_error
from .server import Server
from .workflows import Graph

# Both compute in float32; the order of additions differs.
CLOSE = 1e-4

SD15, SDXL = "tiny-sd15", "tiny-sdxl"
both = pytest.mark.parametrize("kind", [SD15, SDXL])


class Workflow(Graph):
    """A graph for one kind of checkpoint, with or without the engine: `model` is what differs."""

    def __init__(self, server, kind, fast):
        super().__init__()
        self.server, self.kind, self.fast = server, kind, fast
        self.samplers = []

    def model(self, letter="a"):
        self.server.ensure(f"checkpoints/{self.kind}-{letter}.safetensors")
        self.loader = self.checkpoint(self.kind, letter)
        if not self.fast:
            return self.loader
        return self.add("SwitchyardAccelerate", model=self.loader, first_run="wait",
                        compare_once=False)  # fmt: skip

    @property
    def vae(self):
        return [self.loader[0], 2]

    def lora(self, model, name, strength):
        file = f"{self.kind}-{name}.safetensors"
        self.server.ensure(f"loras/{file}")
        return self.add("LoraLoaderModelOnly", model=model, lora_name=file,
                        strength_model=strength)  # fmt: skip

    def context(self, seed, tokens=77):
        return self.prompt(self.kind, seed, tokens)

    def sample(self, *args, **kwargs):
        latent = super().sample(*args, **kwargs)
        self.samplers.append((latent[0], kwargs["record"]))
        return latent


def run(server, kind, build, fast):
    """Build and run a workflow: what its samplers recorded, and the journal's entries for them."""
    workflow = Workflow(server, kind, fast)
    build(workflow)
    result = server.run(workflow.workflow)
    records = {record: server.record(record) for _, record in workflow.samplers}
    runs = [result.outputs[node]["run"][0] for node, _ in workflow.samplers]
    return records, runs


def compare(server, kind, build, mode="engine"):
    """Both ways: every step of every sampler close, and each run by the path that was expected."""
    expected, _ = run(server, kind, build, fast=False)
    records, runs = run(server, kind, build, fast=True)
    assert expected and expected.keys() == records.keys()
    for name, steps in expected.items():
        assert steps.keys() == records[name].keys()
        for step, tensor in steps.items():
            assert tensor.isfinite().all()
            assert relative_error(records[name][step], tensor) < CLOSE, (name, step)
    for found in runs:
        assert found["mode"] == mode, found
        assert mode != "engine" or (found["reasons"], found["host_calls"]) == ([], 0)
    return records, runs


@both
def test_text_to_image(server, kind):
    def build(w):
        model = w.model()
        positive = w.add("CLIPTextEncode", text="a castle on a hill", clip=[w.loader[0], 1])
        negative = w.add("CLIPTextEncode", text="", clip=[w.loader[0], 1])
        w.sample(model, positive, negative, w.latent(128, 192), record="txt2img")

    compare(server, kind, build)


def test_another_sampler_that_leaves_the_schedule(server):
    def build(w):
        latent = w.latent()
        w.sample(w.model(), w.context(1), w.context(2), latent, record="heun",
                 sampler_name="dpmpp_2s_ancestral", scheduler="karras")  # fmt: skip

    compare(server, SD15, build)


@both
def test_image_to_image(server, kind):
    def build(w):
        model = w.model()
        image = w.add("TestImage", seed=4, width=128, height=128)
        latent = w.add("VAEEncode", pixels=image, vae=w.vae)
        w.sample(model, w.context(1), w.context(2), latent, record="img2img", denoise=0.6)

    compare(server, kind, build)


def test_a_noise_mask(server):
    def build(w):
        model = w.model()
        image = w.add("TestImage", seed=4, width=128, height=128)
        latent = w.add("VAEEncode", pixels=image, vae=w.vae)
        masked = w.add("SetLatentNoiseMask", samples=latent, mask=[image[0], 1])
        w.sample(model, w.context(1), w.context(2), masked, record="mask", denoise=0.8)

    compare(server, SD15, build)


@pytest.mark.parametrize("kind", ["tiny-sd15-inpaint", "tiny-sdxl-inpaint"])
def test_inpainting_with_a_model_made_for_it(server, kind):
    def build(w):
        model = w.model()
        image = w.add("TestImage", seed=4, width=128, height=128)
        inpaint = w.add("InpaintModelConditioning", positive=w.context(1), negative=w.context(2),
                        vae=w.vae, pixels=image, mask=[image[0], 1], noise_mask=True)  # fmt: skip
        conds = [[inpaint[0], output] for output in range(3)]
        w.sample(model, *conds, record="inpaint")

    compare(server, kind, build)


@both
def test_a_second_pass_at_a_larger_size(server, kind):
    def build(w):
        model, positive, negative = w.model(), w.context(1), w.context(2)
        first = w.sample(model, positive, negative, w.latent(), record="small")
        larger = w.add("LatentUpscale", samples=first, upscale_method="bilinear", width=192,
                       height=160, crop="disabled")  # fmt: skip
        w.sample(model, positive, negative, larger, record="large", denoise=0.5)

    _, runs = compare(server, kind, build)
    assert runs[0]["dims"] != runs[1]["dims"]


@both
def test_four_images_at_once(server, kind):
    def build(w):
        w.sample(w.model(), w.context(1), w.context(2), w.latent(batch=4), record="batch")

    compare(server, kind, build)


@both
@pytest.mark.parametrize(("positive", "negative"), [(154, 154), (154, 77), (231, 154)])
def test_long_prompts(server, kind, positive, negative):
    def build(w):
        w.sample(w.model(), w.context(1, positive), w.context(2, negative), w.latent(),
                 record="long")  # fmt: skip

    compare(server, kind, build)


@both
def test_a_stack_of_loras(server, kind):
    def build(w):
        model = w.model()
        for name, strength in (("1", 0.8), ("loha", -0.5), ("lokr", 1.2)):
            model = w.lora(model, name, strength)
        w.sample(model, w.context(1), w.context(2), w.latent(), record="loras")

    _, runs = compare(server, kind, build)
    assert runs[0]["loras"] >= 2  # those on one matrix


@both
def test_a_lora_changed_and_back(server, kind):
    def strength(value):
        def build(w):
            model = w.lora(w.model(), "2", value) if value else w.model()
            w.sample(model, w.context(1), w.context(2), w.latent(), record=f"lora {value}")

        return build

    latents = []
    for value in (0.5, 1.0, 0.5, 0, 0.5):
        records, _ = compare(server, kind, strength(value))
        latents.append(records[f"lora {value}"]["latent"])
    assert torch.equal(latents[0], latents[2]) and torch.equal(latents[0], latents[4])
    assert relative_error(latents[1], latents[0]) > 1e-3
    assert relative_error(latents[3], latents[0]) > 1e-3


@both
def test_two_controlnets_with_ranges(server, kind):
    def build(w):
        model, conds = w.model(), (w.context(1), w.context(2))
        image = w.add("TestImage", seed=5, width=128, height=128)
        for number, strength, start, end in ((1, 0.7, 0.0, 0.6), (2, 0.4, 0.4, 1.0)):
            file = f"{kind}-{number}.safetensors"
            server.ensure(f"controlnet/{file}")
            net = w.add("ControlNetLoader", control_net_name=file)
            if w.fast and number == 1:  # beside one on the host's path
                net = w.add("SwitchyardAccelerateControlNet", control_net=net, first_run="wait")
            applied = w.add("ControlNetApplyAdvanced", positive=conds[0], negative=conds[1],
                            control_net=net, image=image, strength=strength, start_percent=start,
                            end_percent=end)  # fmt: skip
            conds = (applied, [applied[0], 1])
        w.sample(model, *conds, w.latent(), record="controlnets", steps=4)

    _, runs = compare(server, kind, build)
    assert runs[0]["controlnets"] == 2


def test_a_t2i_adapter(server):
    def build(w):
        file = "tiny-sd15-t2i.safetensors"
        server.ensure(f"controlnet/{file}")
        adapter = w.add("ControlNetLoader", control_net_name=file)
        image = w.add("TestImage", seed=5, width=128, height=128)
        positive = w.add("ControlNetApply", conditioning=w.context(1), control_net=adapter,
                         image=image, strength=0.8)  # fmt: skip
        w.sample(w.model(), positive, w.context(2), w.latent(), record="adapter")

    compare(server, SD15, build)


@both
def test_two_checkpoints_alternating(server, kind):
    def build(letter):
        def inner(w):
            w.sample(w.model(letter), w.context(1), w.context(2), w.latent(), record=letter)

        return inner

    latents = {}
    for letter in "abaab":
        records, _ = compare(server, kind, build(letter))
        latent = records[letter]["latent"]
        assert torch.equal(latents.setdefault(letter, latent), latent)
    assert relative_error(latents["a"], latents["b"]) > 0.1


@both
def test_a_prompt_edited_between_runs(server, kind):
    def build(seed):
        def inner(w):
            w.sample(w.model(), w.context(seed), w.context(2), w.latent(), record=str(seed))

        return inner

    latents = [compare(server, kind, build(seed))[0][str(seed)]["latent"] for seed in (10, 11, 10)]
    assert torch.equal(latents[0], latents[2])
    assert relative_error(latents[1], latents[0]) > 1e-3


@both
def test_prompts_scheduled_over_steps(server, kind):
    def build(w):
        parts = [
            w.add("ConditioningSetTimestepRange", conditioning=w.context(seed, tokens),
                  start=start, end=end)
            for seed, tokens, start, end in ((1, 77, 0.0, 0.4), (3, 154, 0.3, 1.0))
        ]  # fmt: skip
        positive = w.add("ConditioningCombine", conditioning_1=parts[0], conditioning_2=parts[1])
        w.sample(w.model(), positive, w.context(2), w.latent(), record="scheduled", steps=5)

    compare(server, kind, build)


@both
def test_prompts_by_region(server, kind):
    def build(w):
        area = w.add("ConditioningSetArea", conditioning=w.context(1), width=64, height=96, x=32,
                     y=0, strength=1.0)  # fmt: skip
        image = w.add("TestImage", seed=5, width=128, height=128)
        mask = w.add("ConditioningSetMask", conditioning=w.context(3), mask=[image[0], 1],
                     strength=0.8, set_cond_area="mask bounds")  # fmt: skip
        positive = w.add("ConditioningCombine", conditioning_1=area, conditioning_2=mask)
        positive = w.add("ConditioningCombine", conditioning_1=positive,
                         conditioning_2=w.context(4))  # fmt: skip
        w.sample(w.model(), positive, w.context(2), w.latent(), record="regions")

    compare(server, kind, build)


@both
@pytest.mark.parametrize("fake", ["wrapper_context", "apply_context", "function_wrapper"])
@pytest.mark.parametrize("first", [False, True], ids=["after", "before"])
def test_a_wrapper_that_changes_the_prompt_at_each_step(server, kind, fake, first):
    def build(w):
        model = w.model()
        if first:  # between the loader and the engine
            wrapped = w.add("TestFake", model=w.loader, kind=fake)
            if w.fast:
                w.workflow[model[0]]["inputs"]["model"] = wrapped
            else:
                model = wrapped
        else:
            model = w.add("TestFake", model=model, kind=fake)
        w.sample(model, w.context(1), w.context(2), w.latent(), record="context", steps=4)

    compare(server, kind, build)


def test_a_patch_by_a_node_is_told_by_its_name(server):
    def build(w):
        model = w.add("FreeU_V2", model=w.model(), b1=1.3, b2=1.4, s1=0.9, s2=0.2)
        w.sample(model, w.context(1), w.context(2), w.latent(), record="freeu")

    _, runs = compare(server, SD15, build, mode="host")
    assert runs[0]["reasons"] == [{"text": "FreeU_V2 changes the up blocks", "node": "FreeU_V2"}]


def test_a_patch_by_a_pack_is_told_by_its_folder(server):
    def build(w):
        model = w.add("TestFake", model=w.model(), kind="attention_replace")
        w.sample(model, w.context(1), w.context(2), w.latent(), record="replaced")

    _, runs = compare(server, SD15, build, mode="host")
    assert runs[0]["reasons"][0]["node"] == "testpack"


@pytest.mark.skipif(not os.environ.get("COMFYUI_PACKS"), reason="COMFYUI_PACKS names no packs")
def test_beside_other_packs(server, models_folder, tmp_path):
    """Real packs, by their folders, separated as in PATH: the picture is right with them loaded."""

    def build(w):
        model = w.lora(w.model(), "1", 0.7)
        w.sample(model, w.context(1), w.context(2), w.latent(), record="packs")

    packs = [Path(name).expanduser() for name in os.environ["COMFYUI_PACKS"].split(os.pathsep)]
    with Server(server.installation, tmp_path, models=models_folder, packs=packs) as crowded:
        assert [pack.name for pack in packs if f"IMPORT FAILED): {pack}" in crowded.log] == []
        expected, _ = run(crowded, SD15, build, fast=False)
        records, runs = run(crowded, SD15, build, fast=True)
    assert relative_error(records["packs"]["latent"], expected["packs"]["latent"]) < CLOSE
    assert runs[0]["mode"] == "engine" or runs[0]["reasons"]


_WIDE = ["wide-sd15", "wide-sdxl", "wide-sdxl-inpaint"]


@pytest.mark.parametrize(
    "kind", _WIDE if os.environ.get("COMFYUI_TEST_WIDE") else _WIDE[:1]
)  # those of SDXL take a minute each, and 4 GiB
def test_checkpoints_that_comfyui_detects_by_itself(server, kind):
    def build(w):
        model = w.lora(w.model(), "1", 0.7)
        w.sample(model, w.context(1), w.context(2), w.latent(64, 64), record="wide", steps=2)

    assert CONFIGS[kind].block_out_channels[0] == 320
    compare(server, kind, build)
