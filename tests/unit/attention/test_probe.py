"""The probe against transformers' own eager attention matrices, and against brute force over all keys."""

import copy
import gc
import weakref
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AttentionInterface, AttentionMaskInterface, Gemma2Config, Gemma2ForCausalLM
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from compressor.attention import AttentionProbe, attention_layers, prune_heads
from compressor.attention import probe as probing
from compressor.attention.probe import attended_keys, sequence_symbols, token_symbols
from compressor.errors import ModelError

KINDS = pytest.mark.parametrize("kind", ["gpt2", "bert", "roberta", "llama", "mistral", "qwen3"])
PADDINGS = pytest.mark.parametrize("padding", ["none", "right", "left"])


def watch_uses(model, batch) -> dict[int, list[probing.Attended]]:
    """What every layer attends to, each time it is applied."""
    with AttentionProbe(model, attention_layers(model)) as probe, torch.no_grad():
        model(**batch)
        return probe.take()


def watch(model, batch) -> dict[int, probing.Attended]:
    """What every layer attends to, in a model that applies each once."""
    return only(watch_uses(model, batch))


def only(observed: dict[int, list[probing.Attended]]) -> dict[int, probing.Attended]:
    assert {len(uses) for uses in observed.values()} <= {1}
    return {index: uses[0] for index, uses in observed.items()}


