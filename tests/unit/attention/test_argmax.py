"""The most attended key against a full matrix of scores in float64, and against brute force in Python floats."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch.nn import functional

from compressor.attention import AttentionProbe, argmax, attention_layers
from compressor.attention.argmax import Attended, attended_keys
from compressor.measure.memory import _LiveStorages

SCRATCH = pytest.mark.parametrize("scratch", [1, 300, 3000, None])


@dataclass
class Case:
    """Arguments of `attended_keys`, [batch, heads, queries, dim] and what goes with it, in float64."""

    query: torch.Tensor
    key: torch.Tensor
    mask: torch.Tensor | None
    options: dict

    def to(self, dtype: torch.dtype) -> "Case":
        return Case(self.query.to(dtype), self.key.to(dtype), self.mask, self.options)

    def found(self, scratch: int | None) -> Attended:
        return attended_keys(self.query, self.key, self.mask, scratch=scratch, **self.options)


def naive(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and masses from whole matrices in float64, with keys repeated and the sink as one more column."""
    query, key, options = case.query.double(), case.key.double(), case.options
    batch, heads, queries, dim = query.shape
    keys = key.shape[2]
    key = key.repeat_interleave(heads // key.shape[1], 1)
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key) * (options.get("scaling") or dim**-0.5)
    if (cap := options.get("softcap")) is not None:
        scores = cap * torch.tanh(scores / cap)
    if "bias" in options:
        scores = scores + options["bias"].double()
    if case.mask is None and options.get("causal"):
        scores = scores.masked_fill(torch.arange(keys) > torch.arange(queries)[:, None], -torch.inf)
    elif case.mask is not None and case.mask.dtype == torch.bool:
        scores = scores.masked_fill(~case.mask, -torch.inf)
    elif case.mask is not None:
        scores = scores + case.mask.double()
    every = scores
    if (sinks := options.get("sinks")) is not None:
        column = (sinks.view(1, heads, 1, 1) if sinks.ndim == 1 else sinks).double()
        every = torch.cat([scores, column.expand(batch, heads, queries, 1)], -1)
    start = options.get("first_key", torch.zeros(batch, dtype=torch.long))
    weights = every.softmax(-1)
    return scores.argmax(-1), torch.stack([weights[row, :, :, first] for row, first in enumerate(start.tolist())])


