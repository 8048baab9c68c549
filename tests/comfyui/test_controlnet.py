"""CONTROL_NETs on engines: the host's own result in every arrangement, memory that it counts."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import comfy.cldm.cldm
import comfy.controlnet
import comfy.model_management as management
import pytest
import torch

from accel.errors import OutOfMemory
from accel.hosts.comfyui import ahead, controlnet
from accel.hosts.comfyui.builder import builder
from accel.hosts.comfyui.controlnet import EngineMixin, accelerate_controlnet, why_not
from accel.hosts.comfyui.journal import STATUS_EVENT, journal
from accel.hosts.comfyui.patcher import accelerate
from accel.hosts.comfyui.pool import NetworkPatcher, pool
from accel.hosts.comfyui.run import Options
from accel.runtime.pool import PINNED, process_pool
from accel.runtime.weights import weights_bytes

from .checkpoints import ensure
from .host import call, conditioning, relative_error, sample

TOLERANCE = 1e-4
WAIT = Options(wait=True, node_id="7", title="net")


@pytest.fixture(autouse=True)
def _own_engines() -> Iterator[None]:
    pool.cache_clear()
    controlnet._lineup.cache_clear()
    yield
    management.unload_all_models()
    pool.cache_clear()


@pytest.fixture
def lines() -> Iterator[list[tuple[str, str]]]:
    """What the node's line said: state and text."""
    said: list[tuple[str, str]] = []

    def listen(event: str, data: dict[str, Any]) -> None:
        if event == STATUS_EVENT and data["node_id"] == WAIT.node_id:
            said.append((data["state"], data["text"]))

    stop = journal().subscribe(listen)
    yield said
    stop()


@pytest.fixture
def net(models_folder) -> Callable[..., Any]:
    """`net("tiny-sd15", 2)`: a CONTROL_NET, read again at every call."""

    def loaded(kind: str = "tiny-sd15", number: int | str = 1) -> Any:
        (path,) = ensure(models_folder, f"controlnet/{kind}-{number}.safetensors")
        return comfy.controlnet.load_controlnet(str(path))

    return loaded


def image(seed: int, batch: int = 1) -> torch.Tensor:
    """Coarse and far brighter than pictures are: seeded weights hardly react to anything less."""
    generator = torch.Generator().manual_seed(seed)
    return 60 * torch.rand(batch, 8, 8, 3, generator=generator).repeat(1, 16, 16, 1)


def prompts(kind: str = "tiny-sd15") -> tuple[list[Any], list[Any]]:
    return conditioning(kind, 1), conditioning(kind, 2)


def applied(
    conds: tuple[list[Any], list[Any]],
    control: Any,
    strength: float = 1.0,
    start: float = 0.0,
    end: float = 1.0,
    seed: int = 5,
    batch: int = 1,
) -> tuple[list[Any], list[Any]]:
    """Positive and negative after ComfyUI's own node."""
    positive, negative, *_ = call(
        "nodes",
        "ControlNetApplyAdvanced",
        positive=conds[0],
        negative=conds[1],
        control_net=control,
        image=image(seed, batch),
        strength=strength,
        start_percent=start,
        end_percent=end,
    )
    return positive, negative


def engines(kind: str = "controlnet") -> list[NetworkPatcher]:
    """Those that hold memory, by instance."""
    found = [e for e in pool()._patchers.values() if e.structure.kind == kind and e.network]
    return sorted(found, key=lambda engine: engine.instance)


def forwards() -> list[int]:
    return [engine.network.counters.forwards for engine in engines()]


def test_the_three_ways_to_combine_model_and_net_agree(load, net):
    for kind in ("tiny-sd15", "tiny-sdxl"):
        plain, control = load(kind), net(kind)
        fast = accelerate(plain, Options(wait=True))
        fast_control = accelerate_controlnet(control, WAIT)
        expected = sample(plain, *applied(prompts(kind), control))
        assert relative_error(sample(plain, *prompts(kind)), expected) > 0.01
        pool.cache_clear()
        for model, used in ((plain, fast_control), (fast, control), (fast, fast_control)):
            result = sample(model, *applied(prompts(kind), used))
            assert relative_error(result, expected) < TOLERANCE
            on_engine = 0 if used is control else 3
            assert forwards() == ([on_engine] if on_engine else [])
            assert [e.network.counters.forwards for e in engines("unet")] == (
                [3] if model is fast else []
            )
            management.unload_all_models()


