"""The tests that bear on numerics once more, under every instruction set that this processor has."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from instruction_sets import AMX, LEVELS, levels, run_tests, why_not
from processes import HANG_SECONDS

TESTS = Path(__file__).resolve().parent
# Values and gradients of the ops over a head, which call a library's products: about a minute of one core a level.
# The rows, products, attention and EMA that are compiled run whole under ATEN_CPU_CAPABILITY in their own files.
FILES = ("test_divergence_values", "test_topk_values", "test_token_logprob")
# Triton's interpreter computes in numpy; what a registered operator promises does not depend on the processor.
KEYWORD = "not triton and not registered and not compile and not memory"


@pytest.mark.slow
@pytest.mark.parametrize(("variable", "value"), levels("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA"))
def test_numerics(variable: str, value: str) -> None:
    run_tests(variable, value, [TESTS / f"{name}.py" for name in FILES], KEYWORD)


def test_a_level_the_processor_lacks_is_not_run() -> None:
    """A process held to it would die by SIGILL; the reason names the level and what is missing."""
    plain = frozenset({"avx2", "fma"})
    assert why_not("ATEN_CPU_CAPABILITY", "avx2", plain) is None
    assert "avx512f" in str(why_not("ATEN_CPU_CAPABILITY", "avx512", plain))
    without_amx = frozenset(AMX) - {"amx_bf16"}
    assert why_not("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_AMX", without_amx) == (
        "ONEDNN_MAX_CPU_ISA=AVX512_CORE_AMX: this processor has no amx_bf16"
    )
    assert all(why_not(*level, frozenset(AMX)) is None for level in LEVELS)


@pytest.mark.parametrize("value", ("default", "avx2", "avx512", "nonsense"))
def test_the_compiled_kernels_take_a_level_as_a_bound(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is asked for, what they choose is something that the processor has."""
    from sdft_kernels import _native

    if not _native.has_native():
        pytest.skip(_native.why_not())
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", value)
    code = "from sdft_kernels import _native; print(_native.cpu_isa())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=TESTS.parent, capture_output=True, text=True, timeout=HANG_SECONDS
    )
    assert done.returncode == 0, done.stderr
    if (isa := done.stdout.strip()) != "portable":
        assert why_not("ATEN_CPU_CAPABILITY", isa.removesuffix("_bf16")) is None