def padding(lengths: list[int], tokens: int, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What queries may see causally of padded sequences, [batch, 1, tokens, tokens], and the first real keys."""
    place = torch.arange(tokens)
    starts = torch.tensor([tokens - length if side == "left" else 0 for length in lengths])
    real = (place >= starts[:, None]) & (place < (starts + torch.tensor(lengths))[:, None])
    own = torch.eye(tokens, dtype=torch.bool)  # padding sees itself, so that no row is empty
    return (real[:, None, None] & place.le(place[:, None])) | own, starts


def make_case(kind: str, tokens: int) -> Case:
    """A case of its kind: 3 sequences, 6 heads of 5 numbers."""
    generator = torch.Generator().manual_seed(tokens)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    kv_heads = {"grouped": 2, "multi-query": 1, "grouped bias and sinks": 2}.get(kind, 6)
    query, key, options, mask = draw(3, 6, tokens, 5), draw(3, kv_heads, tokens, 5), {}, None
    place = torch.arange(tokens)
    lengths = [tokens, max(1, tokens // 2), 1]
    if kind in ("causal", "grouped", "multi-query", "scaled", "sinks", "grouped bias and sinks", "late first key"):
        options["causal"] = True
    if kind == "scaled":
        options["scaling"] = 0.7
    elif kind == "late first key":  # without a mask: queries before it may not see it, and give it no mass
        options["first_key"] = torch.tensor([0, tokens // 2, tokens - 1])
    elif kind == "sliding":
        mask = (place.le(place[:, None]) & place.gt(place[:, None] - 4)).expand(1, 1, -1, -1)
    elif kind in ("right", "left"):
        mask, options["first_key"] = padding(lengths, tokens, kind)
    elif kind == "encoder":
        mask = place.lt(torch.tensor(lengths)[:, None])[:, None, None]
    elif kind == "additive":
        see, options["first_key"] = padding(lengths, tokens, "left")
        mask = torch.zeros(see.shape).masked_fill(~see, torch.finfo(torch.float32).min)
    elif kind == "flat mask":
        mask = place.le(place[:, None])
    elif kind == "mask by head":
        mask = draw(1, 6, tokens, tokens)
    elif kind == "softcap":
        mask, options["first_key"] = padding(lengths, tokens, "right")
        options["softcap"] = 0.8
    elif kind == "bias":
        options["bias"] = draw(1, 6, tokens, tokens)
    elif kind == "bias by key":
        options |= {"bias": draw(3, 6, 1, tokens), "causal": True}
    elif kind == "sinks":
        options["sinks"] = draw(6)
    elif kind == "grouped bias and sinks":
        options |= {"bias": draw(3, 6, tokens, tokens), "sinks": draw(3, 6, tokens, 1)}
    return Case(query, key, mask, options)


PLAIN = ["full", "causal", "scaled", "late first key", "sliding", "right", "left", "encoder", "additive", "flat mask"]
SPECIAL = [
    "mask by head",
    "softcap",
    "bias",
    "bias by key",
    "sinks",
    "grouped",
    "multi-query",
    "grouped bias and sinks",
]


@SCRATCH
@pytest.mark.parametrize("tokens", [1, 9, 64, 150])
@pytest.mark.parametrize("kind", [*PLAIN, *SPECIAL])
def test_attended_keys_against_whole_matrices(kind, tokens, scratch):
    """Also where the blocks of queries, heads and sequences leave remainders: 150 is no multiple of anything."""
    case = make_case(kind, tokens)
    key, first = naive(case)
    found = case.found(scratch)
    assert found.keys == tokens
    assert torch.equal(found.key, key)
    assert found.first.dtype == torch.float64
    assert torch.allclose(found.first, first, rtol=1e-9, atol=1e-12)


@SCRATCH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["full", "causal", "left", "additive", "bias", "sinks", "grouped"])
def test_narrow_inputs_are_scored_in_float32(kind, dtype, scratch):
    """The reference sees the same rounded inputs; their products are exact in float32."""
    case = make_case(kind, 100).to(dtype)
    key, first = naive(case)
    found = case.found(scratch)
    assert found.first.dtype == torch.float32
    assert torch.equal(found.key, key)
    assert torch.allclose(found.first.double(), first, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("keys", [3, 70, 200])
@pytest.mark.parametrize("causal", [False, True])
def test_there_may_be_other_numbers_of_keys_than_of_queries(keys, causal):
    """Causally, as in fused attention: query t sees keys 0 … t of those there are."""
    draw = torch.Generator().manual_seed(keys)
    query = torch.randn(2, 4, 90, 5, generator=draw, dtype=torch.float64)
    case = Case(query, torch.randn(2, 2, keys, 5, generator=draw, dtype=torch.float64), None, {"causal": causal})
    key, first = naive(case)
    for scratch in (1, 2000, None):
        assert torch.equal(case.found(scratch).key, key)
        assert torch.allclose(case.found(scratch).first, first)


def test_scores_far_apart_give_true_masses():
    """Differences at which exp underflows, and scores too large to be exponentiated as they are."""
    query = torch.tensor([1.0, 200.0, -200.0, 5000.0]).view(1, 1, 4, 1)
    key = torch.tensor([0.9, 1.0, -1.0]).view(1, 1, 3, 1)
    case = Case(query, key, None, {"scaling": 1.0})
    weights, first = naive(case)
    found = case.found(None)
    assert torch.equal(found.key, weights)
    assert torch.allclose(found.first.double(), first, rtol=1e-3, atol=1e-30)


def test_a_query_that_may_see_nothing_disturbs_no_other():
    case = make_case("left", 20)
    whole = case.found(None)
    case.mask = case.mask.clone()
    case.mask[1, :, 3] = False
    found = case.found(None)
    assert found.first[1, :, 3].isnan().all()
    others = torch.arange(20) != 3
    assert torch.equal(found.key[:, :, others], whole.key[:, :, others])
    assert torch.equal(found.first[:, :, others], whole.first[:, :, others])


def brute_force(query, key, mask, scaling):
    """Keys and masses, one query and one key at a time, in Python floats."""
    batch, heads, queries, _ = query.shape
    group = heads // key.shape[1]
    best = torch.zeros(batch, heads, queries, dtype=torch.long)
    first = torch.zeros(batch, heads, queries, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for t in range(queries):
                scores = [
                    sum(float(x) * float(y) for x, y in zip(query[b, h, t], key[b, h // group, k], strict=True))
                    * scaling
                    if mask[b, t, k]
                    else -math.inf
                    for k in range(key.shape[2])
                ]
                best[b, h, t] = scores.index(max(scores))
                total = sum(math.exp(score - max(scores)) for score in scores)
                first[b, h, t] = math.exp(scores[0] - max(scores)) / total
    return best, first


@SCRATCH
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_attended_keys_against_brute_force(scratch, causal, dtype):
    """bfloat16 inputs are scored in float32: the products of their values are exact there."""
    generator = torch.Generator().manual_seed(7)
    query = torch.randn(2, 4, 7, 6, generator=generator).to(dtype)
    key = torch.randn(2, 2, 7, 6, generator=generator).to(dtype)
    see = torch.ones(2, 7, 7, dtype=torch.bool)
    expected_key, expected_first = brute_force(query, key, see.tril() if causal else see, 0.7)
    found = attended_keys(query, key, None, scaling=0.7, causal=causal, scratch=scratch)
    assert torch.equal(found.key, expected_key)
    assert torch.allclose(found.first.double(), expected_first, atol=1e-5)


@SCRATCH
@pytest.mark.parametrize("form", ["boolean", "additive", "bfloat16"])
def test_masks_of_both_forms_equal_the_causal_default(scratch, form):
    generator = torch.Generator().manual_seed(1)
    query, key = torch.randn(2, 3, 9, 4, generator=generator), torch.randn(2, 3, 9, 4, generator=generator)
    see = torch.ones(1, 1, 9, 9, dtype=torch.bool).tril()
    mask = see
    if form != "boolean":
        dtype = torch.bfloat16 if form == "bfloat16" else torch.float32
        mask = torch.zeros(1, 1, 9, 9, dtype=dtype).masked_fill(~see, torch.finfo(dtype).min)
    expected = attended_keys(query, key, None, causal=True)
    found = attended_keys(query, key, mask, scratch=scratch)
    assert torch.equal(found.key, expected.key)
    assert torch.allclose(found.first, expected.first)


@SCRATCH
def test_a_mask_may_be_broadcast_over_the_queries(scratch):
    """[batch, 1, 1, keys] is broadcastable to [batch, heads, queries, keys]: what an encoder's padding is."""
    generator = torch.Generator().manual_seed(2)
    query, key = torch.randn(2, 3, 5, 4, generator=generator), torch.randn(2, 3, 5, 4, generator=generator)
    see = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]], dtype=torch.bool)[:, None, None]
    whole = attended_keys(query, key, see.expand(2, 1, 5, 5))
    assert torch.equal(attended_keys(query, key, see, scratch=scratch).key, whole.key)


