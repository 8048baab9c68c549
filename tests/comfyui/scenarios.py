"""What is run through a server's /prompt, with the engine and without, and the rule for it.

A scenario builds its workflows for any kind of checkpoint, tiny ones for a CPU or the published
structures for a GPU, and hands them to a `Comparison`. Nothing here imports ComfyUI.

The rule: at every call of the denoiser, all taken along one trajectory, float32's, the accelerated
result is at most 1.1x as far from float32's as ComfyUI's own in half precision. Where ComfyUI's own
is float32 itself, as on a CPU, the two are close.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, equal

from .checkpoints import CONFIGS
from .server import Server
from .workflows import Graph, Link

CLOSE = 1e-4
"""Between two runs in float32: the order of additions differs."""

RATIO = 1.1
SLACK = 1e-5
"""Beside the ratio: where an error is this small, ties in rounding decide."""

HOST_AT_MOST = 0.1
"""A host that is further away than this is wrong itself, and nothing to compare with."""

HOST_USUALLY = 0.01
"""Half precision errs by a fraction of this. Of a host further away each image's is noted."""

KEPT_MIB = 512
"""What a server may keep of the GPU's memory once everything is unloaded, beside what it kept when
that was first done: kernels, workspaces."""

PIXELS = {"tiny": 128, "wide": 64, "full-sd15": 512, "full-sdxl": 1024}
"""Of a side, by what the kind's name begins with."""

TIMEOUT = 300.0

Record = dict[str, Tensor]


def relative_error(result: Tensor, expected: Tensor) -> float:
    """Relative L2 distance."""
    return float((result - expected).norm() / expected.norm())


class Workflow(Graph):
    """A graph for one kind of checkpoint, with or without the engine: `model` is what differs."""

    def __init__(self, server: Server, kind: str, fast: bool) -> None:
        super().__init__()
        self.server, self.kind, self.fast = server, kind, fast
        self.side = next(side for begin, side in PIXELS.items() if kind.startswith(begin))
        self.samplers: list[tuple[str, str]] = []

    def pixels(self, part: float) -> int:
        """Of a part of the usual side."""
        return int(self.side * part)

    def load(self, letter: str = "a") -> Link:
        """The MODEL of a checkpoint, as it is."""
        self.server.ensure(f"checkpoints/{self.kind}-{letter}.safetensors")
        self.loader = self.checkpoint(self.kind, letter)
        return self.loader

    def model(self, letter: str = "a") -> Link:
        """The MODEL of a checkpoint, on the engine if this graph is to be fast."""
        loaded = self.load(letter)
        return self.accelerated(loaded) if self.fast else loaded

    def accelerated(self, model: Link) -> Link:
        return self.add("SwitchyardAccelerate", model=model, first_run="wait", compare_once=False)

    @property
    def vae(self) -> Link:
        return [self.loader[0], 2]

    def lora(self, model: Link, name: str, strength: float) -> Link:
        file = f"{self.kind}-{name}.safetensors"
        self.server.ensure(f"loras/{file}")
        return self.add("LoraLoaderModelOnly", model=model, lora_name=file,
                        strength_model=strength)  # fmt: skip

    def context(self, seed: int, tokens: int = 77) -> Link:
        return self.prompt(self.kind, seed, tokens)

    def image(self, seed: int) -> Link:
        """A picture; output 1 of the same node is a mask."""
        return self.add("TestImage", seed=seed, width=self.side, height=self.side)

    def empty(self, width: float = 1, height: float = 1, batch: int = 1) -> Link:
        """A latent for an image of this many usual sides."""
        return self.latent(self.pixels(width), self.pixels(height), batch)

    def sample(self, *args: Any, **kwargs: Any) -> Link:
        latent = super().sample(*args, **kwargs)
        self.samplers.append((latent[0], kwargs["record"]))
        return latent


Build = Callable[[Workflow], None]


@dataclass(frozen=True)
class Ran:
    """Of each sampler of a workflow: what it recorded, where, and the journal's entry for it."""

    records: dict[str, Record]
    paths: dict[str, Path]
    runs: list[dict[str, Any]]

    @property
    def latent(self) -> Tensor:
        """Of the only sampler."""
        (record,) = self.records.values()
        return record["latent"]


@dataclass(frozen=True)
class Outcome:
    """Of one workflow: without the engine, and with it."""

    plain: Ran
    fast: Ran


_numbers = itertools.count()