def test_nets_in_turn_share_an_engine(load, net):
    plain, nets = load(), [net(number=number) for number in (1, 2)]
    model = accelerate(plain, Options(wait=True))
    fast = [accelerate_controlnet(control, WAIT) for control in nets]
    expected = [sample(plain, *applied(prompts(), control)) for control in nets]
    assert relative_error(*expected) > 0.01
    for index in (0, 1, 0, 1, 1, 0):
        result = sample(model, *applied(prompts(), fast[index]))
        assert relative_error(result, expected[index]) < TOLERANCE
    assert [engine.instance for engine in engines()] == [0]


def test_no_file_is_brought_to_its_engine(load, net, models_folder, monkeypatch):
    """Which file a net is of the host does not tell: it would wait there for nothing."""
    monkeypatch.setattr(ahead, "has_room_for", lambda size: True)
    sample(load(), *applied(prompts(), accelerate_controlnet(net(), WAIT)))
    (own,) = engines()
    (path,) = ensure(models_folder, "controlnet/tiny-sd15-2.safetensors")
    size = own.loaded_size()
    ahead.bring_nearer(str(path), threading.Event())
    assert own.loaded_size() == size
    assert process_pool().report()["tiers"].get(PINNED, {"blocks": 0})["blocks"] == 0


def chain(first: Any, second: Any, kind: str = "tiny-sd15") -> tuple[list[Any], list[Any]]:
    conds = applied(prompts(kind), first, 0.6, 0.0, 0.7, seed=5)
    return applied(conds, second, 1.4, 0.3, 1.0, seed=6)


def test_two_nets_of_one_structure_in_a_chain_have_an_engine_each(load, net):
    model, first, second = load(), net(number=1), net(number=2)
    expected = sample(model, *chain(first, second), steps=5)
    fast = [accelerate_controlnet(control, WAIT) for control in (first, second)]
    for mixed in ((fast[0], second), (first, fast[1]), fast):
        management.unload_all_models()
        result = sample(model, *chain(*mixed), steps=5)
        assert relative_error(result, expected) < TOLERANCE
    assert [engine.instance for engine in engines()] == [0, 1]
    assert all(0 < count < 5 for count in forwards())
    assert [engine.network.counters.activations for engine in engines()] == [[], []]
    swapped = sample(model, *chain(fast[1], fast[0]), steps=5)
    assert relative_error(swapped, sample(model, *chain(second, first), steps=5)) < TOLERANCE
    # Each finds the engine again that has its weights.
    assert [engine.network.counters.activations for engine in engines()] == [[], []]


def test_switching_a_range_on_and_off_binds_two_shapes(load, net):
    plain, control = load(), net()
    model, fast = accelerate(plain, Options(wait=True)), accelerate_controlnet(control, WAIT)
    for _ in range(2):
        for start, end in ((0.0, 0.5), (0.3, 0.7)):
            result = sample(model, *applied(prompts(), fast, 1.0, start, end), steps=6)
            expected = sample(plain, *applied(prompts(), control, 1.0, start, end), steps=6)
            assert relative_error(result, expected) < TOLERANCE
    (unet,), (own,) = engines("unet"), engines()
    assert unet.network.counters.binds == 2
    assert own.network.counters.binds == 1
    assert unet.network.counters.forwards == 24 > own.network.counters.forwards > 4


def test_one_net_twice_in_a_chain_has_one_engine(load, net):
    plain, control = load(), net()
    model, fast = accelerate(plain, Options(wait=True)), accelerate_controlnet(control, WAIT)
    result = sample(model, *chain(fast, fast), steps=4)
    assert relative_error(result, sample(plain, *chain(control, control), steps=4)) < TOLERANCE
    (engine,) = engines()
    assert engine.network.counters.forwards > 4
    assert engine.network.counters.activations == []


