"""Whatever nodes and packs change: the picture is the plain MODEL's, by the path that was told."""

from __future__ import annotations

import gc

import comfy.model_management as management
import pytest
import torch

from accel.hosts.comfyui import decide
from accel.hosts.comfyui.journal import journal
from accel.hosts.comfyui.patcher import accelerate
from accel.hosts.comfyui.run import Options

from .host import conditioning, relative_error, sample
from .rows import CHANGED, HARMLESS, KIND, Row, every
from .testpack import fakes

# Both compute in float32; the order of additions differs.
CLOSE = 1e-4


@pytest.fixture(scope="module")
def plain(load):
    return load(KIND)


@pytest.fixture(autouse=True)
def nothing_loaded():
    yield
    management.unload_all_models()
    gc.collect()
    management.cleanup_models_gc()


@pytest.fixture
def fast(plain):
    model = accelerate(plain, Options(wait=True))
    assert model is not plain
    return model


def picture(row, model):
    """KSampler's latent; an inpainting one where a node is about masks."""
    mask = latent = None
    generator = torch.Generator().manual_seed(3)
    if row.name == "DifferentialDiffusion":
        mask = torch.linspace(0, 1, 128).expand(1, 1, 128, 128)
        latent = torch.randn(1, 4, 16, 16, generator=generator)
    torch.manual_seed(0)  # ToMe and HyperTile draw from the common generator
    positive = row.condition(conditioning(KIND, 1))
    return sample(model, positive, conditioning(KIND, 2), noise_mask=mask, latent=latent)


@pytest.fixture(scope="module")
def without(plain):
    """The picture that nothing changes."""
    return picture(Row("none"), plain)


@every(CHANGED)
def test_a_change_runs_on_the_hosts_path(row, plain, fast, without, tmp_path):
    expected = picture(row, row.apply(plain, tmp_path))
    result = picture(row, row.apply(fast, tmp_path))
    assert torch.equal(result, expected)
    run = journal().runs[-1]
    assert (run.mode, run.engine_calls) == ("host", 0)
    assert run.reasons[0]["node"] == row.node or row.name == "HypernetworkLoader"
    assert (relative_error(without, expected) < CLOSE) == row.idle


@every(HARMLESS)
def test_what_leaves_the_network_alone_runs_on_the_engine(row, plain, fast, tmp_path):
    expected = picture(row, row.apply(plain, tmp_path))
    result = picture(row, row.apply(fast, tmp_path))
    assert expected.isfinite().all()
    assert relative_error(result, expected) < CLOSE
    run = journal().runs[-1]
    assert run.reasons == []
    assert (run.mode, run.host_calls) == ("engine", 0)
    assert run.engine_calls > 0


@every([row for row in CHANGED + HARMLESS if row.name in ("FreeU", "RescaleCFG", "injection")])
def test_the_order_of_nodes_does_not_matter(row, plain, tmp_path):
    changed = row.apply(plain, tmp_path)
    expected = picture(row, changed)
    result = picture(row, accelerate(changed, Options(wait=True)))
    assert relative_error(result, expected) < CLOSE
    assert journal().runs[-1].mode == ("engine" if row in HARMLESS else "host")


_LEFT = [
    *(row for row in CHANGED if row.name in ("forward_patch", "injection", "object_patch")),
    *(row for row in HARMLESS if row.label == "v-prediction"),
]


@every(_LEFT)
@pytest.mark.parametrize("accelerated", [False, True], ids=["plain", "accelerated"])
def test_what_the_host_left_in_the_network_for_another_model(
    row, accelerated, plain, fast, tmp_path
):
    """The network of the clone that sampled last is as that one had it, until another is loaded."""
    none = Row("none")
    expected = picture(none, plain)
    other = row.apply(fast if accelerated else plain, tmp_path)
    assert relative_error(picture(row, other), expected) > 1e-3
    fresh = accelerate(plain, Options(wait=True))
    for model in (fast, fresh):
        assert relative_error(picture(none, model), expected) < CLOSE
        assert journal().runs[-1].mode == "engine"
    assert torch.equal(picture(none, plain), expected)


