"""Where the attention heads of a Hugging Face model sit: which rows and columns of which weights belong to which head.

Sizes are read from the weights themselves, so a layout is as true of a pruned model as of a dense one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from compressor.errors import ModelError


@dataclass(frozen=True)
class Projection:
    """An input projection of an attention layer; its output is the concatenation of `parts`, each head by head."""

    name: str
    parts: tuple[str, ...]  # of "query", "key", "value"


@dataclass(frozen=True)
class AttentionLayer:
    """One self-attention layer of a model.

    `name` is the qualified name of the module that calls the attention function, `output_projection` that of the
    linear map that mixes the heads' outputs; its input is `num_heads * head_dim` wide, head after head.
    `key_value_index[h]` is the key/value head that query head `h` reads.
    """

    index: int
    name: str
    output_projection: str
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    key_value_index: tuple[int, ...]
    projections: tuple[Projection, ...]

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the modules whose subtrees make up the layer, without repetition."""
        inside = self.output_projection.startswith(f"{self.name}.")
        return (self.name,) if inside else (self.name, self.output_projection)


@dataclass(frozen=True)
class _Pattern:
    """Child names by which an attention module is recognised; `output` is relative to the module."""

    projections: tuple[tuple[str, tuple[str, ...]], ...]
    output: str
    kind: type[nn.Module] = nn.Module


_SEPARATE = ("query", "key", "value")
_PATTERNS = (
    _Pattern((("c_attn", _SEPARATE),), "c_proj", Conv1D),  # GPT-2; GPT-BigCode's Linear of that name interleaves heads
    _Pattern((("q_proj", ("query",)), ("k_proj", ("key",)), ("v_proj", ("value",))), "o_proj"),  # Llama and its kin
    _Pattern((("query", ("query",)), ("key", ("key",)), ("value", ("value",))), "..output.dense"),  # BERT, RoBERTa
)


class EmptyAttention(nn.Module):
    """What is left of an attention layer that lost its last head: the bias of its output projection.

    It still puts one zero per token into the key/value cache, because a cache tells the sequence length by any layer.
    """

    def __init__(self, head_dim: int, layer_idx: int, output_name: str, output: nn.Module | None) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.layer_idx = layer_idx
        self.output_name = output_name
        if output is not None:
            self.add_module(output_name, output)

    def forward(
        self, hidden_states: torch.Tensor, *args: object, past_key_values: object = None, **kwargs: object
    ) -> tuple[torch.Tensor, None]:
        """Return (the output of zero heads, None) for hidden states [batch, tokens, width]."""
        if past_key_values is not None:
            batch, tokens = hidden_states.shape[:2]
            placeholder = hidden_states.new_zeros(batch, 1, tokens, 1)
            past_key_values.update(placeholder, placeholder, self.layer_idx)  # type: ignore[attr-defined]
        output = self._modules.get(self.output_name)
        if output is None:  # the projection follows elsewhere and adds its own bias
            return hidden_states[..., :0], None
        result = hidden_states.new_zeros(*hidden_states.shape[:-1], features(output)[1])
        bias = output.bias
        return (result + bias if isinstance(bias, torch.Tensor) else result), None


def attention_layers(model: PreTrainedModel) -> Sequence[AttentionLayer]:
    """Find the self-attention layers of a model, in the order in which they are applied.

    Raises:
        ModelError: no attention is found, or something hangs on its heads that pruning would not know how to cut.
    """
    name = type(model).__name__
    if getattr(model.config, "add_cross_attention", False):
        raise ModelError(f"{name} has cross-attention, whose heads cannot be pruned yet; expected self-attention only")
    modules = dict(model.named_modules())
    if getattr(model.config, "attention_type", None) == "block_sparse":
        raise ModelError(
            f"{name} has block-sparse attention, which cannot be cut; set its attention_type to original_full"
        )
    layers: list[AttentionLayer] = []
    for qualified, module in modules.items():
        if isinstance(module, EmptyAttention):
            output = _resolve(qualified, module.output_name)
            layers.append(AttentionLayer(len(layers), qualified, output, 0, 0, module.head_dim, (), ()))
        elif (pattern := _match(module)) is not None:
            if "cross" in qualified.rpartition(".")[2]:
                raise ModelError(f"{name} has cross-attention ({qualified}), whose heads cannot be pruned yet")
            layers.append(_describe(len(layers), qualified, modules, pattern))
    if not layers:
        raise ModelError(
            f"{name} has no attention heads that compressor can find; expected self-attention as in GPT-2, "
            "BERT, RoBERTa or Llama and models built like them"
        )
    return tuple(layers)