def real(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """[batch, heads, queries] → [real queries, heads]."""
    return values.transpose(1, 2)[mask.bool()]


def column_of_first(weights: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    firsts = [row.tolist().index(1) for row in mask]
    return torch.stack([weights[row, :, :, first] for row, first in enumerate(firsts)])


@KINDS
@PADDINGS
@pytest.mark.parametrize("scratch", [1, 500, None])
def test_symbols_and_first_key_mass_equal_eager_attention(
    build, make_batch, eager_attentions, monkeypatch, kind, padding, scratch
):
    """In float32, in which the eager attention of all these models computes its softmax."""
    monkeypatch.setattr(probing, "attended_keys", partial(attended_keys, scratch=scratch))
    model, batch = build(kind, dtype=torch.float32), make_batch(padding)
    mask = batch["attention_mask"]
    with eager_attentions(model) as attentions, torch.no_grad():
        expected = attentions(**batch)
    observed = watch(model, batch)
    assert sorted(observed) == [0, 1]
    for index, weights in enumerate(expected):
        assert_seen(observed[index], weights, mask)


def assert_seen(found: probing.Attended, weights: torch.Tensor, mask: torch.Tensor) -> None:
    """What was observed follows from attention matrices [batch, heads, queries, keys]."""
    assert found.key.dtype == torch.int64
    assert torch.equal(real(found.key, mask), real(weights.argmax(-1), mask))
    first = real(column_of_first(weights, mask), mask)
    assert torch.allclose(real(found.first, mask), first, rtol=1e-4, atol=1e-6)
    assert len(real(found.key, mask).unique()) > 2  # these heads do look around


def test_a_mask_for_every_query_is_obeyed(build, make_batch):
    """One of four dimensions, which says all that one of two would, but not where the text begins."""
    model, batch = build("llama", dtype=torch.float32), make_batch("right")
    mask = batch["attention_mask"]
    tokens = mask.shape[1]
    visible = torch.ones(tokens, tokens, dtype=torch.bool).tril() & mask[:, None, None].bool()
    expected = watch(model, batch)
    found = watch(model, {**batch, "attention_mask": visible})
    for index, attended in expected.items():
        assert torch.equal(real(found[index].key, mask), real(attended.key, mask))
        assert torch.allclose(real(found[index].first, mask), real(attended.first, mask))


@PADDINGS
def test_a_layer_that_is_applied_several_times_is_seen_as_often(build, make_batch, eager_attentions, padding):
    """ALBERT has one layer, and transformers hands out a matrix for each of its uses."""
    model, batch = build("albert", dtype=torch.float32, num_hidden_layers=3), make_batch(padding)
    with eager_attentions(model) as attentions, torch.no_grad():
        expected = attentions(**batch)
    observed = watch_uses(model, batch)
    assert sorted(observed) == [0]
    for found, weights in zip(observed[0], expected, strict=True):
        assert_seen(found, weights, batch["attention_mask"])
    assert not torch.equal(observed[0][0].key, observed[0][1].key)


@PADDINGS
@pytest.mark.parametrize("kind", ["bloom", "mpnet", "falcon", "falcon-groups", "codegen"])
def test_models_that_attend_by_themselves_are_watched_as_they_are(build, make_batch, eager_attentions, kind, padding):
    """Their softmax is read, or what they give to fused attention; the attention they use is not changed."""
    model, batch = build(kind, dtype=torch.float32), make_batch(padding)
    before = model.config._attn_implementation
    assert AttentionProbe(model, attention_layers(model)).fallback
    observed = watch(model, batch)
    assert model.config._attn_implementation == before
    if before != "eager":  # Falcon has other modules there
        eager = build(kind, "eager", torch.float32)
        eager.load_state_dict(model.state_dict())
        model = eager
    with torch.no_grad():
        expected = model(**batch, output_attentions=True).attentions
    assert sorted(observed) == [0, 1]
    for index, weights in enumerate(expected):
        assert_seen(observed[index], weights, batch["attention_mask"])


@PADDINGS
def test_fused_layouts_are_watched(build, make_batch, eager_attentions, padding):
    """Multi-query, interleaved and latent attention through the interface."""
    for kind in ("gpt_bigcode", "gpt_neox", "phi3", "deepseek_v3"):
        model, batch = build(kind, dtype=torch.float32), make_batch(padding)
        with eager_attentions(model) as attentions, torch.no_grad():
            expected = attentions(**batch)
        assert not AttentionProbe(model, attention_layers(model)).fallback
        for index, found in watch(model, batch).items():
            assert_seen(found, expected[index], batch["attention_mask"])


@pytest.mark.parametrize("kind", ["gpt2", "bert", "llama"])
@pytest.mark.parametrize("pruned", [{0: [1], 1: [0, 2]}, {0: [0, 3]}])
def test_pruned_models_are_watched_too(build, make_batch, eager_attentions, kind, pruned):
    """The heads that stay attend as in the dense model in layer 0, whose input is the same."""
    dense, batch = build(kind, dtype=torch.float32), make_batch("right")
    with eager_attentions(dense) as attentions, torch.no_grad():
        weights = attentions(**batch)[0]
    kept = [head for head in range(weights.shape[1]) if head not in pruned[0]]
    model = prune_heads(copy.deepcopy(dense), pruned)
    implementation = model.config._attn_implementation
    observed = watch(model, batch)
    assert torch.equal(
        real(observed[0].key, batch["attention_mask"]), real(weights.argmax(-1)[:, kept], batch["attention_mask"])
    )
    assert model.config._attn_implementation == implementation


def test_layers_without_heads_are_passed_over(build, make_batch):
    model = prune_heads(build("gpt2"), {0: range(4)}, allow_empty=True)
    assert sorted(watch(model, make_batch())) == [1]


@pytest.fixture
def flash_like():
    """An attention function that takes its mask as flash attention does: None, or [batch, tokens]."""

    def attend(module, query, key, value, attention_mask, **kwargs):
        assert attention_mask is None or attention_mask.ndim == 2
        tokens = query.shape[2]
        see = torch.ones(tokens, tokens, dtype=torch.bool).tril()
        if attention_mask is not None:
            see = see & attention_mask.bool()[:, None, None]
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, see.expand(len(query), 1, -1, -1), **kwargs)

    AttentionInterface.register("takes_flat_masks", attend)
    AttentionMaskInterface.register("takes_flat_masks", ALL_MASK_ATTENTION_FUNCTIONS["flash_attention_2"])
    yield "takes_flat_masks"
    AttentionInterface._global_mapping.pop("takes_flat_masks")
    AttentionMaskInterface._global_mapping.pop("takes_flat_masks")


def test_an_implementation_with_masks_of_its_own_form_can_be_watched(build, make_batch, flash_like):
    """The mask under the probe is sdpa's, which flash and flex attention would choke on or misread."""
    model, batch = build("llama", dtype=torch.float32), make_batch("right")
    mask = batch["attention_mask"].bool()
    expected = watch(model, batch)
    model.set_attn_implementation(flash_like)
    with torch.no_grad():
        logits = model(**batch).logits[mask]
        with AttentionProbe(model, attention_layers(model)) as probe:
            assert torch.allclose(model(**batch).logits[mask], logits, rtol=1e-4, atol=1e-5)
            observed = only(probe.take())
    for index in expected:
        assert torch.equal(real(observed[index].key, mask), real(expected[index].key, mask))
    assert model.config._attn_implementation == flash_like


@pytest.mark.parametrize("kind", ["gpt2", "bert", "llama", "qwen3"])
@PADDINGS
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_output_under_the_probe_is_the_output_without(build, make_batch, kind, padding, implementation):
    model, batch = build(kind, implementation=implementation, dtype=torch.float32), make_batch(padding)
    mask = batch["attention_mask"].bool()
    with torch.no_grad():
        expected = model(**batch).logits[mask]
        with AttentionProbe(model, attention_layers(model)):
            actual = model(**batch).logits[mask]
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("kind", ["gpt2", "bert", "llama", "qwen3", "uneven"])
@PADDINGS
def test_attention_computed_in_passing_is_the_models_own(build, make_batch, monkeypatch, kind, padding):
    """Then sdpa is not called at all; symbols and masses are those of the second pass."""
    model = build("llama" if kind == "uneven" else kind)
    if kind == "uneven":
        prune_heads(model, {0: [0], 1: [3, 4]})
    batch = make_batch(padding)
    mask, layers = batch["attention_mask"].bool(), attention_layers(model)
    with torch.no_grad():
        expected = model(**batch).logits[mask]
        with AttentionProbe(model, layers) as probe:
            model(**batch)
            alone = only(probe.take())
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", None)
        with AttentionProbe(model, layers, in_passing=True) as probe:
            assert torch.allclose(model(**batch).logits[mask], expected, rtol=1e-9, atol=1e-10)
            found = only(probe.take())
    for index in alone:
        assert torch.equal(real(found[index].key, mask), real(alone[index].key, mask))
        assert torch.allclose(real(found[index].first, mask), real(alone[index].first, mask), rtol=1e-9)


@pytest.mark.parametrize("reason", ["gradients", "dropout", "eager", "bfloat16"])
def test_what_is_more_than_a_softmax_is_left_to_the_model(build, make_batch, reason):
    """The probe then takes its second pass, and the output is the model's by the bit."""
    implementation = "eager" if reason == "eager" else "sdpa"
    dtype = torch.bfloat16 if reason == "bfloat16" else torch.float32
    model, batch = build("gpt2", implementation=implementation, dtype=dtype), make_batch("none")
    if reason == "dropout":
        model = build("gpt2", dtype=dtype, attn_pdrop=0.5).train()
    outputs = []
    with torch.set_grad_enabled(reason == "gradients"):
        for in_passing in (False, True):
            torch.manual_seed(0)
            with AttentionProbe(model, attention_layers(model), in_passing=in_passing):
                outputs.append(model(**batch).logits)
    assert torch.equal(*outputs)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_uneven_models_compute_the_same_under_the_probe(build, make_batch, implementation):
    model = prune_heads(build("llama", implementation=implementation, dtype=torch.float32), {0: [0], 1: [3, 4]})
    batch = make_batch("right")
    mask = batch["attention_mask"].bool()
    with torch.no_grad():
        expected = model(**batch).logits[mask]
        with AttentionProbe(model, attention_layers(model)):
            actual = model(**batch).logits[mask]
    assert torch.equal(actual, expected)


@PADDINGS
def test_capped_scores_are_watched_as_they_are(make_batch, padding):
    """Gemma 2 bends its scores, which sdpa cannot: its own eager attention does the work under the probe."""
    config = Gemma2Config(
        vocab_size=37,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        attn_logit_softcapping=0.5,
        initializer_range=0.7,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Gemma2ForCausalLM._from_config(config, attn_implementation="eager").eval()
    batch = make_batch(padding)
    mask = batch["attention_mask"]
    with torch.no_grad():
        expected = model(**batch, output_attentions=True)
        with AttentionProbe(model, attention_layers(model)) as probe:
            assert torch.allclose(model(**batch).logits[mask.bool()], expected.logits[mask.bool()], atol=1e-5)
            observed = only(probe.take())
    for index, weights in enumerate(expected.attentions):
        first = real(column_of_first(weights, mask), mask)
        assert torch.allclose(real(observed[index].first, mask), first, rtol=1e-4, atol=1e-6)
        assert torch.equal(real(observed[index].key, mask), real(weights.argmax(-1), mask))


# --- symbols


def where_real(mask: torch.Tensor) -> torch.Tensor:
    return mask.flatten().nonzero().squeeze(1)


def symbols_of(key: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return token_symbols(key, mask, "key", where_real(mask))


def by_hand(key: torch.Tensor, lengths: list[int], symbol: str):
    """From unpadded sequences: key [heads, tokens] per row, one list of symbols per query."""
    rows = []
    for row, length in enumerate(lengths):
        for query in range(length):
            keys = [int(key[row, head, query]) for head in range(key.shape[1])]
            rows.append(keys if symbol == "key" else [query - position for position in keys])
    return rows


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_symbols_do_not_depend_on_the_padding(data):
    """Any keys, any lengths, any padding on either side: the symbols are those counted without it."""
    heads = data.draw(st.integers(1, 3))
    lengths = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    width = max(lengths) + data.draw(st.integers(0, 3))
    true = torch.zeros(len(lengths), heads, max(lengths), dtype=torch.long)
    padded = torch.zeros(len(lengths), heads, width, dtype=torch.long)
    mask = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        shift = data.draw(st.integers(0, width - length))  # padding on both sides is allowed too
        mask[row, shift : shift + length] = 1
        for head in range(heads):
            for query in range(length):
                position = data.draw(st.integers(0, length - 1))
                true[row, head, query] = position
                padded[row, head, shift + query] = shift + position
    for symbol in ("key", "offset"):
        assert token_symbols(padded, mask, symbol, where_real(mask)).tolist() == by_hand(true, lengths, symbol)
    tuples = sequence_symbols(padded, mask, width)
    assert tuples.shape == (len(lengths), heads, width)
    for row, length in enumerate(lengths):
        for head in range(heads):
            assert tuples[row, head].tolist() == true[row, head, :length].tolist() + [-1] * (width - length)


def test_a_model_of_relative_positions_sees_the_same_symbols_wherever_the_padding_is(build, make_batch):
    """Rotary positions are relative, so that left padding changes neither what Llama attends to nor the symbols."""
    model = build("llama")
    batch = make_batch("right")
    lengths = batch["attention_mask"].sum(1).tolist()
    left = {name: tensor.clone() for name, tensor in batch.items()}
    for row, length in enumerate(lengths):
        for tensor in left.values():
            tensor[row] = tensor[row].roll(tensor.shape[1] - length)
    right_seen, left_seen = watch(model, batch), watch(model, left)
    for index in (0, 1):
        alone = torch.cat(
            [
                token_symbols(
                    watch(model, {"input_ids": row[None, :length]})[index].key,
                    torch.ones(1, length),
                    "key",
                    torch.arange(int(length)),
                )
                for row, length in zip(batch["input_ids"], lengths, strict=True)
            ]
        )
        assert torch.equal(symbols_of(right_seen[index].key, batch["attention_mask"]), alone)
        assert torch.equal(symbols_of(left_seen[index].key, left["attention_mask"]), alone)


# --- the model is left as it was


def state(model) -> tuple:
    modules = [
        (name, set(vars(module)) - {"_indices"}, len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    ]
    return modules, model.config._attn_implementation, model.config.output_attentions, model.config.to_dict()


@pytest.fixture(params=[False, True], ids=["interface", "fallback"])
def prepared(request, build, monkeypatch):
    """A model, watched through the attention interface and as one that bypasses it."""
    model = build("gpt2", implementation="eager", dtype=torch.float32)
    model(torch.ones(1, 2, dtype=torch.long), output_attentions=True)  # transformers' own hooks stay once installed
    if request.param:
        bypass(monkeypatch)
    return model


def bypass(monkeypatch) -> None:
    """Give models the attention functions of transformers as they are, as if they never asked for them."""
    monkeypatch.setattr(AttentionInterface, "get_interface", AttentionInterface.get_interface.__wrapped__)


def test_everything_is_restored_after_the_block(prepared, make_batch):
    model, batch = prepared, make_batch("right")
    before = state(model)
    with torch.no_grad():
        expected = model(**batch).logits
        with AttentionProbe(model, attention_layers(model)) as probe:
            assert state(model) != before
            model(**batch)
            probe.take()
        assert torch.equal(model(**batch).logits, expected)
    assert state(model) == before


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_everything_is_restored_after_an_exception(prepared, make_batch, error):
    model, batch = prepared, make_batch()
    before = state(model)

    def interrupted() -> None:
        with AttentionProbe(model, attention_layers(model)):
            model(**batch)
            raise error("in between")

    with pytest.raises(error, match="in between"):
        interrupted()
    assert state(model) == before


def test_everything_is_restored_when_attaching_fails(prepared, monkeypatch):
    model = prepared
    layers = attention_layers(model)

    def fail(*_args, **_kwargs):
        raise RuntimeError("no hooks today")

    if AttentionProbe(model, layers).fallback:
        monkeypatch.setattr(model.get_submodule(layers[-1].name), "register_forward_hook", fail)
    else:
        monkeypatch.setattr(model.base_model, "register_forward_pre_hook", fail)
    before = state(model)
    with pytest.raises(RuntimeError, match="no hooks today"):
        AttentionProbe(model, layers).__enter__()
    assert state(model) == before


def test_a_probe_can_be_entered_again_and_does_not_keep_the_model_alive(build, make_batch):
    model, batch = build("gpt2"), make_batch()
    probe = AttentionProbe(model, attention_layers(model))
    for _ in range(2):
        with probe:
            model(**batch)
            assert sorted(probe.take()) == [0, 1]
    assert probe.observed == {}
    gone = weakref.ref(model)
    del probe, model
    gc.collect()
    assert gone() is None


def test_two_probes_at_a_time_are_refused(build, make_batch):
    """The second would see nothing, or the first no more."""
    model = build("llama")
    layers = attention_layers(model)
    with AttentionProbe(model, layers) as probe, torch.no_grad():
        before = state(model)
        with pytest.raises(ModelError, match="watched already") as caught:
            AttentionProbe(model, layers).__enter__()
        assert "\n" not in str(caught.value)
        assert state(model) == before
        model(**make_batch())
        assert sorted(probe.take()) == [0, 1]


def test_take_empties_and_names_the_layer_that_was_not_seen(build, make_batch):
    model = build("gpt2")
    with AttentionProbe(model, attention_layers(model)) as probe, torch.no_grad():
        with pytest.raises(ModelError, match=r"transformer\.h\.0\.attn never told"):
            probe.take()
        model(**make_batch())
        probe.take()
        with pytest.raises(ModelError, match="never told"):
            probe.take()


@pytest.mark.parametrize("kind", ["llama", "albert", "bloom"])
def test_take_hands_over_the_last_forward_pass(build, make_batch, kind):
    model, batches = build(kind, dtype=torch.float32), [make_batch(batch=2), make_batch(batch=3, seed=1)]
    expected = watch_uses(model, batches[1])
    with AttentionProbe(model, attention_layers(model)) as probe, torch.no_grad():
        for batch in batches:
            model(**batch)
        found = probe.take()
    assert found.keys() == expected.keys()
    for index, uses in expected.items():
        for left, right in zip(found[index], uses, strict=True):
            assert torch.equal(left.key, right.key)


def test_another_model_of_the_class_is_not_observed(build, make_batch):
    watched, other = build("gpt2"), build("gpt2", seed=1)
    with AttentionProbe(watched, attention_layers(watched)) as probe, torch.no_grad():
        other(**make_batch())
        assert probe.observed == {}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["gpt2", "bert", "roberta", "llama", "albert"])
def test_the_fallback_sees_the_same(build, make_batch, monkeypatch, kind, implementation):
    model = build(kind, implementation=implementation, dtype=torch.float32)
    batches = [make_batch(padding) for padding in ("none", "right", "left")]
    expected = [watch_uses(model, batch) for batch in batches]
    bypass(monkeypatch)
    assert AttentionProbe(model, attention_layers(model)).fallback
    for batch, seen in zip(batches, expected, strict=True):
        found, mask = watch_uses(model, batch), batch["attention_mask"]
        assert found.keys() == seen.keys()
        for index, uses in seen.items():
            for left, right in zip(found[index], uses, strict=True):
                assert torch.equal(real(left.key, mask), real(right.key, mask))
                assert torch.allclose(real(left.first, mask), real(right.first, mask), atol=1e-5)


def test_the_fallback_leaves_the_output_alone(build, make_batch, monkeypatch):
    bypass(monkeypatch)
    for kind in ("gpt2", "bert", "bloom", "falcon", "mpnet"):
        model, batch = build(kind, dtype=torch.float32), make_batch("right")
        with torch.no_grad():
            expected = model(**batch).logits
            with AttentionProbe(model, attention_layers(model)):
                assert torch.equal(model(**batch).logits, expected)


def test_a_router_is_not_taken_for_attention(build, make_batch):
    """GPT-OSS chooses its experts by a softmax too."""
    model, batch = build("gpt_oss", dtype=torch.float32), make_batch()
    assert {index: found.key.shape for index, found in watch(model, batch).items()} == dict.fromkeys((0, 1), (3, 6, 9))


@pytest.mark.parametrize("backbone", [False, True])
def test_a_mask_given_by_position_is_remembered(build, make_batch, backbone):
    """The mask is the second argument of every backbone and language model here."""
    model, batch = build("llama", dtype=torch.float32), make_batch("left")
    mask = batch["attention_mask"]
    expected = watch(model, batch)
    called = model.base_model if backbone else model
    with AttentionProbe(model, attention_layers(model)) as probe, torch.no_grad():
        called(batch["input_ids"], mask)
        found = only(probe.take())
    for index in expected:
        assert torch.equal(real(found[index].first, mask), real(expected[index].first, mask))


def test_a_query_behind_a_cache_sees_the_whole_cache(build, make_batch):
    """One new token with a cache comes without a mask, and sees all keys: sdpa is not causal for a single query."""
    model = build("llama")
    ids = make_batch()["input_ids"]
    whole = watch(model, {"input_ids": ids})
    with torch.no_grad():
        cache = model(ids[:, :-1], use_cache=True).past_key_values
    step = watch(model, {"input_ids": ids[:, -1:], "past_key_values": cache, "use_cache": True})
    for index in whole:
        assert torch.equal(step[index].key[..., 0], whole[index].key[..., -1])