def test_it_works_beside_a_t2i_adapter(load, net):
    model, control, adapter = load(), net(), net(number="t2i")
    assert accelerate_controlnet(adapter, WAIT) is adapter
    fast = accelerate_controlnet(control, WAIT)
    for order in ((0, 1), (1, 0)):
        pairs = ((control, adapter), (fast, adapter))
        expected, result = (sample(model, *chain(pair[order[0]], pair[order[1]])) for pair in pairs)
        assert relative_error(result, expected) < TOLERANCE
    assert sum(forwards()) > 0


@pytest.mark.parametrize("hints", [1, 2, 3])
def test_batches_with_a_hint_each_or_fewer(hints, load, net):
    model, control = load(), net()
    conds = (
        applied(prompts(), used, batch=hints)
        for used in (control, accelerate_controlnet(control, WAIT))
    )
    expected, result = (sample(model, *both, batch=3) for both in conds)
    assert relative_error(result, expected) < TOLERANCE
    assert len(forwards()) == 1


def test_pooling_and_the_other_type_of_strength(load, net):
    model, control = load(), net()
    control.global_average_pooling = True
    control.strength_type = comfy.controlnet.StrengthType.LINEAR_UP
    fast = accelerate_controlnet(control, WAIT)
    result = sample(model, *applied(prompts(), fast, 0.8))
    assert relative_error(result, sample(model, *applied(prompts(), control, 0.8))) < TOLERANCE
    assert forwards() == [3]


def test_other_sizes_and_another_size_of_hint(load, net):
    model, control = load(), net()
    fast = accelerate_controlnet(control, WAIT)
    for size in ((16, 16), (24, 16), (9, 15), (16, 16)):
        expected = sample(model, *applied(prompts(), control), size=size)
        result = sample(model, *applied(prompts(), fast), size=size)
        assert relative_error(result, expected) < TOLERANCE
    (engine,) = engines()
    assert engine.network.counters.binds == 3


def test_a_union_type_is_ignored_where_the_host_ignores_it(load, net):
    model, control = load(), net()
    fast = accelerate_controlnet(control, WAIT)
    (typed,) = call(
        "comfy_extras.nodes_controlnet",
        "SetUnionControlNetType",
        control_net=fast,
        type="canny/lineart/anime_lineart/mlsd",
    )
    assert isinstance(typed, EngineMixin)
    result = sample(model, *applied(prompts(), typed))
    assert relative_error(result, sample(model, *applied(prompts(), control))) < TOLERANCE
    assert forwards() == [3]


def test_an_unknown_argument_goes_to_the_host(load, net, lines, caplog):
    model, control = load(), net()
    control.set_extra_arg("strange", torch.ones(1))
    fast = accelerate_controlnet(control, WAIT)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            result = sample(model, *applied(prompts(), fast))
            assert torch.equal(result, sample(model, *applied(prompts(), control)))
    assert [state for state, _ in lines] == ["host", "host"]
    assert "strange" in lines[0][1]
    assert sum("strange" in record.message for record in caplog.records) == 1


def _union() -> Any:
    module = comfy.cldm.cldm.ControlNet(
        image_size=32,
        in_channels=4,
        model_channels=32,
        hint_channels=3,
        num_res_blocks=[1, 1],
        channel_mult=[1, 2],
        num_heads=4,
        use_spatial_transformer=True,
        transformer_depth=[1, 1],
        transformer_depth_middle=1,
        context_dim=32,
        legacy=False,
        union_controlnet_num_control_type=6,
    )
    return comfy.controlnet.ControlNet(module, load_device=torch.device("cpu"))


def _sd35() -> Any:
    return comfy.controlnet.ControlNetSD35(torch.nn.Linear(1, 1), load_device=torch.device("cpu"))


def _other() -> Any:
    return comfy.controlnet.ControlNet(torch.nn.Linear(1, 1), load_device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: comfy.controlnet.ControlLora({}), "Control-LoRA"),
        (_sd35, "ControlNetSD35"),
        (_other, "Linear"),
        (_union, "union"),
    ],
)
def test_what_is_not_supported_comes_back_itself(make, why, lines):
    control = make()
    before = dict(vars(control))
    assert accelerate_controlnet(control, WAIT) is control
    assert vars(control) == before
    ((state, text),) = lines
    assert state == "off" and why in text and "\n" not in text


