"""Attention heads of a Hugging Face model: found, watched and removed. Knows nothing of scores."""

from compressor.attention.layout import AttentionLayer, attention_layers
from compressor.attention.probe import AttentionProbe
from compressor.attention.surgery import prune_heads, removed_heads

__all__ = ["AttentionLayer", "AttentionProbe", "attention_layers", "prune_heads", "removed_heads"]
