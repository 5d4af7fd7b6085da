"""The few attention modules whose structure alone does not tell how their heads can be removed, by class name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import nn
from transformers import PreTrainedModel

from compressor.attention.nouns import AttentionLayer, Slice
from compressor.attention.trace import Site
from compressor.errors import ModelError

REFUSED = {
    "BitNetAttention": "normalises over all of its heads just before its output projection, so none can leave alone",
    "ConvBertSelfAttention": "feeds the queries of all of its heads to a convolution, so none can leave alone",
    "IBertSelfAttention": "computes in integers, through linear maps of its own kind",
    "JetMoeAttention": "takes queries and output projections of its heads from experts that are chosen for every token",
    "LongformerSelfAttention": "takes the width of its heads for the width of the model, so that must not change",
    "ProphetNetNgramSelfAttention": "shares the position biases of its heads, so none can leave alone",
    "TrOCRAttention": "takes the width of its heads for the width of the model, so that must not change",
}


def refuse_model(model: PreTrainedModel) -> None:
    """Raise a ModelError if a setting of the model keeps its heads from being found."""
    if any("BlockSparse" in type(module).__name__ for module in model.modules()):
        name = type(model).__name__
        raise ModelError(
            f"{name} has block-sparse attention, which cannot be cut; set its attention_type to original_full"
        )


def refuse(module: nn.Module) -> None:
    """Raise a ModelError if the module is known not to let its heads go."""
    name = type(module).__name__
    if name in REFUSED:
        raise ModelError(f"{name} {REFUSED[name]}")


def refuse_quantised(name: str, block: nn.Module) -> None:
    """Raise a ModelError if weights of a block are not plain numbers."""
    for inside, module in block.named_modules():
        own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        if any("weight" in tensor and not value.is_floating_point() for tensor, value in own):
            raise ModelError(
                f"{name}.{inside} is {type(module).__name__} and holds no plain weights; load the model unquantised"
            )


def codegen(layer: AttentionLayer) -> AttentionLayer:
    """CodeGen interleaves its projections in four blocks of heads, left over from training on four devices."""
    size = layer.num_heads // 4
    return replace(layer, group_index=tuple(head // size for head in range(layer.num_heads)), spreadable=False)


def xlnet(site: Site, index: int) -> AttentionLayer:
    """XLNet keeps projections as bare tensors [width, heads, head_dim] and mixes heads by an einsum over `o`."""
    module = vars(site.stack[0].module)
    heads, width = int(module["n_head"]), int(module["d_head"])
    each = tuple(((head,), 1) for head in range(heads))
    dims = {"o": 1, "q": 1, "k": 1, "v": 1, "r": 1, "seg_embed": 1, "r_w_bias": 0, "r_r_bias": 0, "r_s_bias": 0}
    return AttentionLayer(
        index=index,
        name=site.name,
        block=site.name,
        output_projection=site.name,
        num_heads=heads,
        num_key_value_heads=heads,
        head_dim=width,
        value_dim=width,
        cached=0,
        key_value_index=tuple(range(heads)),
        group_index=tuple(range(heads)),
        slices=tuple(Slice("tensor", site.name, name, dim, each) for name, dim in dims.items()),
        maps=tuple((head,) for head in range(heads)),
        uses=site.uses,
        interface=False,
    )


DESCRIBED: dict[str, Callable[[Site, int], AttentionLayer]] = {"XLNetRelativeAttention": xlnet}
AMENDED: dict[str, Callable[[AttentionLayer], AttentionLayer]] = {"CodeGenAttention": codegen}