def test_changed_nets_are_refused_by_name(net):
    class Kept(torch.nn.Parameter):
        pass

    def quantised(control: Any) -> None:
        layer = control.control_model.time_embed[0]
        layer.weight = Kept(layer.weight.detach())

    def hooked(control: Any) -> None:
        control.control_model.middle_block.register_forward_hook(lambda *_: None)

    def method(control: Any) -> None:
        control.get_control = lambda *_: None

    def part(control: Any) -> None:
        control.control_model_wrapped.add_object_patch("time_embed", torch.nn.Identity())

    def patcher(control: Any) -> None:
        kind = type(control.control_model_wrapped)
        control.control_model_wrapped.__class__ = type("GGUFPatcher", (kind,), {})

    def half(control: Any) -> None:
        control.manual_cast_dtype = torch.float64

    def device(control: Any) -> None:
        control.control_model_wrapped.load_device = torch.device("mps")

    assert why_not(net()) is None
    cases = (
        (quantised, "Kept"),
        (hooked, "hooks"),
        (method, "get_control"),
        (part, "replaced"),
        (patcher, "GGUFPatcher"),
        (half, "float64"),
        (device, "'mps' is not supported"),
    )
    for change, why in cases:
        control = net()
        change(control)
        assert why in str(why_not(control))
        assert accelerate_controlnet(control, WAIT) is control


def test_what_another_node_changes_later_goes_to_the_host(load, net, lines):
    model, control = load(), net()
    fast = accelerate_controlnet(control, WAIT)
    sample(model, *applied(prompts(), fast))
    hook = control.control_model.middle_block_out.register_forward_hook(
        lambda module, args, output: output * 2
    )
    result = sample(model, *applied(prompts(), fast))
    assert torch.equal(result, sample(model, *applied(prompts(), control)))
    hook.remove()
    result = sample(model, *applied(prompts(), fast))
    assert relative_error(result, sample(model, *applied(prompts(), control))) < TOLERANCE
    assert [state for state, _ in lines] == ["engine", "host", "engine"]
    assert "hooks" in lines[1][1]


def test_the_host_loads_counts_and_evicts_the_engine_alone(load, net):
    model, control = load(), net()
    fast = accelerate_controlnet(control, WAIT)
    conds = applied(prompts(), fast)
    expected = sample(model, *applied(prompts(), control))
    management.unload_all_models()
    for _ in range(2):
        assert relative_error(sample(model, *conds), expected) < TOLERANCE
        (engine,) = engines()
        loaded = management.loaded_models()
        assert engine in loaded and control.control_model_wrapped not in loaded
        weights = sum(p.numel() * 4 for p in control.control_model.parameters())
        assert engine.loaded_size() > weights
        management.free_memory(1e30, torch.device("cpu"))
        assert management.loaded_models() == []
        assert engine.loaded_size() == 0 and engines() == []


def _on_call(monkeypatch: pytest.MonkeyPatch, number: int, action: Callable[[Any], None]) -> None:
    """Do something before the engine's call of that number."""
    original, calls = NetworkPatcher.run, []

    def run(self: Any, *args: Any) -> Any:
        calls.append(self)
        if len(calls) == number:
            action(self)
        return original(self, *args)

    monkeypatch.setattr(NetworkPatcher, "run", run)


def test_evicted_in_mid_run_it_comes_back(load, net, monkeypatch):
    model, control = load(), net()
    expected = sample(model, *applied(prompts(), control))

    original = controlnet.Part.run
    calls = []

    def run(self: Any, *args: Any) -> Any:
        calls.append(self)
        if len(calls) == 2:
            management.free_memory(1e30, torch.device("cpu"))
            assert self.engine.loaded_size() == 0
        return original(self, *args)

    monkeypatch.setattr(controlnet.Part, "run", run)
    result = sample(model, *applied(prompts(), accelerate_controlnet(control, WAIT)))
    assert relative_error(result, expected) < TOLERANCE
    assert len(calls) == 3 and not calls[0].native
    assert engines()[0] in management.loaded_models()


