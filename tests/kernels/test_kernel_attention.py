"""Attention: every variant at every head size, ragged ends, hostile neighbours, and refusals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import triton
from harness import CHIPS, DEVICE, call_of, check, chip, find, run

from accel.kernels import Call, Config, TensorSpec, load_triton
from accel.kernels import attention as family
from accel.tuning.compiling import launches_of

assert load_triton()

F16, BF16 = torch.float16, torch.bfloat16
NAME = "triton.attention"


def random(*shape: int, dtype: torch.dtype = F16, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def merged(
    images: int, queries: int, heads: int, head: int, dtype: torch.dtype = F16
) -> list[torch.Tensor]:
    """Query, key and value as slices of one tensor in which NaN surrounds each of them."""
    width = heads * head
    rows = random(images, queries, 7 * width, dtype=dtype)
    rows.unflatten(-1, (7, width))[:, :, ::2] = float("nan")
    return [rows[..., n * width : (n + 1) * width] for n in (1, 3, 5)]


def crossed(
    images: int, queries: int, keys: int, heads: int, head: int, dtype: torch.dtype = F16
) -> list[torch.Tensor]:
    """A query of its own, and key and value as slices of what a prompt gives all layers."""
    width = heads * head
    prompt = random(images, keys, 5 * width, dtype=dtype, seed=1)
    prompt.unflatten(-1, (5, width))[:, :, ::2] = float("nan")
    query = random(images, queries, width, dtype=dtype)
    return [query, prompt[..., width : 2 * width], prompt[..., 3 * width : 4 * width]]


def usual(heads: int, head: int) -> dict[str, Any]:
    return {"heads": heads, "scale": head**-0.5}


@pytest.mark.parametrize("head", [8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 128, 160])
def test_every_head_size(head: int) -> None:
    """A full block of keys and a ragged one, through descriptors and without, and all at once."""
    tensors = merged(1, 37, 2, head)
    for config in (
        family._streamed(64, 32, 4, 2),
        family._streamed(64, 32, 4, 2, tma=False),
        family._shortened(64, 4, 1),
    ):
        check(NAME, tensors, usual(2, head), config)


def told_apart(variants: list[Config]) -> list[Config]:
    """Those that differ in what is computed; on a GPU all."""
    if DEVICE.type == "cuda":
        return variants
    same = ("warps", "stages", "registers")
    kept = {str([n for n in config.items() if n[0] not in same]): config for config in variants}
    return list(kept.values())


@pytest.mark.parametrize(
    ("head", "dtype"), [(40, F16), (40, BF16), (64, BF16), (80, F16), (160, BF16)], ids=str
)
def test_every_variant(head: int, dtype: torch.dtype) -> None:
    """All that any chip is given, with full blocks of keys and a ragged one."""
    every = [*family._hopper(head), *family._blackwell(head), *family._ampere(head)]
    tensors = crossed(1, 16, 150, 1, head, dtype)
    for config in told_apart(every):
        check(NAME, tensors, usual(1, head), config)


@pytest.mark.parametrize("keys", [1, 7, 16, 33, 64, 77, 80, 96, 100, 130, 154, 192])
def test_prompts_of_every_length(keys: int) -> None:
    head, dtype = (64, BF16) if keys in (77, 130) else (40, F16)
    tensors = crossed(2, 19, keys, 1, head, dtype)
    check(NAME, tensors, usual(1, head), family._shortened(64, 4, 1))
    check(NAME, tensors, usual(1, head), family._streamed(32, 64, 2, 2))


@pytest.mark.parametrize("repeat", [2, 4])
def test_programs_of_several_tiles(repeat: int) -> None:
    """The last program has tiles without a single query."""
    for head, keys in ((80, 77), (160, 32)):
        tensors = crossed(1, 40, keys, 1, head)
        check(NAME, tensors, usual(1, head), family._shortened(16, 4, repeat))


@pytest.mark.parametrize("queries", [1, 31, 32, 33])
def test_queries_that_do_not_fill_a_tile(queries: int) -> None:
    tensors = crossed(1, queries, 40, 1, 40)
    for config in (
        family._streamed(32, 32, 4, 3, sum="mma"),
        family._streamed(32, 32, 4, 3, tma=False),
        family._shortened(32, 4, 1),
    ):
        check(NAME, tensors, usual(1, 40), config)


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0), (12, 0)], ids=str)
def test_what_each_chip_would_run(capability: Any) -> None:
    """Its own first choices, for self-attention and for a prompt."""
    for tensors, head in ((merged(1, 110, 1, 40), 40), (crossed(1, 16, 77, 1, 64), 64)):
        call, _ = call_of("attention", tensors, usual(1, head))
        for config in family._configs(call, chip(capability))[:2]:
            check(NAME, tensors, usual(1, head), {**config, "rows": 128}, chip(capability))


VARIANTS = [
    family._streamed(16, 32, 1, 2),
    family._streamed(16, 32, 1, 2, sum="mma"),
    family._streamed(16, 32, 1, 2, sum="mma", cut=False),
    family._shortened(16, 1, 1),
]


@pytest.mark.parametrize("config", VARIANTS, ids=str)
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize("spread", [0.02, 1.0, 4.0, 30.0])
def test_flat_and_peaked_softmax(config: Config, dtype: torch.dtype, spread: float) -> None:
    """From all keys alike to one key alone, as in networks; the same bound on the error."""
    query, key, value = crossed(1, 16, 150, 1, 40, dtype)
    check(NAME, [(query * spread).to(dtype), key, value], usual(1, 40), config)


@pytest.mark.parametrize("config", VARIANTS, ids=str)
@pytest.mark.parametrize("order", ["rising", "falling"])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_highest_logit_comes_last_or_first(config: Config, order: str, sign: int) -> None:
    """Every block of keys raises the peak by more than fp16 could hold, or none does."""
    keys = torch.linspace(0.1, 60.0, 150)
    query = torch.full((1, 5, 16), float(sign), dtype=F16, device=DEVICE)
    key = (keys if order == "rising" else keys.flip(0))[None, :, None].expand(1, 150, 16)
    key = key.contiguous().to(DEVICE, F16)
    value = random(1, 150, 16, seed=2)
    check(NAME, [query, key, value], {"heads": 1, "scale": 0.25}, config)


@pytest.mark.parametrize("config", VARIANTS, ids=str)
def test_logits_beyond_every_half(config: Config) -> None:
    """Logits of some millions: softmax picks one key, and nothing overflows."""
    query, key, value = crossed(1, 16, 150, 1, 64)
    result = run(NAME, [query * 300, key * 300, value], {"heads": 1, "scale": 1.0}, config)
    logits = (query.double() * 300) @ (key.double() * 300).transpose(1, 2)
    assert logits.abs().max() > 1e6
    picked = value[0, logits[0].argmax(-1)]
    assert torch.equal(result[0], picked)


def test_a_value_that_dominates_is_not_lost() -> None:
    """Weights as small as 2**-20 beside one of 1, which fp16 alone would flush to zero."""
    query = torch.ones(1, 16, 16, dtype=F16, device=DEVICE)
    key = torch.full((1, 64, 16), -13.0 / 16, dtype=F16, device=DEVICE)
    key[:, 0] = 0.0
    value = torch.zeros(1, 64, 16, dtype=F16, device=DEVICE)
    value[:, 1:] = 30000.0
    for config in VARIANTS:
        check(NAME, [query, key, value], {"heads": 1, "scale": 1.0}, config)


def test_results_do_not_depend_on_the_rest_of_the_batch() -> None:
    tensors = merged(2, 40, 1, 40)
    for config in (family._streamed(64, 32, 4, 3, sum="mma"), family._shortened(64, 4, 1)):
        together = run(NAME, tensors, usual(1, 40), config)
        alone = run(NAME, [t[1:2] for t in tensors], usual(1, 40), config)
        assert torch.equal(together[1:2], alone)


# What is chosen.


def spec(*shape: int, stride: tuple[int, ...] | None = None, **others: Any) -> TensorSpec:
    made = TensorSpec.of(torch.empty(shape, dtype=others.pop("dtype", F16), device="meta"))
    return replace(made, stride=stride or made.stride, **others)


def call(
    images: int = 2, queries: int = 4096, keys: int | None = None, heads: int = 8, head: int = 40
) -> Call:
    """As the networks make it: merged projections, or a slice of the prompt's."""
    width = heads * head
    if keys is None:
        query = other = spec(images, queries, width, stride=(3 * queries * width, 3 * width, 1))
    else:
        query = spec(images, queries, width)
        other = spec(images, keys, width, stride=(keys * 24960, 24960, 1))
    return Call(
        "attention", spec(images, queries, width), (query, other, other), usual(heads, head)
    )