@dataclass
class Comparison:
    """Runs workflows on the host's path and on the engine, and holds them to the rule.

    host: a server with the pack. truth: one that computes in float32; the same where both do.
    errors: of every call so far, (engine's, host's, where). failed: what broke the rule. notes:
    what else was measured.
    """

    host: Server
    truth: Server
    kind: str
    timeout: float = TIMEOUT
    errors: list[tuple[float, float, str]] = field(default_factory=list)
    runs: list[dict[str, Any]] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)
    _kept: dict[tuple[str, str], Ran] = field(default_factory=dict, repr=False)

    @property
    def float32(self) -> bool:
        """Whether the host computes in float32 itself."""
        return self.truth is self.host

    def __call__(self, build: Build, mode: str = "engine", again: bool = False) -> Outcome:
        """Both ways. The host's path runs once for equal workflows, or `again`.

        Where a call breaks the rule or a sampling takes another path than `mode`, `failed` says so.
        """
        truth = self._reference("truth", self.truth, build, None, False)
        plain = truth
        if not self.float32 or again:
            plain = self._reference("plain", self.host, build, truth, again)
        fast = self._run(self.host, build, True, truth)
        self.runs += fast.runs
        self.failed += [f"ran as {run}" for run in fast.runs if not _expected(run, mode)]
        self.failed += self._judge(truth, plain, fast)
        return Outcome(plain, fast)

    def same(self, one: Ran, other: Ran) -> None:
        """Two accelerated runs of one workflow are equal bit for bit."""
        away = _away(one.latent, other.latent)
        assert equal(one.latent, other.latent), f"the same again is {away:.3g} away"

    def freed(self) -> int:
        """MiB in use on the GPU once the servers have unloaded everything; 0 without a GPU."""
        if not self.float32:
            self.truth.free()
        return self.host.free()

    def _reference(
        self, role: str, server: Server, build: Build, follow: Ran | None, again: bool
    ) -> Ran:
        workflow = Workflow(server, self.kind, False)
        build(workflow)
        key = (role, json.dumps(workflow.workflow))
        if again or key not in self._kept:
            self._kept[key] = self._run(server, build, False, follow)
        return self._kept[key]

    def _run(self, server: Server, build: Build, fast: bool, follow: Ran | None) -> Ran:
        workflow = Workflow(server, self.kind, fast)
        build(workflow)
        names = {}
        for node, record in workflow.samplers:
            inputs = workflow.workflow[node]["inputs"]
            # A name of its own has the node run, whatever ran before.
            inputs["record"] = names[record] = f"{next(_numbers)} {record}"
            if follow is not None:
                inputs["follow"] = str(follow.paths[record])
        result = server.run(workflow.workflow, self.timeout)
        paths = {record: server.record_path(name) for record, name in names.items()}
        records = {record: server.record(name) for record, name in names.items()}
        runs = [result.outputs[node]["run"][0] for node, _ in workflow.samplers]
        return Ran(records, paths, runs)

    def _judge(self, truth: Ran, plain: Ran, fast: Ran) -> list[str]:
        """Add the errors of every call. Returns what breaks the rule."""
        failed = []
        for name, expected in truth.records.items():
            own, found = plain.records[name], fast.records[name]
            for way, record in (("host", own), ("engine", found)):
                if record.keys() != expected.keys():
                    failed.append(f"{name}: {way} recorded {sorted(record)}")
                    return failed
                failed += [
                    f"{name}: the {way}'s {key} differs"
                    for key in expected
                    if key.startswith("input_") and _away(record[key], expected[key]) > CLOSE
                ]
            for call in range(sum(key.startswith("x_") for key in expected)):
                # What guidance and hooks make of both predictions: it multiplies what two errors
                # in half precision differ by.
                names = [f"denoised_{call}"] if self.float32 else []
                names += [n for n in (f"cond_{call}", f"uncond_{call}") if n in expected]
                if len(names) < (2 if self.float32 else 1):
                    failed.append(f"{name}, call {call}: no prediction was recorded")
                for part in names:
                    failed += self._judge_part(
                        f"{name}, call {call}", call, part, expected, own, found
                    )
            if self.float32 and not _away(found["latent"], expected["latent"]) < CLOSE:
                failed.append(f"{name}: the last latent differs")
        return failed

    def _judge_part(
        self, where: str, call: int, part: str, expected: Record, own: Record, found: Record
    ) -> list[str]:
        """One prediction of a call: the errors are of the noise that the network predicts."""
        size = (expected[f"x_{call}"] - expected[part]).norm()
        error, host = (
            float((record[part] - expected[part]).norm() / size) for record in (found, own)
        )
        kind = part.partition("_")[0]
        where = where if kind == "denoised" else f"{where}, {kind}"
        self.errors.append((error, host, where))
        if host > HOST_USUALLY:
            away = own[part] - expected[part]
            each = away.reshape(len(away), -1).norm(dim=1) / size
            self.notes.setdefault("host_by_image", {})[where] = each.tolist()
        limit = CLOSE if self.float32 else RATIO * host + SLACK
        if error <= limit and host < HOST_AT_MOST:  # NaN is neither
            return []
        return [f"{where}: {error:.3g} from float32, the host {host:.3g}"]