def test_out_of_memory_in_mid_run_goes_on_natively(load, net, monkeypatch, lines):
    model, control = load(), net()
    fast = accelerate_controlnet(control, WAIT)
    expected = sample(model, *applied(prompts(), control), steps=4)

    def fail(engine: Any) -> None:
        raise OutOfMemory("no memory is left for this test")

    _on_call(monkeypatch, 2, fail)
    management.unload_all_models()
    conds = applied(prompts(), fast)
    result = sample(model, *conds, steps=4)
    assert relative_error(result, expected) < TOLERANCE
    assert [state for state, _ in lines] == ["engine", "host"]
    assert "no memory is left" in lines[1][1]
    loaded = management.loaded_models()
    assert control.control_model_wrapped in loaded and model in loaded
    assert engines() == []
    # The next run tries again.
    assert relative_error(sample(model, *conds, steps=4), expected) < TOLERANCE
    assert forwards() == [4]


@pytest.mark.parametrize("where", ["choosing", "running"])
def test_an_error_that_nobody_foresaw_costs_the_speed_alone(
    where, load, net, monkeypatch, lines, caplog
):
    model, control = load(), net()
    expected = sample(model, *applied(prompts(), control))
    name = "why_not" if where == "choosing" else "bind_call"
    conds = applied(prompts(), accelerate_controlnet(control, WAIT))
    monkeypatch.setattr(controlnet, name, lambda *_: {}["nothing"])
    assert relative_error(sample(model, *conds), expected) < TOLERANCE
    assert lines[-1][0] == "host" and "KeyError" in lines[-1][1]
    assert "the engine failed unexpectedly" in caplog.text


def test_an_accelerated_model_reports_the_nets_reasons(load, net, monkeypatch):
    model = accelerate(load(), Options(wait=True))
    fast = accelerate_controlnet(net(), WAIT)

    def fail(self: Any, *args: Any) -> Any:
        raise OutOfMemory("no memory is left for this test")

    monkeypatch.setattr(controlnet.Part, "run", fail)
    sample(model, *applied(prompts(), fast))
    run = journal().runs[-1]
    reason = {"text": "no memory is left for this test", "node": "Accelerate ControlNet"}
    assert reason in run.reasons
    assert run.engine_calls == 3


def test_what_the_device_has_no_room_for_is_a_reason_of_the_run(load, net, monkeypatch, lines):
    model = accelerate(load(), Options(wait=True))
    fast = accelerate_controlnet(net(), WAIT)
    monkeypatch.setattr(controlnet, "_fits", lambda *_: False)
    sample(model, *applied(prompts(), fast))
    text = "the device has no room for its engine beside the model's"
    assert journal().runs[-1].reasons == [{"text": text, "node": "Accelerate ControlNet"}]
    assert journal().runs[-1].engine_calls == 3
    assert lines == [("host", f"host's path: {text}")]


def test_a_net_that_a_pack_rebuilt_is_said_to_be(load, net, lines):
    """As ComfyUI-Advanced-ControlNet does with what is applied through its nodes."""
    model, control = accelerate(load(), Options(wait=True)), net()
    fast = accelerate_controlnet(control, WAIT)

    class ControlNetAdvanced(comfy.controlnet.ControlNet):
        __module__ = "advanced"

        def copy(self: Any) -> Any:
            copied = super().copy()
            copied.__class__ = type(self)
            return copied

    assert type(fast) == comfy.controlnet.ControlNet  # noqa: E721 - that is how it looks at it
    made = ControlNetAdvanced(fast.control_model, load_device=fast.load_device)
    made.control_model_wrapped = fast.control_model_wrapped
    text = "another pack has its own way with it: ControlNetAdvanced"
    for _ in range(2):
        sample(model, *applied(prompts(), made))
        assert journal().runs[-1].reasons == [{"text": text, "node": "Accelerate ControlNet"}]
        assert journal().runs[-1].mode == "engine" and engines() == []
    assert lines == [("host", f"host's path: {text}")] * 2
    sample(model, *applied(prompts(), control))  # as the user's own choice it is no news
    assert journal().runs[-1].reasons == [] and len(lines) == 2


