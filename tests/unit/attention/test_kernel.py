"""The fused kernel: what it takes on, and that GPUs' compiler takes it."""

import logging
import runpy
import sys

import pytest
import torch

from compressor.attention import kernel, program
from compressor.attention.argmax import attended_keys

CPU = torch.device("cpu")


def signature(dtype: str, mask: str | None, dim: int) -> tuple[dict[str, str], dict[tuple[int], object]]:
    """Types of the kernel's arguments as a launch with that mask, sinks and a cap has them, and its constants."""
    block_q, block_k, _ = kernel.tile({"fp32": torch.float32, "bf16": torch.bfloat16}[dtype], dim)
    constants: dict[str, object] = {"dim": dim, "causal": mask is None, "additive": mask == "*fp32", "query_d": 1}
    constants |= {"key_d": 1, "block_q": block_q, "block_k": block_k, "block_d": kernel._power(dim)}
    constants |= {"mask": None} if mask is None else {}
    pointers = {"query": f"*{dtype}", "key": f"*{dtype}", "mask": mask or "", "sinks": "*fp32", "first_key": "*i64"}
    types = pointers | {"best_out": "*i64", "first_out": "*fp32", "scale": "fp32", "softcap": "fp32"}
    names = program.compiled().arg_names
    return (
        {name: "constexpr" if name in constants else types.get(name, "i32") for name in names},
        {(names.index(name),): value for name, value in constants.items()},
    )


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("dtype", "mask", "dim"), [("bf16", "*u8", 64), ("bf16", None, 80), ("fp32", "*fp32", 24), ("bf16", "*u8", 256)]
)
def test_the_compiler_of_gpus_takes_it(monkeypatch, tmp_path, capability, dtype, mask, dim):
    """Which needs no GPU: the interpreter allows what the compiler does not, and knows no limits of memory."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types, constants = signature(dtype, mask, dim)
    source = triton.compiler.ASTSource(program.compiled(), types, constants)
    warps = kernel.tile(torch.float32 if dtype == "fp32" else torch.bfloat16, dim)[2]
    made = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps, "num_stages": 2}
    )
    assert made.metadata.shared <= 99 * 1024
    assert ("mma" in made.asm["ptx"]) == (dtype == "bf16")  # tensor cores, and never TF32


# --- what it takes on


def given(heads=4, kv_heads=2, dim=8, dtype=torch.float32, key_dtype=None):
    return torch.ones(2, heads, 5, dim, dtype=dtype), torch.ones(2, kv_heads, 5, dim, dtype=key_dtype or dtype)


def test_what_is_supported():
    mask = torch.ones(2, 1, 5, 5)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert kernel.supports(*given(dtype=dtype), None)
        assert kernel.supports(*given(), mask.to(dtype), None, torch.ones(4, dtype=dtype))
    assert kernel.supports(*given(), mask.bool())
    assert kernel.supports(*given(dim=kernel.WIDEST), None)


def test_what_is_left_to_the_reference():
    query, key = given()
    mask = torch.ones(2, 1, 5, 5)
    assert not kernel.supports(query, key, None, bias=mask)
    assert not kernel.supports(query, key, None, sinks=torch.ones(2, 4, 5, 1))
    assert not kernel.supports(query, key, None, sinks=torch.ones(4).double())
    assert not kernel.supports(query, key, mask.double())
    assert not kernel.supports(query, key, mask.long())
    assert not kernel.supports(query, key, mask.to("meta"))
    assert not kernel.supports(*given(dtype=torch.float64), None)
    assert not kernel.supports(*given(key_dtype=torch.bfloat16), None)
    assert not kernel.supports(*given(dim=kernel.WIDEST + 1), None)
    assert not kernel.supports(*given(heads=3), None)
    assert not kernel.supports(query[:, :, :0], key, None)
    assert not kernel.supports(query, key[:1], None)


def test_a_cpu_has_the_reference(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(kernel, "attended_keys_fused", None)
    assert not kernel.available(CPU)
    assert not kernel.usable(*given(), None)
    assert attended_keys(*given(), None).key.shape == (2, 4, 5)


def test_nothing_needs_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)  # as if it were not installed
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for module in (kernel, program):
        runpy.run_path(str(module.__file__))
    kernel._installed.cache_clear()
    try:
        assert not kernel.usable(*given(), None)
    finally:
        kernel._installed.cache_clear()


@pytest.fixture
def no_compiler(monkeypatch):
    """A machine with Triton on which no kernel can be launched."""

    def fail():
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable.")

    monkeypatch.setattr(kernel, "available", lambda device: True)
    monkeypatch.setattr(kernel, "compiled", fail)
    kernel._runs.cache_clear()
    yield
    kernel._runs.cache_clear()


def test_a_machine_without_a_compiler_has_the_reference_and_one_warning(no_compiler, caplog):
    with caplog.at_level(logging.WARNING, logger="compressor"):
        for _ in range(2):
            assert attended_keys(*given(), None).key.shape == (2, 4, 5)
    assert len(caplog.messages) == 1
    assert "Failed to find C compiler. Please" in caplog.messages[0]