def _away(result: Tensor, expected: Tensor) -> float:
    return 0.0 if equal(result, expected) else relative_error(result, expected)


def _expected(run: dict[str, Any], mode: str) -> bool:
    # No library stood in for a kernel: the engine was to wait for them.
    on_engine = (run["reasons"], run["host_calls"], run["compiling"]) == ([], 0, False)
    return bool(run["mode"] == mode and (mode != "engine" or on_engine))


@dataclass(frozen=True)
class Scenario:
    """One or several workflows, for the checkpoints of some families and sizes."""

    run: Callable[[Comparison], None]
    families: tuple[str, ...]
    sizes: tuple[str, ...]

    def __call__(self, compare: Comparison) -> None:
        """Raises AssertionError where the rule is broken, or what the scenario itself expects."""
        self.run(compare)
        assert not compare.failed, "\n".join(compare.failed)

    @property
    def name(self) -> str:
        return self.run.__name__

    def fits(self, kind: str) -> bool:
        """Whether the scenario is for this kind of checkpoint."""
        size, _, family = kind.partition("-")
        return size in self.sizes and family in self.families


SCENARIOS: list[Scenario] = []

_Run = Callable[[Comparison], None]


def _scenario(*families: str, sizes: tuple[str, ...] = ("tiny", "full")) -> Callable[[_Run], _Run]:
    def add(run: _Run) -> _Run:
        SCENARIOS.append(Scenario(run, families or ("sd15", "sdxl"), sizes))
        return run

    return add


@_scenario()
def text_to_image(compare: Comparison) -> None:
    def build(w: Workflow) -> None:
        model = w.model()
        positive = w.add("CLIPTextEncode", text="a castle on a hill", clip=[w.loader[0], 1])
        negative = w.add("CLIPTextEncode", text="", clip=[w.loader[0], 1])
        w.sample(model, positive, negative, w.empty(1, 1.5), record="txt2img")

    compare(build)


@_scenario("sd15")
def another_sampler_that_leaves_the_schedule(compare: Comparison) -> None:
    def build(w: Workflow) -> None:
        w.sample(w.model(), w.context(1), w.context(2), w.empty(), record="heun",
                 sampler_name="dpmpp_2s_ancestral", scheduler="karras")  # fmt: skip

    compare(build)


@_scenario()
def image_to_image(compare: Comparison) -> None:
    def build(w: Workflow) -> None:
        model = w.model()
        latent = w.add("VAEEncode", pixels=w.image(4), vae=w.vae)
        w.sample(model, w.context(1), w.context(2), latent, record="img2img", denoise=0.6)

    compare(build)


@_scenario("sd15")
def a_noise_mask(compare: Comparison) -> None:
    def build(w: Workflow) -> None:
        model, image = w.model(), w.image(4)
        latent = w.add("VAEEncode", pixels=image, vae=w.vae)
        masked = w.add("SetLatentNoiseMask", samples=latent, mask=[image[0], 1])
        w.sample(model, w.context(1), w.context(2), masked, record="mask", denoise=0.8)

    compare(build)


@_scenario("sd15-inpaint", "sdxl-inpaint")
def inpainting_with_a_model_made_for_it(compare: Comparison) -> None:
    def build(w: Workflow) -> None:
        model, image = w.model(), w.image(4)
        inpaint = w.add("InpaintModelConditioning", positive=w.context(1), negative=w.context(2),
                        vae=w.vae, pixels=image, mask=[image[0], 1], noise_mask=True)  # fmt: skip
        positive, negative, latent = ([inpaint[0], output] for output in range(3))
        w.sample(model, positive, negative, latent, record="inpaint")

    compare(build)


@_scenario()
def a_second_pass_at_a_larger_size(compare: Comparison) -> None:
    def build(w: Workflow) -> None:
        model, positive, negative = w.model(), w.context(1), w.context(2)
        first = w.sample(model, positive, negative, w.empty(), record="small")
        larger = w.add("LatentUpscale", samples=first, upscale_method="bilinear",
                       width=w.pixels(1.5), height=w.pixels(1.25), crop="disabled")  # fmt: skip
        w.sample(model, positive, negative, larger, record="large", denoise=0.5)

    small, large = compare(build).fast.runs
    assert small["dims"] != large["dims"]