def test_a_speed_up_is_that_over_a_run_with_as_many_nets(load, net):
    size = {"size": (24, 8), "steps": 5}  # at which no other test compares
    model = accelerate(load(), Options(wait=True, compare=True, title="castle"))
    sample(model, *applied(prompts(), net()), **size)
    compared = journal().runs[-1]
    assert compared.dims == [{"width": 64, "height": 192, "batch": 2, "controlnets": 1}]
    assert journal().baseline(compared.graph_key, compared.dims[0], compared.gpu) > 0
    sample(model, *applied(prompts(), net()), **size)
    assert journal().runs[-1].speedup is not None
    sample(model, *prompts(), **size)
    assert journal().runs[-1].speedup is None


def test_a_comparison_is_with_the_hosts_own_nets(load, net, monkeypatch, lines):
    original, ran = NetworkPatcher.run, []

    def run(self: Any, *args: Any) -> Any:
        ran.append(self.structure.kind)
        return original(self, *args)

    monkeypatch.setattr(NetworkPatcher, "run", run)
    model = accelerate(load(), Options(wait=True, compare=True))
    sample(model, *applied(prompts(), accelerate_controlnet(net(), WAIT)))
    assert journal().runs[-1].compared_db > 80
    assert ran == ["controlnet", "unet"] * 3
    assert lines == [("engine", "engine")]


def test_an_interrupt_ends_the_run_and_harms_no_later_one(load, net, monkeypatch):
    model, control = load(), net()
    fast = accelerate_controlnet(control, WAIT)
    conds = applied(prompts(), fast)
    _on_call(monkeypatch, 2, lambda _: management.interrupt_current_processing(True))
    with pytest.raises(management.InterruptProcessingException):
        sample(model, *conds)
    assert forwards() == [2]
    expected = sample(model, *applied(prompts(), control))
    assert relative_error(sample(model, *conds), expected) < TOLERANCE
    # Nor does the net that was never told of the end keep its place.
    with pytest.raises(management.InterruptProcessingException), monkeypatch.context() as again:
        _on_call(again, 1, lambda _: management.interrupt_current_processing(True))
        sample(model, *conds)
    sample(model, *applied(prompts(), accelerate_controlnet(net(number=2), WAIT)))
    assert [engine.instance for engine in engines()] == [0]


def test_results_belong_to_the_caller_alone(load, net):
    model, control = load(), net()
    fast = accelerate_controlnet(control, WAIT)
    results = []
    original = controlnet._StandIn.__call__

    def record(self: Any, **kwargs: Any) -> Any:
        result = original(self, **kwargs)
        tensors = [tensor for name in ("output", "middle") for tensor in result[name]]
        results.append((tensors, [tensor.clone() for tensor in tensors]))
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(controlnet._StandIn, "__call__", record)
        # At strength 1 the host's multiplication in place changes nothing.
        sample(model, *applied(prompts(), fast))
    assert len(results) == 3
    for tensors, before in results:
        assert all(map(torch.equal, tensors, before))
    places = [tensor.untyped_storage().data_ptr() for tensors, _ in results for tensor in tensors]
    assert len(set(places)) == len(places) == 3 * 13


def test_the_prompts_part_is_kept_only_where_an_accelerated_model_vouches(load, net):
    plain, control = load(), net()
    fast = accelerate_controlnet(control, WAIT)
    sample(plain, *applied(prompts(), fast), steps=4)
    assert engines()[0].network.counters.prompt_hits == 0
    model = accelerate(plain, Options(wait=True))
    management.unload_all_models()
    sample(model, *applied(prompts(), fast), steps=4)
    assert engines()[0].network.counters.prompt_hits == 3


def test_other_prompts_and_hints_are_seen(load, net):
    plain, control = load(), net()
    model, fast = accelerate(plain, Options(wait=True)), accelerate_controlnet(control, WAIT)
    for seed in (1, 3, 1):
        for hint in (5, 6):
            conds = (conditioning("tiny-sd15", seed), conditioning("tiny-sd15", 2))
            expected = sample(plain, *applied(conds, control, seed=hint))
            result = sample(model, *applied(conds, fast, seed=hint))
            assert relative_error(result, expected) < TOLERANCE