def test_the_default_scaling_is_one_over_the_root_of_the_dimension():
    query, key = torch.randn(1, 1, 3, 16), torch.randn(1, 1, 3, 16)
    weights = torch.softmax(query @ key.transpose(-1, -2) / 4, -1)
    assert torch.allclose(attended_keys(query, key, None).first, weights[..., 0])


@SCRATCH
def test_ties_go_to_the_lowest_index(scratch):
    """Equal keys give equal scores: with one key for all every query takes the first one it may see."""
    query = torch.randn(1, 2, 6, 4, generator=torch.Generator().manual_seed(0))
    same = torch.ones(1, 2, 6, 4)
    assert attended_keys(query, same, None, scratch=scratch).key.eq(0).all()
    assert attended_keys(query, same, None, causal=True, scratch=scratch).key.eq(0).all()
    pad = torch.tensor([0, 0, 1, 1, 1, 1], dtype=torch.bool).expand(1, 1, 6, 6)
    assert attended_keys(query, same, pad, scratch=scratch).key.eq(2).all()
    repeated = torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0, 0.0])[None, None, :, None].expand(1, 2, 6, 4)
    assert attended_keys(torch.ones(1, 2, 6, 4), repeated, None, scratch=scratch).key.eq(1).all()
    assert torch.allclose(attended_keys(query, same, None, scratch=scratch).first, torch.tensor(1 / 6))


@SCRATCH
@pytest.mark.parametrize("tokens", [1, 9, 150])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("kv_heads", [6, 2, 1])
def test_attention_in_passing_is_that_of_torch(scratch, tokens, padding, kv_heads):
    """In double precision; what is found on the way is what is found alone, by the bit."""
    generator = torch.Generator().manual_seed(tokens + kv_heads)
    query, key, value = (
        torch.randn(3, tokens, heads, dim, generator=generator, dtype=torch.float64).transpose(1, 2)
        for heads, dim in ((6, 5), (kv_heads, 5), (kv_heads, 7))
    )
    mask = None
    if padding != "none":
        see = torch.ones(3, tokens, dtype=torch.bool)
        for row, length in enumerate((0, 1, tokens // 2)):
            see[row, slice(length) if padding == "left" else slice(tokens - length, None)] = tokens == 1
        mask = see[:, None, None] & see[:, None, :, None] & torch.ones(tokens, tokens, dtype=torch.bool).tril()
    found = attended_keys(query, key, mask, causal=True, value=value, scratch=scratch)
    alone = attended_keys(query, key, mask, causal=True, scratch=scratch)
    expected = functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=True
    )
    assert torch.equal(found.key, alone.key)
    assert torch.allclose(found.first, alone.first, rtol=1e-12, atol=0, equal_nan=True)
    assert alone.output is None
    assert found.output is not None
    assert found.output.shape == (3, tokens, 6, 7)
    assert torch.allclose(found.output.transpose(1, 2), expected, rtol=1e-12, atol=1e-13)


def test_the_first_key_is_the_first_real_one():
    query, key = torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4)
    first = torch.tensor([0, 2])
    found = attended_keys(query, key, None, first_key=first)
    weights = torch.softmax(query @ key.transpose(-1, -2) / 2, -1)
    assert torch.allclose(found.first[0], weights[0, ..., 0])
    assert torch.allclose(found.first[1], weights[1, ..., 2])