SIZES = [
    call(head=40),
    call(queries=16384, head=40),
    call(queries=3957, head=40),
    call(queries=1024, head=80),
    call(queries=256, head=160),
    call(queries=64, head=160),
    call(heads=10, head=64),
    call(queries=1024, heads=20, head=64),
    call(keys=77, head=40),
    call(queries=1024, keys=77, head=80),
    call(queries=256, keys=154, head=160),
    call(queries=64, keys=77, head=160),
    call(queries=1024, keys=77, heads=20, head=64),
    call(queries=1024, keys=231, heads=20, head=64),
    call(queries=100, heads=5, head=8),
    call(queries=100, heads=1, head=128),
]


@pytest.mark.parametrize("capability", [c for c in CHIPS if c >= (8, 0)], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=lambda size: size.key)
def test_every_chip_has_a_few_variants_that_fit(size: Call, capability: Any) -> None:
    hardware = chip(capability)
    kernel = find(NAME)
    assert kernel.supports(size, hardware) and kernel.configs is not None
    chosen = kernel.configs(size, hardware)
    assert 1 <= len(chosen) <= family.MOST_CONFIGS
    assert len({str(config) for config in chosen}) == len(chosen)
    shape = family._Shape.of(size, hardware)
    for config in chosen:
        assert hardware.shared_bytes is not None
        assert family._shared(config, shape) <= hardware.shared_bytes
        assert kernel.workspace(size, config) == 0
        assert not (config.get("tma") and capability[0] not in (9, 10))
        assert capability[0] == 9 or config.get("sum", "alu") == "alu"
    prompts = size.tensors[1] is not None and size.tensors[1].shape[1] <= 96
    if prompts and shape.head < 160:
        assert {config["kind"] for config in chosen} == {"short"}