def test_a_prompt_of_its_own(load, net):
    plain, control = load(), net()
    model, fast = accelerate(plain, Options(wait=True)), accelerate_controlnet(control, WAIT)
    other = conditioning("tiny-sd15", 9)[0][0]

    def conds(used: Any, context: torch.Tensor | None) -> tuple[list[Any], list[Any]]:
        positive, negative = applied(prompts(), used)
        if context is not None:
            positive[0][1]["cross_attn_controlnet"] = context
            negative[0][1]["cross_attn_controlnet"] = context
        return positive, negative

    expected = sample(plain, *conds(control, other))
    assert relative_error(sample(model, *conds(fast, other)), expected) < TOLERANCE
    assert relative_error(sample(model, *conds(fast, None)), expected) > TOLERANCE


def test_a_context_that_changes_under_its_uuid_is_seen(load, net):
    plain, control = load(), net()
    model, fast = accelerate(plain, Options(wait=True)), accelerate_controlnet(control, WAIT)

    def changing(args: dict[str, Any]) -> Any:
        for cond in args["conds"]:
            for entry in cond:
                context = entry["model_conds"]["c_crossattn"]
                context.cond = context.cond * 1.5
        return comfy.samplers.calc_cond_batch(
            args["model"], args["conds"], args["input"], args["sigma"], args["model_options"]
        )

    for patcher in (plain, model):
        patcher.model_options["sampler_calc_cond_batch_function"] = changing
    expected = sample(plain, *applied(prompts(), control))
    result = sample(model, *applied(prompts(), fast))
    assert relative_error(result, expected) < TOLERANCE
    del plain.model_options["sampler_calc_cond_batch_function"]
    assert relative_error(sample(plain, *applied(prompts(), control)), expected) > 0.01


def test_patches_on_its_weights_are_followed(load, net):
    model, control = load(), net()
    fast = accelerate_controlnet(control, WAIT)
    key = "middle_block.1.transformer_blocks.0.attn1.to_q.weight"
    shape = control.control_model.get_parameter(key).shape
    patcher = control.control_model_wrapped
    original = sample(model, *applied(prompts(), fast))
    results = []
    for strength in (4.0, 1.0):
        patched = patcher.clone()
        difference = torch.randn(shape, generator=torch.Generator().manual_seed(3))
        patched.add_patches({key: ("diff", (difference,))}, strength)
        for used in (control, fast):
            used.control_model_wrapped = patched
        results.append(sample(model, *applied(prompts(), fast)))
        expected = sample(model, *applied(prompts(), control))
        assert relative_error(results[-1], expected) < TOLERANCE
    assert relative_error(results[0], results[1]) > TOLERANCE
    for used in (control, fast):
        used.control_model_wrapped = patcher
    assert torch.equal(sample(model, *applied(prompts(), fast)), original)


def test_while_its_engine_is_built_the_host_runs_it(load, net, monkeypatch, lines):
    model, control = load(), net()
    accelerate_controlnet(control, WAIT)
    expected = sample(model, *applied(prompts(), control))
    fast = accelerate_controlnet(control, Options(node_id=WAIT.node_id))
    state = {"state": "building", "fraction": 0.41, "text": "tracing", "error": None}
    asked = []
    with monkeypatch.context() as building:
        building.setattr(builder(), "request", lambda *given: asked.append(given[2:]))
        building.setattr(builder(), "status", lambda _: state)
        result = sample(model, *applied(prompts(), fast))
        assert torch.equal(result, expected)
        assert asked == [(False, WAIT.node_id)]  # whose line the builder then writes
        assert lines == []
        building.setattr(builder(), "find", lambda _: None)
        state.update(state="failed", error="it is too strange")
        sample(model, *applied(prompts(), fast))
        assert lines == [("host", "host's path: its engine could not be built: it is too strange")]
        state.update(state="cancelled", error=None)
        sample(model, *applied(prompts(), fast))
        assert lines[1:] == [("host", "host's path: the build of its engine was cancelled")]
    assert engines() == []
    sample(model, *applied(prompts(), accelerate_controlnet(control, WAIT)))
    assert forwards() == [3]


