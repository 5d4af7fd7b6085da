"""The fused kernel against `attended_keys` in double precision; `test_kernel.py` runs this file in another process.

Under Triton's interpreter where `TRITON_INTERPRET=1`, otherwise on a GPU.
"""

import os

import pytest
import torch

from compressor.attention import argmax as probing
from compressor.attention import kernel
from compressor.attention.argmax import attended_keys

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
BLOCK = 16
TOKENS = 21  # two blocks, the second not full
HALVES = [torch.float16, torch.bfloat16]


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def inputs(batch=1, heads=2, kv_heads=1, queries=TOKENS, keys=TOKENS, dim=8, dtype=torch.float32, seed=0):
    return (
        draw(batch, heads, queries, dim, seed=seed, dtype=dtype),
        draw(batch, kv_heads, keys, dim, seed=seed + 1, dtype=dtype),
    )


def same(query, key, mask=None, *, block: int | None = BLOCK, **settings) -> tuple[torch.Tensor, torch.Tensor]:
    """Compare with the reference, which double precision leads to and is more exact in; give what was found."""
    assert kernel.usable(query, key, mask, None, settings.get("sinks"))
    assert not kernel.usable(query.double(), key.double(), mask)
    expected = attended_keys(query.double(), key.double(), mask, **settings)
    best, first = kernel.attended_keys_fused(query, key, mask, block=block, **settings)
    assert (best.dtype, first.dtype) == (torch.int64, torch.float32)
    assert torch.equal(best, expected.key)
    assert_close(first, expected.first)
    return best, first


def assert_close(first: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.allclose(first.double(), expected.double(), rtol=1e-4, atol=2e-6, equal_nan=True)


def padding(tokens: int) -> torch.Tensor:
    """Three rows of tokens: padded on the right, on the left, and on both sides over more than a block."""
    place = torch.arange(tokens, device=DEVICE)
    return torch.stack([place < tokens - 5, place >= 3, (place >= BLOCK + 2) & (place < tokens - 1)])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("tokens", [1, 7, 16, 17, 50])
def test_sizes_that_are_multiples_of_the_block_or_not(tokens, causal):
    best, _ = same(*inputs(queries=tokens, keys=tokens), causal=causal, scaling=0.7)
    if tokens == 50:
        assert len(best.unique()) > BLOCK  # these heads look around, and into more than one block


@pytest.mark.parametrize(("queries", "keys"), [(1, 50), (3, 40), (40, 3), (17, 33)])
def test_as_many_keys_as_there_are(queries, keys):
    same(*inputs(queries=queries, keys=keys))


@pytest.mark.parametrize(("dtype", "dim"), [(torch.float32, 64), (torch.bfloat16, 64), (torch.float16, 80)])
def test_the_tiles_of_a_gpu_and_the_scaling_by_default(dtype, dim):
    """Square tiles, and such as hold more queries than keys."""
    same(*inputs(queries=70, keys=70, dim=dim, dtype=dtype), causal=True, block=None)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("dim", [1, 6, 24, 80])
def test_dimensions_that_are_no_powers_of_two(dim, dtype):
    same(*inputs(dim=dim, dtype=dtype), causal=True)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (4, 1)])
def test_grouped_queries(heads, kv_heads):
    same(*inputs(heads=heads, kv_heads=kv_heads), causal=True)


def test_any_strides():
    """As models have them: heads behind tokens, and queries and keys side by side in one projection."""
    fused = draw(2, TOKENS, 4, 8, seed=3)
    same(fused[:, :, :2].transpose(1, 2), fused[:, :, 2:].transpose(1, 2), causal=True)
    reverse = draw(2, 1, 8, TOKENS, seed=4).transpose(2, 3)
    same(inputs(batch=2)[0], reverse)


@pytest.mark.filterwarnings("ignore:invalid value")  # 0/0 of the queries that see nothing
@pytest.mark.parametrize("form", ["keys", "square", "causal", "heads"])
def test_boolean_masks(form):
    query, key = inputs(batch=3)
    see = padding(TOKENS)[:, None, None]
    if form == "square":
        see = see & see.transpose(2, 3)
    if form == "causal":
        see = see & torch.ones(TOKENS, TOKENS, dtype=torch.bool, device=DEVICE).tril()
    if form == "heads":
        see = draw(1, 2, TOKENS, TOKENS, seed=5) > 0
    best, first = same(query, key, see, first_key=padding(TOKENS).long().argmax(-1))
    if form == "square":  # padded queries see nothing at all
        assert best[1, :, :3].eq(0).all()
        assert first[1, :, :3].isnan().all()
    same(query, key, see, causal=True)  # which a mask overrules