@SCRATCH
def test_ties_of_many_keys_go_to_the_lowest_index(scratch):
    """Whole numbers have exact products, so that many of the scores are the same; some of the heads are grouped."""
    draw = torch.Generator().manual_seed(3)
    query = torch.randint(-1, 2, (2, 4, 130, 3), generator=draw).float()
    key = torch.randint(-1, 2, (2, 2, 130, 3), generator=draw).float()
    for causal in (False, True):
        case = Case(query, key, None, {"causal": causal, "scaling": 0.5})
        assert torch.equal(case.found(scratch).key, naive(case)[0])


# --- memory


def scratch_bytes(case: Case, scratch: int | None = None) -> int:
    """Bytes alive at most beyond the arguments and what is returned."""
    resident = [case.query, case.key, *([] if case.mask is None else [case.mask])]
    with _LiveStorages(resident) as storages:
        before = storages.live
        found = case.found(scratch)
    return storages.peak - before - found.key.nbytes - found.first.nbytes


def plain_case(batch: int, heads: int, kv_heads: int, tokens: int, masked: bool = False) -> Case:
    query, key = torch.zeros(batch, heads, tokens, 32), torch.zeros(batch, kv_heads, tokens, 32)
    mask = torch.ones(tokens, tokens, dtype=torch.bool).tril().expand(batch, 1, -1, -1) if masked else None
    return Case(query, key, mask, {"causal": True, "first_key": torch.zeros(batch, dtype=torch.long)})


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kv_heads", [8, 2])
def test_memory_does_not_depend_on_the_length(kv_heads, masked):
    block = argmax.CAUSAL_QUERIES
    least = scratch_bytes(plain_case(1, 8, kv_heads, block, masked))
    assert least >= 4 * argmax.CPU_SCRATCH  # the measure sees it
    for tokens in (4 * block, 2048):
        assert scratch_bytes(plain_case(1, 8, kv_heads, tokens, masked)) <= 1.1 * least


@pytest.mark.parametrize("tokens", [64, 300])
def test_memory_does_not_depend_on_the_batch_or_the_heads(tokens):
    least = scratch_bytes(plain_case(1, 2, 1, tokens))
    assert scratch_bytes(plain_case(16, 2, 1, tokens)) <= 1.1 * least
    assert scratch_bytes(plain_case(1, 32, 16, tokens)) <= 1.1 * least
    assert scratch_bytes(plain_case(16, 32, 4, tokens)) <= 1.1 * least


def test_narrow_inputs_are_not_widened_as_a_whole():
    case = plain_case(16, 8, 8, 256)
    assert scratch_bytes(case.to(torch.bfloat16)) <= 1.1 * scratch_bytes(case)


def test_memory_is_what_was_allowed():
    case = plain_case(4, 4, 4, 200)
    assert 40_000 <= scratch_bytes(case, 10_000) < 70_000
    assert 400_000 <= scratch_bytes(case, 100_000) < 500_000


def test_a_whole_model_under_the_probe_makes_no_matrix_of_scores(build):
    """Watched, it needs no more than unwatched, but for the scratch and what is found."""
    model = build("llama", dtype=torch.float32, max_position_embeddings=1024)
    ids = torch.randint(3, 37, (2, 1024), generator=torch.Generator().manual_seed(0))
    resident = [*model.parameters(), ids]

    def peak() -> int:
        with torch.no_grad(), _LiveStorages(resident) as storages:
            model.model(ids, use_cache=False)
        return storages.peak

    alone = peak()
    with AttentionProbe(model, attention_layers(model)):
        watched = peak()
    found = 2 * 2 * 6 * 1024 * (8 + 4)
    assert watched <= alone + found + 1.1 * 4 * argmax.CPU_SCRATCH < alone + 4 * 2 * 6 * 1024**2
