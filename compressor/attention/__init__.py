"""Attention heads of a Hugging Face model: found, watched and removed. Knows nothing of scores."""

from compressor.attention.layout import attention_layers
from compressor.attention.nouns import AttentionLayer
from compressor.attention.probe import AttentionProbe
from compressor.attention.record import removed_heads
from compressor.attention.surgery import check_heads, prune_heads

__all__ = ["AttentionLayer", "AttentionProbe", "attention_layers", "check_heads", "prune_heads", "removed_heads"]
