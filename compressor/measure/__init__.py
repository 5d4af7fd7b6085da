"""What a model costs and how well it predicts: FLOPs, tokens per second, bytes, perplexity."""

from compressor.measure.flops import FlopCount, count_flops
from compressor.measure.memory import kv_cache_bytes_per_token, parameter_bytes, parameter_count, peak_memory
from compressor.measure.perplexity import DocumentLosses, TokenPerplexity
from compressor.measure.throughput import Samples, Throughput, measure_throughput, speedup, throughput_steps

__all__ = [
    "DocumentLosses",
    "FlopCount",
    "Samples",
    "Throughput",
    "TokenPerplexity",
    "count_flops",
    "kv_cache_bytes_per_token",
    "measure_throughput",
    "parameter_bytes",
    "parameter_count",
    "peak_memory",
    "speedup",
    "throughput_steps",
]