def test_the_right_tiles_come_first() -> None:
    hopper = chip()

    def first(size: Call) -> Config:
        return family._configs(size, hopper)[0]

    assert first(call(head=40))["rows"] == 128  # half the traffic, and blocks enough
    assert first(call(queries=1024, heads=20, head=64))["rows"] == 64  # 320 would be 2.4 waves
    assert first(call(queries=256, head=160))["rows"] in (32, 64)  # 128 would be 32 blocks
    prompt = call(queries=1024, keys=77, heads=20, head=64)
    assert family._programs(first(prompt), family._Shape.of(prompt, hopper)) >= 132
    kinds = {(c["cut"], c["sum"]) for c in family._configs(call(head=40), hopper)}
    assert {(True, "mma"), (False, "mma"), (False, "alu")} <= kinds


def test_heads_and_prompts_are_padded_little() -> None:
    cut = {8: (16, 0), 40: (32, 16), 48: (32, 16), 64: (64, 0), 80: (64, 16), 96: (64, 32)}
    for head, expected in (cut | {56: (64, 0), 128: (128, 0), 160: (128, 32)}).items():
        assert family.parts(head, True) == expected
        assert family.parts(head, False) == (max(16, triton.next_power_of_2(head)), 0)
    assert [family.blocks(n) for n in (1, 16, 17, 33, 77, 80, 96, 128, 154, 192)] == [
        *((16, 0), (16, 0), (32, 0), (32, 16), (64, 16), (64, 16), (64, 32)),
        *((128, 0), (128, 32), (128, 64)),
    ]
    for keys in range(1, family.SHORT + 1):
        first, second = family.blocks(keys)
        assert keys <= first + second < max(1.5 * keys, keys + 32)
        assert second == 0 or first < keys  # only the last block has a mask