@_scenario()
def four_images_at_once(compare: Comparison) -> None:
    def build(w: Workflow) -> None:
        w.sample(w.model(), w.context(1), w.context(2), w.empty(batch=4), record="batch")

    compare(build)


@_scenario()
def long_prompts(compare: Comparison) -> None:
    for positive, negative in ((154, 154), (154, 77), (231, 154)):

        def build(w: Workflow, positive: int = positive, negative: int = negative) -> None:
            w.sample(w.model(), w.context(1, positive), w.context(2, negative), w.empty(),
                     record=f"{positive} and {negative} tokens")  # fmt: skip

        compare(build)


@_scenario()
def a_stack_of_loras(compare: Comparison) -> None:
    def build(w: Workflow) -> None:
        model = w.model()
        for name, strength in (("1", 0.8), ("loha", -0.5), ("lokr", 1.2)):
            model = w.lora(model, name, strength)
        w.sample(model, w.context(1), w.context(2), w.empty(), record="loras")

    (run,) = compare(build).fast.runs
    assert run["loras"] >= 2  # those on one matrix


@_scenario()
def a_lora_changed_and_back(compare: Comparison) -> None:
    def strength(value: float) -> Build:
        def build(w: Workflow) -> None:
            model = w.lora(w.model(), "2", value) if value else w.model()
            w.sample(model, w.context(1), w.context(2), w.empty(), record=f"lora {value}")

        return build

    found = [compare(strength(value)).fast for value in (0.5, 1.0, 0.5, 0, 0.5)]
    compare.same(found[0], found[2])
    compare.same(found[0], found[4])
    assert relative_error(found[1].latent, found[0].latent) > 1e-3
    assert relative_error(found[3].latent, found[0].latent) > 1e-3


@_scenario()
def two_controlnets_with_ranges(compare: Comparison) -> None:
    def build(w: Workflow) -> None:
        model, conds, image = w.model(), (w.context(1), w.context(2)), w.image(5)
        for number, strength, start, end in ((1, 0.7, 0.0, 0.6), (2, 0.4, 0.4, 1.0)):
            file = f"{w.kind}-{number}.safetensors"
            w.server.ensure(f"controlnet/{file}")
            net = w.add("ControlNetLoader", control_net_name=file)
            if w.fast and number == 1:  # beside one on the host's path
                net = w.add("SwitchyardAccelerateControlNet", control_net=net, first_run="wait")
            applied = w.add("ControlNetApplyAdvanced", positive=conds[0], negative=conds[1],
                            control_net=net, image=image, strength=strength, start_percent=start,
                            end_percent=end)  # fmt: skip
            conds = (applied, [applied[0], 1])
        w.sample(model, *conds, w.empty(), record="controlnets", steps=4)

    (run,) = compare(build).fast.runs
    assert run["controlnets"] == 2


@_scenario("sd15", sizes=("tiny",))
def a_t2i_adapter(compare: Comparison) -> None:
    def build(w: Workflow) -> None:
        file = "tiny-sd15-t2i.safetensors"
        w.server.ensure(f"controlnet/{file}")
        adapter = w.add("ControlNetLoader", control_net_name=file)
        positive = w.add("ControlNetApply", conditioning=w.context(1), control_net=adapter,
                         image=w.image(5), strength=0.8)  # fmt: skip
        w.sample(w.model(), positive, w.context(2), w.empty(), record="adapter")

    compare(build)


@_scenario()
def two_checkpoints_alternating(compare: Comparison) -> None:
    def build(letter: str) -> Build:
        def inner(w: Workflow) -> None:
            w.sample(w.model(letter), w.context(1), w.context(2), w.empty(), record=letter)

        return inner

    first: dict[str, Ran] = {}
    for letter in "abaab":
        fast = compare(build(letter)).fast
        compare.same(first.setdefault(letter, fast), fast)
    assert relative_error(first["a"].latent, first["b"].latent) > 0.1


@_scenario()
def a_prompt_edited_between_runs(compare: Comparison) -> None:
    def build(seed: int) -> Build:
        def inner(w: Workflow) -> None:
            w.sample(w.model(), w.context(seed), w.context(2), w.empty(), record=str(seed))

        return inner

    found = [compare(build(seed)).fast for seed in (10, 11, 10)]
    compare.same(found[0], found[2])
    assert relative_error(found[1].latent, found[0].latent) > 1e-3


