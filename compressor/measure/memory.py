"""Bytes a model needs: its parameters, its key/value cache, and its peak while it runs."""

import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from compressor.measure._forward import evaluating


def parameter_count(model: nn.Module) -> int:
    """Elements of all parameters, tied ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def parameter_bytes(model: nn.Module) -> int:
    """Bytes of all parameters in the dtypes they are held in, tied ones counted once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def kv_cache_bytes_per_token(cached: Sequence[int], dtype: torch.dtype) -> int:
    """Bytes the key/value cache grows by with each token of each sequence.

    Args:
        cached: numbers that each layer keeps for a token, its keys and its values.
        dtype: of the cached keys and values.
    """
    return sum(cached) * dtype.itemsize


def peak_memory(model: nn.Module, input_ids: Tensor) -> int:
    """Peak bytes of live tensors during one forward pass without a cache.

    Parameters, buffers and `input_ids` are included. Off CUDA every storage that an operator returns is followed until
    it dies, which gives the same number on every run, as the process's resident size would not. Not seen: workspace
    inside fused kernels, the allocator's rounding, and a storage that grows in place. On CUDA the allocator's own peak
    is read, after one forward that sets up the libraries; it sees that workspace, in blocks of 512 bytes.

    Args:
        model: called as `model(input_ids=..., use_cache=False)`; its training flags are left as they were.
        input_ids: [B, T] token ids on the model's device.
    """
    resident = [*model.parameters(), *model.buffers(), input_ids]
    # Under inference_mode composite operators would reach the tracker whole, and hide what they allocate inside.
    with evaluating(model), torch.no_grad():
        if input_ids.device.type == "cuda":
            with torch.cuda.device(input_ids.device):
                return _cuda_peak(lambda: model(input_ids=input_ids, use_cache=False), resident)
        return peak_bytes(lambda: model(input_ids=input_ids, use_cache=False), resident)


def peak_bytes(run: Callable[[], object], resident: Iterable[Tensor]) -> int:
    """Peak bytes of live tensors off CUDA while something runs, from those that are `resident` on."""
    storages = _LiveStorages(resident)
    with storages:
        run()
    return storages.peak


def _cuda_peak(forward: Callable[[], object], resident: Iterable[Tensor]) -> int:
    """Add what the allocator gained at most to what `resident` holds; other models on the device do not count."""
    forward()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    forward()
    torch.cuda.synchronize()
    return _LiveStorages(resident).live + torch.cuda.max_memory_allocated() - before


class _LiveStorages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the storages alive now and at most, from `resident` tensors on; the storages' own deaths are heard.

    After the idea of `torch.distributed._tools.mem_tracker`.
    """

    def __init__(self, resident: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._follow(resident)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._follow(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        return result

    def _follow(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            address, size = storage._cdata, storage.nbytes()
            if address not in self._alive:
                self._alive[address] = weakref.ref(storage, partial(self._forget, address, size))
                self.live += size
        self.peak = max(self.peak, self.live)

    def _forget(self, address: int, size: int, _: weakref.ref[torch.UntypedStorage]) -> None:
        del self._alive[address]
        self.live -= size