def test_a_change_taken_back_brings_the_engine_back(plain, fast, tmp_path):
    row = next(row for row in CHANGED if row.name == "FreeU")
    none = Row("none")
    expected = picture(none, plain)
    modes = []
    for model in (fast, row.apply(fast, tmp_path), fast):
        result = picture(none, model)
        modes.append(journal().runs[-1].mode)
        if modes[-1] == "engine":
            assert relative_error(result, expected) < CLOSE
    assert modes == ["engine", "host", "engine"]


def test_what_shows_in_mid_run_only(plain, fast):
    row = Row("none")
    changed, reference = fast.clone(), plain.clone()
    fakes.hidden_reentering(changed)
    fakes.hidden_reentering(reference)
    expected = picture(row, reference)
    assert relative_error(picture(row, plain), expected) > 1e-3
    try:
        assert relative_error(picture(row, changed), expected) < CLOSE
        first = journal().runs[-1]
        assert first.mode == "mixed" and first.engine_calls and first.host_calls
        assert torch.equal(picture(row, changed), expected)
        second = journal().runs[-1]
        assert (second.mode, second.engine_calls) == ("host", 0)
        assert relative_error(picture(row, fast), picture(row, plain)) < CLOSE
        assert journal().runs[-1].mode == "engine"
    finally:
        decide._learned.clear()


def test_what_no_longer_shows_is_forgotten(plain, fast):
    row = Row("none")
    changed = fast.clone()
    fakes.hidden_reentering(changed)
    perturbed = fakes._guidances["perturbed"]
    modes = []
    try:
        for on in (True, True, False, False, True):
            fakes._guidances["perturbed"] = perturbed if on else lambda args: args["denoised"]
            picture(row, changed)
            modes.append(journal().runs[-1].mode)
        assert modes == ["mixed", "host", "host", "engine", "mixed"]
    finally:
        decide._learned.clear()


def test_a_forward_that_shows_in_mid_run_only_has_its_weights(plain, fast):
    row = Row("none")
    changed, reference = fast.clone(), plain.clone()
    fakes.hidden_forward_around(changed)
    fakes.hidden_forward_around(reference)
    expected = picture(row, reference)
    assert relative_error(picture(row, plain), expected) > 1e-3
    loaded = []

    def call(apply, arguments):
        result = fakes._look_up_call(apply, arguments)
        loaded.append(plain.model.model_loaded_weight_memory)
        return result

    changed.set_model_unet_function_wrapper(call)
    try:
        for _ in range(2):
            assert torch.equal(picture(row, changed), expected)
            run = journal().runs[-1]
            assert (run.mode, run.engine_calls, run.host_calls) == ("host", 0, 3)
            assert all(loaded) and len(run.reasons) == 1
        assert relative_error(picture(row, fast), picture(row, plain)) < CLOSE
        assert journal().runs[-1].mode == "engine"
    finally:
        decide._learned.clear()


def test_what_is_put_into_the_network_after_the_decision(plain, fast):
    row = Row("none")
    changed, reference = fast.clone(), plain.clone()
    fakes.late_hook(changed)
    fakes.late_hook(reference)
    expected = picture(row, reference)
    assert relative_error(picture(row, plain), expected) > 1e-3
    assert torch.equal(picture(row, changed), expected)
    run = journal().runs[-1]
    assert (run.mode, run.engine_calls) == ("host", 0)
    assert "out.1 (SiLU) has forward hooks" in run.reasons[0]["text"]
    assert relative_error(picture(row, fast), picture(row, plain)) < CLOSE
    assert journal().runs[-1].mode == "engine"


def test_what_is_put_into_the_network_between_two_steps(plain, fast):
    row = Row("none")
    changed, reference = fast.clone(), plain.clone()
    fakes.hook_between_steps(reference)
    expected = picture(row, reference)
    assert relative_error(picture(row, plain), expected) > 1e-3
    fakes.hook_between_steps(changed)
    try:
        assert relative_error(picture(row, changed), expected) < CLOSE
    finally:
        decide._learned.clear()
    run = journal().runs[-1]
    assert (run.mode, run.engine_calls, run.host_calls) == ("mixed", 1, 2)
    assert "out.1 (SiLU) has forward hooks" in run.reasons[0]["text"]