@_scenario()
def prompts_scheduled_over_steps(compare: Comparison) -> None:
    def build(w: Workflow) -> None:
        parts = [
            w.add("ConditioningSetTimestepRange", conditioning=w.context(seed, tokens),
                  start=start, end=end)
            for seed, tokens, start, end in ((1, 77, 0.0, 0.4), (3, 154, 0.3, 1.0))
        ]  # fmt: skip
        positive = w.add("ConditioningCombine", conditioning_1=parts[0], conditioning_2=parts[1])
        w.sample(w.model(), positive, w.context(2), w.empty(), record="scheduled", steps=5)

    compare(build)


@_scenario()
def prompts_by_region(compare: Comparison) -> None:
    def build(w: Workflow) -> None:
        area = w.add("ConditioningSetArea", conditioning=w.context(1), width=w.pixels(0.5),
                     height=w.pixels(0.75), x=w.pixels(0.25), y=0, strength=1.0)  # fmt: skip
        mask = w.add("ConditioningSetMask", conditioning=w.context(3), mask=[w.image(5)[0], 1],
                     strength=0.8, set_cond_area="mask bounds")  # fmt: skip
        positive = w.add("ConditioningCombine", conditioning_1=area, conditioning_2=mask)
        positive = w.add("ConditioningCombine", conditioning_1=positive,
                         conditioning_2=w.context(4))  # fmt: skip
        w.sample(w.model(), positive, w.context(2), w.empty(), record="regions")

    compare(build)


@_scenario()
def a_wrapper_that_changes_the_prompt_at_each_step(compare: Comparison) -> None:
    for fake, first in itertools.product(
        ("wrapper_context", "apply_context", "function_wrapper"), (False, True)
    ):

        def build(w: Workflow, fake: str = fake, first: bool = first) -> None:
            if first:  # between the loader and the engine
                model = w.add("TestFake", model=w.load(), kind=fake)
                model = w.accelerated(model) if w.fast else model
            else:
                model = w.add("TestFake", model=w.model(), kind=fake)
            w.sample(model, w.context(1), w.context(2), w.empty(),
                     record=fake, steps=4)  # fmt: skip

        compare(build)


@_scenario()
def a_patch_by_a_node_is_told_by_its_name(compare: Comparison) -> None:
    def build(w: Workflow) -> None:
        model = w.add("FreeU_V2", model=w.model(), b1=1.3, b2=1.4, s1=0.9, s2=0.2)
        w.sample(model, w.context(1), w.context(2), w.empty(), record="freeu")

    (run,) = compare(build, mode="host").fast.runs
    assert run["reasons"] == [{"text": "FreeU_V2 changes the up blocks", "node": "FreeU_V2"}]


@_scenario("sd15")
def a_patch_by_a_pack_is_told_by_its_folder(compare: Comparison) -> None:
    def build(w: Workflow) -> None:
        model = w.add("TestFake", model=w.model(), kind="attention_replace")
        w.sample(model, w.context(1), w.context(2), w.empty(), record="replaced")

    (run,) = compare(build, mode="host").fast.runs
    assert run["reasons"][0]["node"] == "testpack"


@_scenario("sd15", "sdxl", "sdxl-inpaint", sizes=("wide",))
def a_checkpoint_that_comfyui_detects_by_itself(compare: Comparison) -> None:
    def build(w: Workflow) -> None:
        model = w.lora(w.model(), "1", 0.7)
        w.sample(model, w.context(1), w.context(2), w.empty(), record="wide", steps=2)

    assert CONFIGS[compare.kind].block_out_channels[0] == 320
    compare(build)


@_scenario()
def plain_and_accelerated_by_turns(compare: Comparison) -> None:
    """The last: what is measured here needs the engine warm."""

    def build(strength: float) -> Build:
        def inner(w: Workflow) -> None:
            model = w.lora(w.model(), "1", strength) if strength else w.model()
            w.sample(model, w.context(1), w.context(2), w.empty(), record=f"at {strength}")

        return inner

    compare(build(0))
    before = compare.freed()
    first, other, last = (compare(build(value), again=True) for value in (0, 0.7, 0))
    loaded = compare.host.memory_in_use()
    after = compare.freed()
    compare.notes["vram_mib"] = {"before": before, "loaded": loaded, "after_free": after}
    compare.same(first.fast, last.fast)
    own = max(host for _, host, _ in compare.errors)
    assert relative_error(first.plain.latent, last.plain.latent) <= max(CLOSE, own)
    assert relative_error(first.plain.latent, other.plain.latent) > 1e-3
    assert after <= before + KEPT_MIB