def part_widths(layer: AttentionLayer) -> dict[str, int]:
    """Number of heads in each part of the input projections."""
    return {"query": layer.num_heads, "key": layer.num_key_value_heads, "value": layer.num_key_value_heads}


def is_linear(module: nn.Module) -> bool:
    """Whether the module is a plain linear map that can be cut; quantised and wrapped ones are not."""
    return type(module) in (nn.Linear, Conv1D)


def features(module: nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of a linear module; `Conv1D` keeps its weight as [inputs, outputs], `Linear` transposed."""
    rows, columns = module.weight.shape  # type: ignore[misc]
    return (rows, columns) if isinstance(module, Conv1D) else (columns, rows)


def _match(module: nn.Module) -> _Pattern | None:
    children = dict(module.named_children())
    for pattern in _PATTERNS:
        names = {name for name, _ in pattern.projections}
        if not pattern.output.startswith(".."):
            names.add(pattern.output)
        if names <= children.keys() and all(isinstance(children[name], pattern.kind) for name in names):
            return pattern
    return None


def _resolve(qualified: str, relative: str) -> str:
    if relative.startswith(".."):
        return f"{qualified.rpartition('.')[0]}.{relative[2:]}"
    return f"{qualified}.{relative}"


def _describe(index: int, qualified: str, modules: dict[str, nn.Module], pattern: _Pattern) -> AttentionLayer:
    module = modules[qualified]
    output = _resolve(qualified, pattern.output)
    projections = tuple(Projection(f"{qualified}.{name}", parts) for name, parts in pattern.projections)
    names = [projection.name for projection in projections] + [output]
    for name in names:
        if name not in modules or not is_linear(modules[name]):
            if name not in modules:
                raise ModelError(f"{qualified} has no {name}; its layout is not one that compressor knows")
            kind = type(modules[name]).__name__
            raise ModelError(f"{name} is {kind}; expected a plain Linear or Conv1D (load the model unquantised)")

    head_dim = getattr(module, "head_dim", None) or getattr(module, "attention_head_size", None)
    if not isinstance(head_dim, int):
        raise ModelError(f"{qualified} does not tell its head_dim, so its heads cannot be told apart")
    width, _ = features(modules[output])
    outputs = [features(modules[projection.name])[1] for projection in projections]
    if len(outputs) == 1:
        consistent, key_width = outputs[0] == 3 * width, width
    else:
        consistent, key_width = outputs[0] == width and outputs[1] == outputs[2], outputs[1]
    if not consistent or width % head_dim or key_width % head_dim:
        raise ModelError(
            f"{qualified} has projections {outputs} wide and an output projection {width} wide that do not divide "
            f"into heads of {head_dim}; its layout is not one that compressor knows"
        )
    num_heads, num_key_value_heads = width // head_dim, key_width // head_dim
    _refuse_strangers(qualified, module, names, head_dim)
    mapping = getattr(module, "key_value_index", None)
    if mapping is None:
        if num_heads % num_key_value_heads:
            raise ModelError(f"{qualified} has {num_heads} query heads over {num_key_value_heads} key/value heads")
        group = num_heads // num_key_value_heads
        mapping = tuple(head // group for head in range(num_heads))
    return AttentionLayer(
        index, qualified, output, num_heads, num_key_value_heads, head_dim, tuple(mapping), projections
    )


def _refuse_strangers(qualified: str, module: nn.Module, known: list[str], head_dim: int) -> None:
    """Refuse parameters that may belong to single heads; a norm that all heads share, [head_dim], is harmless."""
    for name, parameter in module.named_parameters():
        full = f"{qualified}.{name}"
        shared_norm = "norm" in name.rpartition(".")[0].lower() and parameter.shape == (head_dim,)
        if not shared_norm and not any(full.startswith(f"{projection}.") for projection in known):
            raise ModelError(f"{full} {list(parameter.shape)} may belong to single heads and cannot be cut yet")


def head_output_norms(model: PreTrainedModel, layer: AttentionLayer) -> torch.Tensor:
    """L2 norm of each head's slice of the output projection, float64 [heads] on the CPU."""
    module = model.get_submodule(layer.output_projection)
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    by_input = weight.detach() if isinstance(module, Conv1D) else weight.detach().T
    slices = by_input.reshape(layer.num_heads, -1).double()
    norms: torch.Tensor = torch.linalg.vector_norm(slices, dim=-1)
    return norms.cpu()