def test_too_many_nets_for_the_device_stay_with_the_host(load, net, monkeypatch, lines):
    model, nets = load(), [net(number=number) for number in (1, 2)]
    expected = sample(model, *chain(*nets), steps=4)
    fast = [accelerate_controlnet(control, WAIT) for control in nets]
    monkeypatch.setattr(controlnet, "_fits", lambda device, engines: len(engines) < 2)
    assert relative_error(sample(model, *chain(*fast), steps=4), expected) < TOLERANCE
    assert len(engines()) == 1
    assert (
        "host",
        "host's path: the device has no room for its engine beside the model's",
    ) in lines
    assert nets[1].control_model_wrapped in management.loaded_models()


def test_the_nets_of_a_sampling_take_a_share_of_the_device(load, net, monkeypatch):
    sample(load(), *applied(prompts(), accelerate_controlnet(net(), WAIT)), steps=1)
    (own,) = engines()
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    needed = weights_bytes(own.plan, own.dtype)
    monkeypatch.setattr(management, "get_total_memory", lambda _: 2 * needed / controlnet.SHARE)

    def on(device: torch.device) -> Any:
        return SimpleNamespace(plan=own.plan, dtype=own.dtype, load_device=device)

    assert controlnet._fits(first, [on(first)] * 2 + [on(second)])
    assert not controlnet._fits(first, [on(first)] * 3)
    assert controlnet._fits(torch.device("cpu"), [own] * 100)


def test_no_net_has_an_engine_where_no_weights_may_stay(load, net, monkeypatch, lines):
    control = net()
    fast = accelerate_controlnet(control, WAIT)
    monkeypatch.setattr(controlnet, "unsupported_device", lambda _: None)  # there is no such GPU
    control.control_model_wrapped.load_device = torch.device("cuda")
    monkeypatch.setattr(management, "vram_state", management.VRAMState.NO_VRAM)
    assert fast.get_models() == [control.control_model_wrapped]
    assert lines == [("host", "host's path: ComfyUI was started with --novram")]


def test_the_hosts_own_weights_leave_the_device():
    class Patcher:
        model = torch.nn.Linear(2, 2, device="meta")  # where --gpu-only would have made it
        left = None

        def unpatch_model(self, device: torch.device, unpatch_weights: bool) -> None:
            self.left = (device, unpatch_weights)

    patcher = Patcher()
    controlnet._leave_device(patcher)
    assert patcher.left == (torch.device("cpu"), True)
    patcher.model, patcher.left = torch.nn.Linear(2, 2), None
    controlnet._leave_device(patcher)
    assert patcher.left is None


def test_copies_keep_everything(net):
    control = net()
    fast = accelerate_controlnet(control, WAIT)
    fast.set_extra_arg("control_type", [1])
    copied = fast.copy().copy().set_cond_hint(torch.rand(1, 3, 8, 8), 0.5, (0.1, 0.9))
    assert isinstance(copied, EngineMixin) and isinstance(copied, comfy.controlnet.ControlNet)
    assert copied.control_model is control.control_model
    assert copied.control_model_wrapped is control.control_model_wrapped
    assert copied.strength == 0.5 and copied.extra_args == {"control_type": [1]}
    assert not isinstance(control, EngineMixin)
    assert isinstance(accelerate_controlnet(fast, WAIT), type(fast))
    assert type(fast).__mro__.count(EngineMixin) == 1


def test_clones_for_other_devices_are_accelerated(net, load):
    fast = accelerate_controlnet(net(), WAIT)
    if not hasattr(fast, "deepclone_multigpu"):
        pytest.skip("this ComfyUI does not split over devices")
    device = torch.device("cpu")
    clone = fast.deepclone_multigpu(device, autoregister=True)
    assert isinstance(clone, EngineMixin)
    assert clone.control_model is not fast.control_model
    models = fast.get_models()
    assert len(models) == 2 and all(isinstance(model, NetworkPatcher) for model in models)
    assert models[0] is not models[1]
