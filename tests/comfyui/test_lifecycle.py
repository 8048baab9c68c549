"""The accelerated MODEL in the host's life cycle: same pictures, memory governed by the host."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from dataclasses import replace
from types import SimpleNamespace

import comfy.conds
import comfy.hooks
import comfy.model_management as management
import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.utils
import pytest
import torch

from accel.hosts.comfyui import decide
from accel.hosts.comfyui import run as running
from accel.hosts.comfyui.builder import builder
from accel.hosts.comfyui.decide import Reason
from accel.hosts.comfyui.journal import journal
from accel.hosts.comfyui.panel import report
from accel.hosts.comfyui.patcher import accelerate, accelerated
from accel.hosts.comfyui.pool import NetworkPatcher, pool
from accel.hosts.comfyui.routes import Panel, forget, networks
from accel.hosts.comfyui.run import Acceleration, Options
from accel.models import parameters
from accel.runtime.weights import weights_bytes
from accel.tuning import Selector

from .checkpoints import CONFIGS, ensure
from .host import call, conditioning, exists, relative_error, sample

KIND = "tiny-sd15"
CLOSE = 1e-4


@pytest.fixture(autouse=True)
def nothing_loaded():
    yield
    decide._learned.clear()  # the tests' wrappers share their code
    management.unload_all_models()
    gc.collect()
    management.cleanup_models_gc()


@pytest.fixture
def prompt():
    return conditioning(KIND, 1), conditioning(KIND, 2)


@pytest.fixture
def lora(models_folder):
    def read(name: str):
        (path,) = ensure(models_folder, f"loras/{KIND}-{name}.safetensors")
        return comfy.utils.load_torch_file(str(path), safe_load=True)

    return read


def with_loras(model, *loras):
    for state, strength in loras:
        model = comfy.sd.load_lora_for_models(model, None, state, strength, 0)[0]
    return model


def engine_of(model):
    (network,) = {
        n for n in pool()._patchers.values() if n.structure is running.structure_of_model(model)
    } or {None}
    return network


def last():
    return journal().runs[-1]


def on_engine(calls: int = 3) -> bool:
    run = last()
    assert run.reasons == []
    return (run.mode, run.engine_calls, run.host_calls) == ("engine", calls, 0)


def test_the_picture_is_the_hosts_own_and_the_weights_lie_once(load, prompt):
    plain = load()
    fast = accelerate(plain, Options(wait=True))
    assert fast is not plain and fast.model is plain.model
    expected = sample(plain, *prompt)
    assert relative_error(sample(fast, *prompt), expected) < CLOSE
    assert on_engine()
    assert plain.model.model_loaded_weight_memory == 0
    engine = engine_of(fast)
    assert engine.loaded_size() >= plain.model_size() * 0.9
    assert any(loaded.model is engine for loaded in management.current_loaded_models)
    assert relative_error(sample(plain, *prompt), expected) == 0


def every_format() -> dict[str, torch.Tensor]:
    """Formats that the host reads beyond plain factors, in turn over the transformers' layers."""
    generator = torch.Generator().manual_seed(5)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.05

    def factors(rows: int, columns: int) -> dict[str, torch.Tensor]:
        return {"lora_up.weight": noise(rows, 2), "lora_down.weight": noise(2, columns)}

    makers = [
        lambda o, i: {**factors(o, i), "dora_scale": 1 + noise(o, 1)},
        lambda o, i: {**factors(o, i), "dora_scale": 1 + noise(1, i)},
        lambda o, i: {"oft_blocks": noise(o // 8, 8, 8) * 5},
        lambda o, i: {"oft_blocks": noise(2, o // 8, 8, 8) * 5, "alpha": torch.tensor(0.0)},
        lambda o, i: {
            **{"a1.weight": noise(i, 2) * 9, "a2.weight": noise(2, i)},
            **{"b1.weight": noise(o, 2), "b2.weight": noise(2, i)},
        },
        lambda o, i: {"diff": noise(o, i)},
        lambda o, i: {"set_weight": noise(o, i)},
    ]
    state, place = {}, 0
    for name, parameter in parameters(CONFIGS[KIND]).items():
        base = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        if name.endswith(".weight") and len(parameter.shape) == 2 and "transformer_bl" in name:
            parts = makers[place % len(makers)](*parameter.shape)
            place += 1
        elif name.endswith("norm2.weight"):
            # The host knows norms by their single-file names alone.
            base = "diffusion_model." + parameter.ldm_name.removesuffix(".weight")
            parts = {"w_norm": noise(*parameter.shape), "b_norm": noise(*parameter.shape)}
        else:
            continue
        state |= {f"{base}.{part}": value for part, value in parts.items()}
    assert place > 2 * len(makers)
    return state


def test_loras_in_any_order_and_back_again(load, prompt, lora, caplog):
    plain = load()
    stack = [(lora("1"), 0.8), (lora("loha"), 0.5), (lora("lokr"), -0.4), (every_format(), -0.6)]
    before = accelerate(with_loras(plain, *stack), Options(wait=True))
    fast = accelerate(plain, Options(wait=True))
    after = with_loras(fast, *stack)
    bare = sample(plain, *prompt)
    expected = sample(with_loras(plain, *stack), *prompt)
    assert relative_error(expected, bare) > 100 * CLOSE
    first = sample(fast, *prompt)
    for model in (before, after):
        assert relative_error(sample(model, *prompt), expected) < CLOSE
        assert on_engine() and last().loras == 4
    assert "lora key not loaded" not in caplog.text and "ERROR" not in caplog.text
    assert torch.equal(sample(fast, *prompt), first)
    one = [(stack[0][0], 0.3)]
    expected = sample(with_loras(plain, *one), *prompt)
    assert relative_error(sample(with_loras(fast, *one), *prompt), expected) < CLOSE


def test_only_what_a_lora_touches_is_rewritten(load, prompt, lora, monkeypatch):
    fast = accelerate(load(), Options(wait=True))
    sample(fast, *prompt)
    written = []
    original = type(engine_of(fast).network.weights).write

    def write(self, names, *rest):
        written.append(len(names))
        return original(self, names, *rest)

    monkeypatch.setattr(type(engine_of(fast).network.weights), "write", write)
    state = lora("1")
    patched = with_loras(fast, (state, 1.0))
    sample(patched, *prompt)
    layers = len([key for key in state if key.endswith(".alpha")])
    assert written == [layers]
    sample(patched, *prompt)
    sample(with_loras(fast, (state, 1.0)), *prompt)  # a new adapter around the same tensors
    assert written[1:] in ([], [0])
    sample(fast, *prompt)
    assert written[-1] == layers


def test_two_checkpoints_alternate_without_another_capture(load, prompt):
    models = [load(letter=letter) for letter in "ab"]
    expected = [sample(model, *prompt) for model in models]
    fast = [accelerate(model, Options(wait=True)) for model in models]
    for turn in (0, 1, 0, 1, 0):
        assert relative_error(sample(fast[turn], *prompt), expected[turn]) < CLOSE
        assert on_engine()
    assert len(engine_of(fast[0]).network.shapes()) == 1


def test_a_model_that_the_host_gave_up_is_gone_and_its_file_is_known_again(load, prompt):
    fast = accelerate(load(), Options(wait=True))
    fast.set_attachments("switchyard_file", None)
    expected = sample(fast, *prompt)
    structure = running.structure_of_model(fast)
    dead = weakref.ref(fast.model)
    del fast
    gc.collect()
    management.cleanup_models_gc()
    gc.collect()
    assert dead() is None
    again = accelerate(load(), Options(wait=True))
    assert running.structure_of_model(again).graph_key == structure.graph_key
    assert torch.equal(sample(again, *prompt), expected)


def test_weights_written_in_place_are_seen(load, prompt):
    plain = load()
    fast = accelerate(plain, Options(wait=True))
    sample(fast, *prompt)
    with torch.no_grad():
        for parameter in plain.model.diffusion_model.parameters():
            parameter.data.mul_(0.98)
    expected = sample(plain, *prompt)
    assert relative_error(sample(fast, *prompt), expected) < CLOSE


def test_freed_memory_comes_back_when_needed(load, prompt):
    fast = accelerate(load(), Options(wait=True))
    expected = sample(fast, *prompt)
    engine = engine_of(fast)
    freed = engine.partially_unload(None, 1)
    assert freed > 0 and engine.network is not None
    assert torch.equal(sample(fast, *prompt), expected)
    management.free_memory(1e30, fast.load_device)
    assert engine.loaded_size() == 0 and engine.network is None
    assert not any(loaded.model is engine for loaded in management.current_loaded_models)
    assert torch.equal(sample(fast, *prompt), expected)


def test_what_the_panel_deletes_is_given_back_to_the_driver(load, prompt, monkeypatch):
    fast = accelerate(load(), Options(wait=True))
    sample(fast, *prompt)
    engine, gone = engine_of(fast), []
    weights = weakref.ref(engine.network.weights)
    monkeypatch.setattr(management, "soft_empty_cache", lambda *_: gone.append(weights() is None))
    panel = Panel(lambda folder: [], lambda folder, name: None, networks, forget=forget)
    monkeypatch.setattr(panel.engines, "delete", lambda key: 1234)  # another test wants the file
    answer = panel.delete(engine.structure.graph_key)
    assert answer == {"deleted": True, "freed_bytes": 1234}
    assert gone == [True]
    assert engine.structure.graph_key not in {n["graph_key"] for n in networks() if n["loaded"]}


def in_step(model, step, action):
    """The model with a wrapper around each call of the denoiser that acts at one of them."""
    calls = []

    def wrapper(executor, *args, **kwargs):
        calls.append(1)
        if len(calls) == step:
            action(args, kwargs)
        return executor(*args, **kwargs)

    model = model.clone()
    model.add_wrapper_with_key("diffusion_model", "another pack", wrapper)
    return model


def test_the_panel_does_not_wait_for_an_engine_at_work(load, prompt):
    fast = accelerate(load(), Options(wait=True))
    sample(fast, *prompt)
    engine = engine_of(fast)
    before = [entry for entry in networks() if entry["loaded"]]
    assert len(before) == 1 and len(before[0]["shapes"]) == 1
    works, done = threading.Event(), threading.Event()

    def work():
        with engine.lock:
            works.set()
            done.wait(30)

    worker = threading.Thread(target=work)
    worker.start()
    try:
        assert works.wait(30)
        started = time.monotonic()
        assert [entry for entry in networks() if entry["loaded"]] == before
        assert time.monotonic() - started < 5
    finally:
        done.set()
        worker.join()
    sample(fast, *prompt, size=(24, 16))
    (after,) = (entry for entry in networks() if entry["loaded"])
    assert len(after["shapes"]) == 2


def test_prompts_are_brought_to_the_device_once_and_the_users_own_stay():
    elsewhere = torch.device("meta")
    given = torch.randn(1, 77, 8)
    prompt = comfy.conds.CONDCrossAttn(given)
    number = comfy.conds.CONDConstant(3)
    cond = {"model_conds": {"c_crossattn": prompt, "y": number}, "uuid": 1}
    conds = [[cond], None, [{"uuid": 2}]]
    running._bring_over(conds, elsewhere)
    moved = cond["model_conds"]["c_crossattn"]
    assert type(moved) is comfy.conds.CONDCrossAttn and moved.cond.device == elsewhere
    assert cond["model_conds"]["y"] is number
    assert prompt.cond is given and given.device.type == "cpu"
    running._bring_over(conds, elsewhere)
    assert cond["model_conds"]["c_crossattn"] is moved


def test_only_on_the_engine_are_prompts_brought_over(load, prompt, monkeypatch):
    """The host's own path stays the host's own."""
    asked = []
    monkeypatch.setattr(running, "_bring_over", lambda conds, device: asked.append(device))
    model = accelerate(load(), Options(wait=True))
    sample(model, *prompt, steps=2)
    assert asked == [torch.device("cpu")] * 2
    model.set_model_output_block_patch(lambda h, skip, options: (h, skip))
    sample(model, *prompt, steps=2)
    assert len(asked) == 2


def test_an_engine_evicted_in_mid_run_comes_back(load, prompt):
    fast = accelerate(load(), Options(wait=True))
    expected = sample(fast, *prompt)
    evicted = in_step(fast, 2, lambda *_: management.free_memory(1e30, fast.load_device))
    assert torch.equal(sample(evicted, *prompt), expected)
    assert on_engine()


def test_a_call_that_the_engine_does_not_know_goes_on_natively(load, prompt):
    plain = load()
    fast = accelerate(plain, Options(wait=True))

    def patch(args, kwargs):
        kwargs.get("transformer_options", args[5] if len(args) > 5 else None)["unheard_of"] = [1]

    expected = sample(plain, *prompt)
    assert relative_error(sample(in_step(fast, 2, patch), *prompt), expected) < CLOSE
    run = last()
    assert (run.mode, run.engine_calls, run.host_calls) == ("mixed", 1, 2)
    assert "unheard_of" in run.reasons[0]["text"]
    assert engine_of(fast).loaded_size() == 0 and plain.model.model_loaded_weight_memory > 0
    assert relative_error(sample(fast, *prompt), expected) < CLOSE
    assert on_engine() and plain.model.model_loaded_weight_memory == 0


def test_leaving_the_engine_beside_a_model_that_is_gone(load, prompt):
    fast = accelerate(load(), Options(wait=True))
    expected = sample(fast, *prompt)
    other = load(letter="b")
    management.load_models_gpu([other])
    kept = other.model  # somebody holds the network, while its patcher is gone
    del other
    gc.collect()
    assert None in management.loaded_models(only_currently_used=True)

    def patch(args, kwargs):
        kwargs.get("transformer_options", args[5] if len(args) > 5 else None)["unheard_of"] = [1]

    assert relative_error(sample(in_step(fast, 2, patch), *prompt), expected) < CLOSE
    assert last().mode == "mixed"
    del kept


def test_the_threads_of_two_devices_leave_the_engine_together(load, prompt, monkeypatch):
    fast = accelerate(load(), Options(wait=True))
    expected = sample(fast, *prompt)
    own, loads = fast.acceleration, []
    original = management.load_models_gpu

    def load_models(models, *args, **kwargs):
        loads.append([model for model in models if not hasattr(model, "plan")])
        return original(models, *args, **kwargs)

    def leave(args, _):
        monkeypatch.setattr(management, "load_models_gpu", load_models)
        for reason in ("one device's", "another device's"):
            own._go_native(own.sampling, Reason(reason), args[0])

    left = in_step(fast, 2, leave)
    assert relative_error(sample(left, *prompt), expected) < CLOSE
    assert len(loads) == 1 and left in loads[0]
    assert [reason["text"] for reason in last().reasons] == ["one device's", "another device's"]


def test_another_sampling_within_one_leaves_its_loras_to_itself(load, prompt, lora):
    fast, other = (accelerate(load(), Options(wait=True)) for _ in range(2))
    expected = sample(fast, *prompt)
    patched = with_loras(other, (lora("1"), 1.0))
    nested = in_step(fast, 2, lambda *_: sample(patched, *prompt))
    assert torch.equal(sample(nested, *prompt), expected)
    assert on_engine()


def test_a_wrapper_may_name_the_arguments(load, prompt):
    fast = accelerate(load(), Options(wait=True))
    expected = sample(fast, *prompt)

    def wrapper(executor, x, timesteps, context, y, control, transformer_options, **rest):
        named = {"y": y, "control": control, "transformer_options": transformer_options}
        return executor(x=x, timesteps=timesteps, context=context, **named, **rest)

    named = fast.clone()
    named.add_wrapper_with_key("diffusion_model", "another pack", wrapper)
    assert torch.equal(sample(named, *prompt), expected)
    assert on_engine()


def test_the_models_own_weights_leave_before_the_engine_comes(load, prompt, monkeypatch):
    plain = load()
    fast = accelerate(plain, Options(wait=True))
    sample(plain, *prompt)
    assert plain.model.model_loaded_weight_memory > 0
    original, beside = NetworkPatcher.partially_load, []

    def partially_load(self, *args, **kwargs):
        beside.append(plain.model.model_loaded_weight_memory)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(NetworkPatcher, "partially_load", partially_load)
    sample(fast, *prompt)
    assert on_engine() and beside == [0]


def test_weights_that_were_read_onto_the_device_leave_it_first(load, monkeypatch):
    """With --highvram; the host has loaded nothing yet, by its own account."""
    plain = load()
    fast = accelerate(plain, Options(wait=True))
    network = plain.model.diffusion_model
    name, weight = next(network.named_parameters())
    left = []
    monkeypatch.setattr(fast, "unpatch_model", lambda *args, **_: left.append(args))
    running._make_room(fast)
    assert left == []
    there = torch.nn.Parameter(weight.to("meta"), requires_grad=False)
    comfy.utils.set_attr(plain.model.diffusion_model, name, there)
    running._make_room(fast)
    assert left == [(torch.device("cpu"),)] and fast.loaded_size() == 0


def test_unloading_brings_no_weights_to_the_device(load, prompt):
    plain = load()
    fast = accelerate(plain, Options(wait=True))
    sample(fast, *prompt)
    fast.offload_device = torch.device("meta")  # the device itself, with --highvram
    management.unload_all_models()
    assert next(plain.model.diffusion_model.parameters()).device == torch.device("cpu")
    assert fast.offload_device == torch.device("meta")


def test_an_interrupt_ends_the_run_and_harms_nothing(load, prompt):
    fast = accelerate(load(), Options(wait=True))
    expected = sample(fast, *prompt)
    stopped = in_step(fast, 2, lambda *_: management.interrupt_current_processing())
    with pytest.raises(management.InterruptProcessingException):
        sample(stopped, *prompt)
    run = last()
    assert run.error and run.mode == "engine" and run.engine_calls == run.steps > 0
    assert run.to_json()["status"] == "engine"  # of which nothing is known about its speed
    other = accelerate(load(letter="b"), Options(wait=True))
    management.interrupt_current_processing()  # while its weights come in
    with pytest.raises(management.InterruptProcessingException):
        sample(other, *prompt)
    assert torch.equal(sample(fast, *prompt), expected)
    assert on_engine()


def test_a_checkpoint_that_could_not_be_brought_back_leaves_no_copy(
    load, prompt, lora, monkeypatch
):
    """Of one with a LoRA, since nobody could find it again; that of a file alone is kept."""
    first, second = (
        accelerate(with_loras(load(letter=letter), (lora("1"), 0.5)), Options(wait=True))
        for letter in "ab"
    )
    expected = [sample(model, *prompt) for model in (first, second)]
    engine = engine_of(first)
    network = engine.network
    assert network.pool.bytes("cpu", network._owner) == network.weights.bytes, "that of the first"

    def lost(self, storage):
        raise RuntimeError("the device went away")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="went away"):
        patch.setattr(type(network.weights), "restore", lost)
        running.bring_in(first, engine)
    assert network.pool.bytes("cpu", network._owner) == network.weights.bytes, "of the second"
    for model, one in zip((first, second), expected, strict=True):
        assert torch.equal(sample(model, *prompt), one)
        assert on_engine()


def test_no_memory_for_the_engine_is_the_hosts_path(load, prompt, monkeypatch):
    plain = load()
    fast = accelerate(plain, Options(wait=True))
    expected = sample(plain, *prompt)

    def full(*_):
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr("accel.runtime.weights._allocate", full)
    assert torch.equal(sample(fast, *prompt), expected)
    assert last().mode == "host" and "memory" in last().reasons[0]["text"]


def test_saving_and_merging_are_those_of_the_plain_model(load, prompt, lora, tmp_path):
    plain, other = load(), load(letter="b")
    patched = with_loras(plain, (lora("1"), 0.7))
    fast = with_loras(accelerate(plain, Options(wait=True)), (lora("1"), 0.7))
    sample(fast, *prompt)
    saved = []
    for name, model in (("plain", patched), ("fast", fast)):
        path = tmp_path / f"{name}.safetensors"
        comfy.sd.save_checkpoint(str(path), model)
        saved.append(comfy.utils.load_torch_file(str(path)))
        sample(fast, *prompt)
        assert on_engine()
    assert saved[0].keys() == saved[1].keys() and len(saved[0]) > 500
    assert all(torch.equal(saved[0][key], saved[1][key]) for key in saved[0])
    merges = [
        call("comfy_extras.nodes_model_merging", "ModelMergeSimple", model1=a, model2=b, ratio=0.3)
        for a, b in ((patched, other), (fast, other), (other, fast), (other, patched))
    ]
    results = [sample(model, *prompt) for (model,) in merges]
    assert relative_error(results[1], results[0]) < CLOSE
    assert relative_error(results[2], results[3]) < CLOSE


def test_other_sizes_batches_and_prompts_in_turn(load):
    plain = load()
    fast = accelerate(plain, Options(wait=True))
    for size, batch, tokens in (((16, 24), 1, 77), ((24, 16), 4, 154), ((16, 24), 1, 77)):
        prompts = conditioning(KIND, 5, tokens), conditioning(KIND, 6)
        expected = sample(plain, *prompts, size=size, batch=batch)
        assert relative_error(sample(fast, *prompts, size=size, batch=batch), expected) < CLOSE
        assert on_engine()
    assert last().dims == [{"width": 192, "height": 128, "batch": 2}]


def test_a_prompt_is_computed_once_in_a_run_and_never_kept_over_a_change(load, prompt):
    plain = load()
    fast = accelerate(plain, Options(wait=True))
    sample(fast, *prompt)
    counters = engine_of(fast).network.counters
    before = counters.prompt_hits
    sample(fast, *prompt, steps=4)
    assert counters.prompt_hits == before + 3
    other = conditioning(KIND, 9)
    assert relative_error(sample(fast, other, prompt[1]), sample(plain, other, prompt[1])) < CLOSE

    def louder(args, kwargs):
        args[2].mul_(1.5)  # the context of this call only

    before = counters.prompt_hits
    expected = sample(in_step(plain, 2, louder), *prompt)
    assert relative_error(sample(in_step(fast, 2, louder), *prompt), expected) < CLOSE
    assert counters.prompt_hits == before


@pytest.mark.parametrize("where", ["c_crossattn", "cross_attn"])
def test_a_function_around_the_network_may_write_into_the_prompt(load, where):
    """In inference mode, as nodes run, where PyTorch counts no writes."""

    def fading(model):
        def fade(args):
            (cond,) = args["cond"]
            held = cond["model_conds"][where].cond if where == "c_crossattn" else cond[where]
            held.mul_(0.5)
            return args["denoised"]

        model = model.clone()
        model.set_model_sampler_post_cfg_function(fade)
        return model

    with torch.inference_mode():
        plain = load()
        expected = sample(fading(plain), conditioning(KIND, 1), conditioning(KIND, 2))
        without = sample(plain, conditioning(KIND, 1), conditioning(KIND, 2))
        fast = fading(accelerate(plain, Options(wait=True)))
        result = sample(fast, conditioning(KIND, 1), conditioning(KIND, 2))
    assert on_engine()
    assert relative_error(without, expected) > 10 * CLOSE
    assert relative_error(result, expected) < CLOSE


def test_a_wrapper_that_comes_with_a_hook_may_change_the_prompt(load):
    def prompts():
        steps = []

        def louder(executor, x, t, c_concat=None, c_crossattn=None, *args, **kwargs):
            steps.append(1)
            return executor(x, t, c_concat, c_crossattn * len(steps), *args, **kwargs)

        wrappers = {"apply_model": {"another pack": [louder]}}
        group = comfy.hooks.HookGroup()
        scope = comfy.hooks.EnumHookScope.HookedOnly
        group.add(comfy.hooks.TransformerOptionsHook({"wrappers": wrappers}, scope))
        both = [conditioning(KIND, seed)[0] for seed in (1, 2)]
        return [[[context, {**extra, "hooks": group}]] for context, extra in both]

    plain = load()
    fast = accelerate(plain, Options(wait=True))
    expected = sample(plain, *prompts())
    assert relative_error(sample(fast, *prompts()), expected) < CLOSE
    assert on_engine()


def test_a_guider_that_samples_again_at_another_size_has_another_prompt(load):
    kind = "tiny-sdxl"  # whose pooled text holds the picture's size
    plain = load(kind)
    pictures = []
    for model in (plain, accelerate(plain, Options(wait=True))):
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(conditioning(kind, 1), conditioning(kind, 2))
        guider.set_cfg(4.0)
        pictures.append([sample_with(guider, size) for size in ((16, 16), (24, 24), (16, 16))])
        pictures[-1].append(sample_with(guider, (16, 16), seed=9))
    for expected, result in zip(*pictures, strict=True):
        assert relative_error(result, expected) < CLOSE
    assert on_engine()


def sample_with(guider, size, seed=1):
    """What SamplerCustomAdvanced does: the host keeps a guider from one prompt to the next."""
    sampling = guider.model_patcher.get_model_object("model_sampling")
    latent = torch.zeros(1, 4, *size)
    return guider.sample(
        comfy.sample.prepare_noise(latent, seed),
        latent,
        comfy.samplers.sampler_object("euler"),
        comfy.samplers.calculate_sigmas(sampling, "normal", 3),
        disable_pbar=True,
        seed=seed,
    )


def test_comparing_tells_how_close_and_keeps_the_picture(load, prompt, caplog):
    fast = accelerate(load(), Options(wait=True, compare=True, title="castle"))
    with caplog.at_level("INFO"):
        result = sample(fast, *prompt)
    assert "dB from the host's own" in caplog.text
    compared = last()
    assert on_engine() and compared.compared_db > 80
    key, gpu = compared.graph_key, compared.gpu
    assert journal().baseline(key, compared.dims[0], gpu) > 0
    caplog.clear()
    assert torch.equal(sample(fast, *prompt), result)
    assert last() is not compared and last().compared_db is None  # once
    assert last().speedup is not None


def test_a_comparison_that_fails_costs_no_picture(load, prompt, caplog, monkeypatch):
    fast = accelerate(load(), Options(wait=True))
    expected = sample(fast, *prompt)
    fast.acceleration.options.compare = True

    def full(*_):
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(running, "psnr", full)
    assert torch.equal(sample(fast, *prompt), expected)
    assert "not compared: the device has no memory left" in caplog.text


def test_accelerating_twice_is_accelerating_once(load, prompt):
    fast = accelerate(load(), Options(wait=True))
    twice = accelerate(fast, Options(wait=True))
    assert type(twice) is type(fast)
    sample(twice, *prompt)
    assert on_engine()
    assert twice.acceleration is not fast.acceleration


@pytest.mark.parametrize("function", ["bind_call", "why_host_run"])
def test_an_error_that_nobody_foresaw_costs_the_speed_alone(function, load, prompt, monkeypatch):
    plain = load()
    fast = accelerated(plain, Acceleration(Options(wait=True)))
    expected = sample(plain, *prompt)
    monkeypatch.setattr(running, function, lambda *_: {}["nothing"])
    assert torch.equal(sample(fast, *prompt), expected)
    assert last().mode == "host" and "KeyError" in last().reasons[0]["text"]


def test_the_samplers_tables_stand_on_the_engines_device(load, prompt, monkeypatch):
    """From the CPU they would cost a wait for the GPU in every step."""
    fast = accelerate(load(), Options(wait=True))
    moved = []
    tables = fast.model.model_sampling
    original = type(tables).to
    monkeypatch.setattr(
        type(tables), "to", lambda self, *args: moved.append(args) or original(self, *args)
    )
    sample(fast, *prompt)
    assert (fast.load_device,) in moved


def test_the_weights_lie_once_on_the_hosts_path_too(load, prompt):
    plain, other = load(), accelerate(load(letter="b"), Options(wait=True))
    fast = accelerate(plain, Options(wait=True))
    sample(fast, *prompt)
    patched = fast.clone()
    patched.set_model_output_block_patch(lambda h, skip, options: (h * 1.01, skip))
    sample(patched, *prompt)
    assert last().mode == "host" and engine_of(fast).loaded_size() == 0
    sample(other, *prompt)
    held = engine_of(other).loaded_size()
    sample(patched, *prompt)  # what is live there is another checkpoint's
    assert last().mode == "host" and engine_of(other).loaded_size() == held > 0


def test_ten_workflows_in_a_row_trace_nothing_and_bind_each_shape_once(
    load, prompt, lora, monkeypatch
):
    """Checkpoints a, b, a, b, a with changing LoRAs, sizes and batches; the last is the first."""
    plain = {letter: load(letter=letter) for letter in "ab"}
    fast = {letter: accelerate(model, Options(wait=True)) for letter, model in plain.items()}
    first = sample(fast["a"], *prompt)
    engine = engine_of(fast["a"])
    management.free_memory(1e30, fast["a"].load_device)
    monkeypatch.setattr("torch.export.export", lambda *_, **__: pytest.fail("traced again"))
    loras = {name: lora(name) for name in ("1", "loha", "lokr")}
    tour = [
        ("a", (), (16, 16), 1),
        ("b", (), (16, 16), 1),
        ("a", (("1", 0.8),), (16, 16), 1),
        ("b", (("1", 0.8), ("loha", -0.5)), (24, 16), 1),
        ("a", (("loha", 1.0),), (24, 16), 1),
        ("a", (), (16, 16), 2),
        ("b", (("1", 0.4),), (16, 16), 1),
        ("a", (("1", 0.8), ("loha", 0.3), ("lokr", 0.6)), (24, 24), 1),
        ("b", (), (24, 16), 1),
        ("a", (), (16, 16), 1),
    ]
    for letter, given, size, batch in tour:
        stack = [(loras[name], strength) for name, strength in given]
        result = sample(with_loras(fast[letter], *stack), *prompt, size=size, batch=batch)
        assert on_engine() and last().loras == len(given)
        expected = sample(with_loras(plain[letter], *stack), *prompt, size=size, batch=batch)
        assert relative_error(result, expected) < CLOSE
    assert torch.equal(result, first)
    assert engine.network.counters.binds == len({(size, batch) for _, _, size, batch in tour}) == 4
    management.free_memory(1e30, fast["a"].load_device)
    assert engine.loaded_size() == 0


@pytest.mark.parametrize("wait", [False, True])
def test_kernels_that_were_compiled_come_in_with_the_next_sampling(load, prompt, monkeypatch, wait):
    """Libraries run until then, which the status says; who waits has them from the start."""
    model = load()
    sample(accelerate(model, Options(wait=True)), *prompt)  # its plan is there from now on
    management.free_memory(1e30, model.load_device)
    busy, asked = [True], []
    select = Selector.select

    def selected(self, calls):
        asked.append(self)
        found = select(self, calls)
        return [replace(c, provisional=not self._waiting and busy[0]) for c in found]

    monkeypatch.setattr(Selector, "select", selected)
    monkeypatch.setattr(Selector, "settled", property(lambda self: not busy[0]))
    fast = accelerate(model, Options(wait=wait))
    first = sample(fast, *prompt)
    engine = engine_of(fast)
    binds = engine.network.counters.binds
    assert last().compiling is not wait and asked[-1]._waiting is wait
    assert ("compiling" in last().to_json()["status"]) is not wait
    sample(fast, *prompt)
    assert engine.network.counters.binds == binds, "what is under way is waited for"
    busy[0] = False
    for _ in range(2):
        assert torch.equal(sample(fast, *prompt), first)
        assert on_engine() and not last().compiling
    assert engine.network.counters.binds == (binds if wait else 2 * binds)


@pytest.mark.parametrize("on", [False, True])
def test_the_report_says_what_fp16_accumulation_does(load, prompt, monkeypatch, on):
    """`--fast fp16_accumulation` is PyTorch's setting, which not all kernels know."""
    sample(accelerate(load(), Options(wait=True)), *prompt)
    setting = SimpleNamespace(allow_fp16_accumulation=on)
    monkeypatch.setattr(torch.backends.cuda, "matmul", setting)
    assert ("add in fp32" in report()) is on


def test_a_class_of_another_pack_put_on_later_runs_on_the_hosts_path(load, prompt):
    """It may keep other weights than the host's, as those for GGUF do."""
    plain = load()
    fast = accelerate(plain, Options(wait=True))
    expected = sample(plain, *prompt)
    other = fast.clone()
    other.__class__ = type("GGUFModelPatcher", (type(fast),), {"__module__": "gguf_pack"})
    assert torch.equal(sample(other, *prompt), expected)
    assert (last().mode, last().engine_calls) == ("host", 0)
    text = "another pack has its own way with it: GGUFModelPatcher"
    assert last().reasons == [{"text": text, "node": None}]
    sample(fast, *prompt)
    assert on_engine()


@pytest.mark.parametrize("hooks", [False, True])
def test_a_plain_model_made_of_an_accelerated_one(load, prompt, hooks):
    """Under dynamic VRAM Select Model Device makes one for the CPU, the sampler one for hooks."""
    plain = load()
    other = accelerate(plain, Options(wait=True))
    other.__class__ = type(plain)
    if hooks:
        prompt = [
            comfy.hooks.set_hooks_for_conditioning(given, comfy.hooks.HookGroup())
            for given in prompt
        ]
        prompt[0][0][1]["hooks"].add(
            comfy.hooks.TransformerOptionsHook({}, comfy.hooks.EnumHookScope.HookedOnly)
        )
    assert torch.equal(sample(other, *prompt), sample(plain, *prompt))
    made_by_node = f"a node has made another kind of model of it: {type(plain).__name__}"
    text = "the host made a model of its own for LoRAs with hooks" if hooks else made_by_node
    assert [reason["text"] for reason in last().reasons] == [text]


def test_a_build_that_ends_while_it_is_asked_for_is_used(load, prompt, monkeypatch):
    fast = accelerate(load(), Options())
    sample(accelerate(fast, Options(wait=True)), *prompt)  # its plan is there from now on
    monkeypatch.setattr(builder(), "request", lambda *_, **__: None)
    sample(fast, *prompt)
    assert on_engine()


def test_merges_are_not_counted_as_loras(load, prompt, lora):
    fast, other = accelerate(load(), Options(wait=True)), load(letter="b")
    node = ("comfy_extras.nodes_model_merging", "ModelMergeSimple")
    (merged,) = call(*node, model1=fast, model2=other, ratio=0.5)
    for loras in (0, 1):
        sample(with_loras(merged, *[(lora("1"), 0.5)] * loras), *prompt)
        assert on_engine() and last().loras == loras


# To the host these are two devices.
CPU, CPU_0 = torch.device("cpu"), torch.device("cpu", 0)


@pytest.mark.parametrize("order", ["before", "after"])
def test_a_prompt_split_over_two_devices(load, prompt, monkeypatch, order):
    if not exists("comfy_extras.nodes_multigpu", "MultiGPUCFGSplitNode"):
        pytest.skip("this ComfyUI does not split over devices")
    monkeypatch.setattr(management, "get_all_torch_devices", lambda *_, **__: [CPU, CPU_0])
    monkeypatch.setattr(management, "set_torch_device", lambda _: None)
    original, ran = NetworkPatcher.run, []

    def run(self, *args):
        ran.append(str(self.load_device))
        return original(self, *args)

    monkeypatch.setattr(NetworkPatcher, "run", run)

    def split(model):
        node = ("comfy_extras.nodes_multigpu", "MultiGPUCFGSplitNode")
        return call(*node, model=model, max_gpus=2)[0]

    plain = load()
    expected = sample(plain, *prompt)
    if order == "before":
        model = accelerate(split(plain), Options(wait=True))
    else:
        model = split(accelerate(plain, Options(wait=True)))
    assert relative_error(sample(model, *prompt), expected) < CLOSE
    assert on_engine(6) and sorted(ran) == ["cpu"] * 3 + ["cpu:0"] * 3


@pytest.mark.parametrize("cast", [None, torch.bfloat16])
def test_a_device_of_the_users_choice(load, prompt, monkeypatch, cast):
    if not exists("comfy_extras.nodes_multigpu", "SelectModelDeviceNode"):
        pytest.skip("this ComfyUI has no choice of devices")
    monkeypatch.setattr(management, "resolve_gpu_device_option", lambda _: CPU_0)
    monkeypatch.setattr(management, "unet_manual_cast", lambda *_, **__: cast)
    node = ("comfy_extras.nodes_multigpu", "SelectModelDeviceNode")
    plain = load()
    (chosen,) = call(*node, model=plain, device="cpu")
    (fast,) = call(*node, model=accelerate(plain, Options(wait=True)), device="cpu")
    assert fast.load_device == CPU_0
    result = sample(fast, *prompt)
    assert last().device == "cpu:0"
    if cast is None:
        assert on_engine() and relative_error(result, sample(chosen, *prompt)) < CLOSE
    else:
        reason = {"text": "the model is set to compute in torch.bfloat16", "node": None}
        assert last().reasons == [reason] and torch.equal(result, sample(chosen, *prompt))


def test_an_engine_that_the_device_has_no_room_for(load, monkeypatch):
    fast, gib = accelerate(load(), Options(wait=True)), 1 << 30
    plan, shapes = builder().find(running.structure_of_model(fast)), []
    needed = weights_bytes(plan, torch.float16)
    model = SimpleNamespace(
        load_device=torch.device("cuda"), memory_required=lambda shape: shapes.append(shape) or gib
    )
    monkeypatch.setattr(management, "extra_reserved_memory", lambda: 1000)

    def problem(total):
        monkeypatch.setattr(management, "get_total_memory", lambda _: total)
        return running._too_small(model, plan, torch.float16, (1, 4, 16, 24))

    assert problem(needed + gib + 1000) is None
    assert shapes == [[2, 4, 16, 24]]  # with the negative prompt
    assert "GiB of VRAM and 1.0 are there" in problem(needed + gib + 999).text
    monkeypatch.setattr(management, "vram_state", management.VRAMState.NO_VRAM)
    assert problem(100 * gib).text == "ComfyUI was started with --novram"
    model.load_device = CPU
    assert problem(0) is None
