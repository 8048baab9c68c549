"""A LoRA by block: the host's patches, with the weight of each block in their strength."""

from __future__ import annotations

import comfy.sd
import comfy.utils
import pytest
import torch

from accel.errors import InvalidInput
from accel.hosts.comfyui.loras import load_by_block

from .checkpoints import ensure

KIND = "tiny-sd15"


@pytest.fixture
def path(models_folder):
    return str(ensure(models_folder, f"loras/{KIND}-1.safetensors")[0])


def strengths(model) -> dict[str, list[float]]:
    return {key: [patch[0] for patch in patches] for key, patches in model.patches.items()}


def test_every_patch_has_the_weight_of_its_block(load, path):
    plain = load()
    state = comfy.utils.load_torch_file(path, safe_load=True)
    below = comfy.sd.load_lora_for_models(plain, None, state, 0.3, 0)[0]
    numbers = [9.0, *((place - 4) / 8 for place in range(25))]
    model = load_by_block(below, path, -2.0, numbers)
    assert all(own == [0.3] for own in strengths(below).values()), "the model before is untouched"
    found = strengths(model)
    assert found.keys() == below.patches.keys()
    seen = set()
    for key, values in found.items():
        part, number, *_ = key.removeprefix("diffusion_model.").split(".")
        first = {"input_blocks": 0, "middle_block": 12, "output_blocks": 13}[part]
        place = first + (0 if part == "middle_block" else int(number))
        assert values == ([0.3] if place == 4 else [0.3, -2.0 * (place - 4) / 8])
        seen.add(place)
    assert len(seen) > 12 and 4 in seen


def test_nothing_is_left_of_a_block_without_weight(load, path):
    model = load_by_block(load(), path, 1.0, "MIDD")
    assert model.patches and all(value != 0 for own in strengths(model).values() for value in own)
    assert not any("input_blocks.1." in key or "output_blocks.11." in key for key in model.patches)
    assert load_by_block(load(), path, 1.0, "NONE").patches == {}


def test_all_is_the_hosts_own(load, path):
    plain = load()
    state = comfy.utils.load_torch_file(path, safe_load=True)
    want = comfy.sd.load_lora_for_models(plain, None, state, 0.7, 0)[0]
    have = load_by_block(plain, path, 0.7, "ALL")
    assert strengths(have) == strengths(want)
    for key, ((_, adapter, *rest),) in want.patches.items():
        ((_, own, *others),) = have.patches[key]
        assert type(own) is type(adapter) and others == rest
        assert torch.equal(own.weights[0], adapter.weights[0])


def test_other_weights_than_the_model_takes(load, path):
    with pytest.raises(InvalidInput, match="12 block weights, but this model takes 17"):
        load_by_block(load(), path, 1.0, "1" + ",1" * 11)