def test_a_mask_of_two_axes_and_a_sliding_window():
    distance = torch.arange(35, device=DEVICE)[:, None] - torch.arange(35, device=DEVICE)
    same(*inputs(queries=35, keys=35), (distance >= 0) & (distance < 9))


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_additive_masks(dtype):
    query, key = inputs(batch=3)
    see = padding(TOKENS)[:, None, None] & torch.ones(TOKENS, TOKENS, dtype=torch.bool, device=DEVICE).tril()
    mask = torch.zeros(see.shape, dtype=dtype, device=DEVICE).masked_fill(~see, -torch.inf)
    same(query, key, mask, first_key=padding(TOKENS).long().argmax(-1))
    same(query, key, draw(1, 2, TOKENS, TOKENS, seed=6, dtype=dtype))  # differs between heads, and hides nothing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_lowest_finite_number_hides_a_key(dtype):
    """Where it hides all of them none is hidden: 1/keys, where the reference's logarithm loses the number of keys."""
    query, key = inputs(batch=3)
    see = padding(TOKENS)[:, None, None] & torch.ones(TOKENS, TOKENS, dtype=torch.bool, device=DEVICE).tril()
    mask = torch.zeros(see.shape, dtype=dtype, device=DEVICE).masked_fill(~see, torch.finfo(dtype).min)
    settings = {"first_key": padding(TOKENS).long().argmax(-1)}
    best, first = kernel.attended_keys_fused(query, key, mask, block=BLOCK, **settings)
    expected = attended_keys(query.double(), key.double(), mask, **settings)
    sighted = see.any(-1).expand(best.shape)
    assert torch.equal(best, expected.key)
    assert_close(first[sighted], expected.first[sighted])
    assert_close(first[~sighted], torch.full_like(first[~sighted], 1 / TOKENS))


@pytest.mark.parametrize(("softcap", "scaling"), [(0.3, 0.05), (1.0, None), (30.0, 5.0)])
def test_capped_scores(softcap, scaling):
    query, key = inputs()
    same(query, key, softcap=softcap, scaling=scaling, causal=True)
    same(
        query, key, draw(1, 1, TOKENS, TOKENS, seed=7), softcap=softcap, scaling=scaling
    )  # the mask comes after the cap


def test_a_cap_that_is_reached_makes_ties():
    query, key = inputs()
    best, _ = same(query.round(), key.round(), softcap=1.0, scaling=40.0)
    assert best.max() < BLOCK  # the first of many saturated scores


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sinks(dtype):
    query, key = inputs(batch=3, heads=4)
    sinks = torch.tensor([-30.0, 0.0, 2.0, 90.0], device=DEVICE, dtype=dtype)
    _, without = same(query, key, causal=True)
    _, first = same(query, key, causal=True, sinks=sinks)
    assert (first[:, 3] < 1e-6).all()
    assert (first[:, 1:3] < without[:, 1:3]).all()
    see = padding(TOKENS)[:, None, None] & padding(TOKENS)[:, None, :, None]
    _, first = same(query, key, see, sinks=sinks)
    assert first[1, :, :3].eq(0).all()  # the sink has it all where nothing is seen


def test_the_first_key_is_the_first_real_one():
    """On either side of a block's border, and in the future."""
    query, key = inputs(batch=3)
    first_key = torch.tensor([BLOCK - 1, BLOCK, 0], device=DEVICE)
    same(query, key, first_key=first_key)
    _, first = same(query, key, first_key=first_key, causal=True)
    assert first[1, :, :BLOCK].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_exact_ties_go_to_the_lowest_index(dtype):
    """Whole numbers have exact scores; every key comes again in its own block and in the others."""
    query = draw(1, 2, 35, 6, seed=8).mul(2).round().to(dtype)
    key = draw(1, 1, 5, 6, seed=9).mul(2).round().to(dtype).repeat(1, 1, 7, 1)
    best, _ = same(query, key, scaling=1.0)
    assert best.max() < 5
    assert len(best.unique()) > 2
    same(query, key, scaling=1.0, causal=True)
    same(query, key, draw(1, 1, 35, 35, seed=10) > 0, scaling=1.0)
    ones = torch.ones_like(key)
    assert same(query, ones)[0].eq(0).all()
    assert same(query, ones, padding(35)[2, None, None, None])[0].eq(BLOCK + 2).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_large_scores_overflow_nothing(sign):
    query, key = inputs()
    _, first = same(query.abs() * 1e3, sign * key.abs() * 1e3)
    assert first.isfinite().all()


@pytest.mark.filterwarnings("ignore:invalid value")
def test_scores_that_are_no_numbers_are_told_by_the_mass():
    query, key = inputs(batch=2)
    key[0, 0, 17] = torch.nan
    best, first = kernel.attended_keys_fused(query, key, None, block=BLOCK)
    assert first[0].isnan().all()
    assert first[1].isfinite().all()
    assert ((best >= 0) & (best < TOKENS)).all()


def test_attended_keys_takes_the_kernel_where_it_can(monkeypatch):
    calls = []

    def spy(*given, **settings):
        calls.append(settings)
        return kernel_itself(*given, **settings)

    kernel_itself = kernel.attended_keys_fused
    monkeypatch.setattr(kernel, "attended_keys_fused", spy)
    query, key = inputs()
    sinks, first_key = draw(2, seed=11), torch.tensor([2], device=DEVICE)
    settings = {"causal": True, "softcap": 2.0, "scaling": 0.3, "sinks": sinks, "first_key": first_key}
    found = attended_keys(query, key, None, **settings)
    assert calls == [settings]
    expected = attended_keys(query.double(), key.double(), None, **settings)
    assert torch.equal(found.key, expected.key)
    assert torch.allclose(found.first.double(), expected.first, atol=2e-6)
    assert found.keys == expected.keys == TOKENS
    attended_keys(query, key, None, bias=draw(1, 2, TOKENS, TOKENS, seed=12))
    attended_keys(query, key, None, sinks=draw(1, 2, TOKENS, 1, seed=13))
    assert len(calls) == 1
    assert isinstance(found, probing.Attended)
