"""Bytes against closed forms and against the tensors a real cache holds."""

import gc

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from compressor.measure import kv_cache_bytes_per_token, parameter_bytes, parameter_count, peak_memory

ROWS, WIDTH, TIMES = 10, 8, 1000
IDS = torch.arange(6).reshape(2, 3)
RESIDENT = (ROWS * WIDTH + 5) * 4 + IDS.numel() * 8  # embedding, buffer, ids
STATES = IDS.numel() * WIDTH * 4


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(ROWS, WIDTH)
        self.register_buffer("constant", torch.zeros(5))

    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        assert not use_cache
        return self.work(self.embedding(input_ids))

    def work(self, states: Tensor) -> Tensor:
        return states


class BigIntermediate(Toy):
    def work(self, states: Tensor) -> Tensor:
        return states.repeat(1, 1, TIMES).sum(-1)


class OneAfterAnother(Toy):
    def work(self, states: Tensor) -> Tensor:
        first = states.repeat(1, 1, TIMES).sum(-1)
        return first + states.repeat(1, 1, TIMES).sum(-1)


class ViewsInPlace(Toy):
    def work(self, states: Tensor) -> Tensor:
        view = states.view(-1, WIDTH)[1:].transpose(0, 1)
        view.add_(1).mul_(2)
        states.relu_()
        return view.T


class InsideAComposite(Toy):
    """The T x T matrix is made below one call of a composite operator."""

    length = 64

    def work(self, states: Tensor) -> Tensor:
        heads = states.reshape(1, 1, -1, 2).repeat(1, 1, 10, 1)[:, :, : self.length]
        with sdpa_kernel(SDPBackend.MATH):
            return functional.scaled_dot_product_attention(heads, heads, heads)


BIG, SUMS = STATES * TIMES, IDS.numel() * 4


@pytest.mark.parametrize(
    ("model", "working"),
    [
        (Toy(), STATES),
        (BigIntermediate(), STATES + BIG + SUMS),
        (OneAfterAnother(), STATES + SUMS + BIG + SUMS),
        (ViewsInPlace(), STATES),
    ],
)
def test_peak_of_a_toy(model: Toy, working: int) -> None:
    assert peak_memory(model, IDS) == RESIDENT + working
    assert peak_memory(model, IDS) == RESIDENT + working


def test_peak_sees_inside_composite_operators() -> None:
    assert peak_memory(InsideAComposite(), IDS) > RESIDENT + InsideAComposite.length**2 * 4


def gpt2(implementation: str) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=50, n_embd=16, n_inner=64, n_layer=2, n_head=4, n_positions=256, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel._from_config(config, attn_implementation=implementation)


def test_peak_of_a_model_is_the_same_on_every_run() -> None:
    model, ids = gpt2("eager"), torch.zeros(1, 256, dtype=torch.long)
    model.train()
    model.transformer.h[1].eval()
    flags = [module.training for module in model.modules()]
    peak = peak_memory(model, ids)
    gc.disable()
    assert peak_memory(model, ids) == peak
    gc.enable()
    matrix = 4 * 256 * 256 * 4  # heads x T x T floats, which fused attention never holds
    assert peak > parameter_bytes(model) + matrix
    assert peak_memory(gpt2("sdpa"), ids) < parameter_bytes(model) + matrix
    assert [module.training for module in model.modules()] == flags


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_peak_on_cuda() -> None:
    peak = peak_memory(BigIntermediate().cuda(), IDS.cuda())
    assert RESIDENT + STATES + BIG <= peak <= RESIDENT + STATES + BIG + SUMS + 8 * 512


def test_tied_parameters_count_once() -> None:
    model = gpt2("sdpa")
    block = 2 * 2 * 16 + (16 * 48 + 48) + (16 * 16 + 16) + (16 * 64 + 64) + (64 * 16 + 16)
    expected = 50 * 16 + 256 * 16 + 2 * block + 2 * 16
    assert model.lm_head.weight is model.transformer.wte.weight
    assert parameter_count(model) == expected
    assert parameter_bytes(model) == 4 * expected
    assert parameter_bytes(model.to(torch.bfloat16)) == 2 * expected


def test_cache_bytes_are_those_of_a_real_cache() -> None:
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    with torch.no_grad():
        cache = model(input_ids=torch.zeros(2, 5, dtype=torch.long), use_cache=True).past_key_values
    held = sum(
        tensor.numel() * tensor.element_size() for layer in cache.layers for tensor in (layer.keys, layer.values)
    )
    assert kv_cache_bytes_per_token([2 * 2 * 8] * 3, torch.bfloat16) * 2 * 5 == held
    assert kv_cache_bytes_per_token([2 * 12 * 64, 2 * 3 * 64], torch.float32) == 2 * 15 * 64 * 4