def test_launches_are_data() -> None:
    """One launch; descriptors and a limit on registers only where the variant asks for them."""
    size = call(queries=3957, head=40)
    launched = {}
    for config in (
        family._streamed(128, 64, 4, 3),
        family._streamed(64, 64, 4, 3, cut=False, registers=128),
        family._streamed(64, 64, 4, 3, tma=False),
        family._shortened(64, 4, 4),
    ):
        if config["kind"] == "short":
            size = call(queries=3957, keys=77, head=40)
        (launch,) = launches_of(find(NAME), config, size)
        launched[str(config)] = launch
        tile = config["rows"] * config.get("repeat", 1)  # type: ignore[operator]
        assert launch.grid == (-(-3957 // tile), 16)
        assert launch.options["num_warps"] == 4 and launch.options["enable_fp_fusion"] is True
        assert launch.args["scale"] == pytest.approx(40**-0.5 * 1.442695)
        assert launch.options.get("maxnreg", 0) == config.get("registers", 0)
    cut, whole, plain, short = launched.values()
    assert cut.args["key1_blocks"].block_shape == [1, 64, 16]
    assert cut.args["value0_blocks"].strides == [3957 * 960, 960, 1]
    assert whole.args["key0_blocks"].block_shape == [1, 64, 64]
    assert whole.args["key1_blocks"] is None and plain.args["key0_blocks"] is None
    assert "key0_blocks" not in short.args and (short.args["KEYS0"], short.args["KEYS1"]) == (
        64,
        16,
    )


def refused(change: Any, capability: Any = (9, 0)) -> bool:
    good = call(queries=100, heads=2, head=40)
    kernel = find(NAME)
    assert kernel.supports(good, chip(capability)) or capability < (8, 0)
    return not kernel.supports(change(good), chip(capability))


def with_tensors(**changes: Any) -> Any:
    """Of query, key and value, by index, or of all."""

    def change(good: Call) -> Call:
        which = changes.get("which", (0, 1, 2))
        rest = {name: value for name, value in changes.items() if name != "which"}
        tensors = [
            t and replace(t, **rest) if n in which else t for n, t in enumerate(good.tensors)
        ]
        return replace(good, tensors=tuple(tensors))

    return change


def test_refusals() -> None:
    assert refused(lambda good: good, (7, 5))
    assert refused(with_tensors(dtype=torch.float32))
    assert refused(with_tensors(which=(1,), dtype=BF16))
    for which in ((0,), (1,), (2,)):
        assert refused(with_tensors(which=which, aligned=False))
        assert refused(with_tensors(which=which, stride=(100 * 241, 241, 1)))
        assert refused(with_tensors(which=which, stride=(24001, 240, 1)))
        assert refused(with_tensors(which=which, stride=(24000, 240, 2)))
        assert refused(with_tensors(which=which, stride=(0, 240, 1)))
        assert refused(with_tensors(which=which, stride=(24000, 0, 1)))
        assert refused(with_tensors(which=which, stride=(1 << 33, 1 << 28, 1)))
    assert refused(with_tensors(which=(1,), shape=(2, 77, 80)))
    assert refused(with_tensors(which=(1, 2), shape=(1, 100, 80)))
    assert refused(lambda good: replace(good, attrs=usual(4, 20)))
    assert refused(lambda good: replace(good, attrs=usual(3, 40)))
    assert refused(lambda good: replace(good, attrs=good.attrs | {"scale": 0.0}))
    assert refused(lambda good: replace(good, attrs=good.attrs | {"scale": -1.0}))
    assert refused(lambda good: replace(good, out=replace(good.out, dtype=BF16)))
    assert refused(lambda good: replace(good, out=replace(good.out, stride=(16000, 160, 1))))
    assert refused(lambda good: replace(good, out=replace(good.out, aligned=False)))
    assert refused(lambda good: call(queries=100, heads=1, head=168))
    assert refused(lambda good: call(images=1 << 13, queries=16, heads=8, head=8))


def test_the_stride_of_a_single_image_does_not_matter() -> None:
    tensors = [t.as_strided(t.shape, (3, *t.stride()[1:])) for t in merged(1, 40, 1, 40)]
    for config in (family._streamed(64, 32, 4, 2), family._shortened(64, 4, 1)):
        check(NAME, tensors, usual(1, 40), config)


def test_what_the_libraries_take() -> None:
    hopper, ada, turing = chip((9, 0)), chip((8, 9)), chip((7, 5))
    cudnn, flash = find("cudnn.attention"), find("flash.attention")
    assert find("torch.sdpa").priority < min(cudnn.priority, flash.priority, find(NAME).priority)
    half, wide, widest = call(head=40), call(head=160), call(queries=64, head=264)
    assert cudnn.supports(half, hopper) and cudnn.supports(half, ada)
    assert cudnn.supports(wide, hopper) and not cudnn.supports(wide, ada)
    assert not cudnn.supports(wide, replace(hopper, cudnn="9.8.0"))
    assert not cudnn.supports(half, replace(hopper, cudnn="8.9.2"))
    assert not cudnn.supports(half, replace(hopper, cudnn=None))
    assert flash.supports(half, ada) and flash.supports(wide, ada)
    odd = call(queries=64, heads=4, head=20)
    single = with_tensors(dtype=torch.float32)(half)
    for kernel in (cudnn, flash):
        assert kernel.allocates
        for size, hardware in ((half, turing), (widest, hopper), (odd, hopper), (single, hopper)):
            assert not kernel.supports(size, hardware)
        assert not kernel.supports(with_tensors(which=(1,), aligned=False)(half), hopper)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["torch.sdpa", "cudnn.attention", "flash.attention"])
def test_libraries_join_heads_without_a_copy(name: str) -> None:
    tensors, attrs = merged(2, 128, 8, 64), usual(8, 64)
    result = find(name).run(None, *tensors, **attrs)
    assert result.is_contiguous() and result._is_view()
