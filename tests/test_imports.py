"""What `import sdft_kernels` costs and needs, each in a fresh interpreter."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
from processes import HANG_SECONDS

OPTIONAL = ("triton", "transformers", "trl", "matplotlib", "accelerate", "peft", "liger_kernel")
MOST_MODULES = 25  # of this package, that one op loads: 17 today, of more than a hundred

BLOCK = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}} (blocked)", name=name)

sys.meta_path.insert(0, Block())
"""


def run_fresh(code: str, blocked: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run `code` in a new interpreter in which the modules `blocked` cannot be imported."""
    program = BLOCK.format(blocked=set(blocked)) + textwrap.dedent(code)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=HANG_SECONDS)


def assert_passes(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_block_is_effective() -> None:
    result = run_fresh("import triton", blocked=("triton",))
    assert result.returncode != 0
    assert "blocked" in result.stderr


def test_import_loads_no_optional_package_and_no_cuda() -> None:
    assert_passes(
        run_fresh(
            f"""
            import sys, torch
            before = set(sys.modules)
            import sdft_kernels
            assert not torch.cuda.is_initialized()
            heavy = {OPTIONAL!r}
            assert not [name for name in heavy if name in set(sys.modules) - before]
            assert sdft_kernels.__version__
            assert set(sdft_kernels.__all__) <= set(dir(sdft_kernels))
            """,
            blocked=OPTIONAL,
        )
    )


def test_loss_works_with_optional_packages_blocked() -> None:
    out = assert_passes(
        run_fresh(
            """
            import torch
            from sdft_kernels import linear_divergence, linear_divergence_loss
            from sdft_kernels import linear_token_logprob, linear_topk_divergence
            # Else one run in 250 draws a log-probability of -0.001, of which an ulp of its logit is 1e-4.
            torch.manual_seed(0)
            hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(11, 8)
            target = torch.arange(5)
            tokens = linear_divergence(hidden, weight, hidden.detach() + 0.1, weight, target)
            loss, _ = linear_divergence_loss(hidden, weight, hidden.detach() + 0.1, weight, target)
            loss.backward()
            assert hidden.grad.abs().sum() > 0
            assert torch.allclose(loss, tokens.kl_teacher_student.mean())
            numbers = linear_token_logprob(hidden, weight, target)
            assert torch.allclose(numbers.logprob, tokens.student_logprob)
            sparse = linear_topk_divergence(hidden, weight, hidden.detach() + 0.1, weight, k=11, alpha=0.0)
            assert torch.allclose(sparse.divergence, tokens.kl_teacher_student, atol=1e-6)
            assert not torch.cuda.is_initialized()
            print("done")
            """,
            blocked=OPTIONAL,
        )
    )
    assert out.strip() == "done"


@pytest.mark.parametrize("name", ["SDFTConfig", "SDFTTrainer"])
def test_missing_extra_is_named(name: str) -> None:
    result = run_fresh(f"import sdft_kernels; sdft_kernels.{name}", blocked=("transformers",))
    assert result.returncode != 0
    assert f"ImportError: sdft_kernels.{name} needs transformers" in result.stderr
    assert "pip install 'sdft-kernels[train]'" in result.stderr


def test_distiller_and_head_import_without_optional_packages() -> None:
    assert_passes(run_fresh("from sdft_kernels import DistillBatch, SelfDistiller, head_kwargs", blocked=OPTIONAL))


def test_unknown_attribute_is_an_attribute_error() -> None:
    import sdft_kernels

    with pytest.raises(AttributeError, match="no attribute 'linear_divergense'"):
        _ = sdft_kernels.linear_divergense


def test_every_public_name_resolves() -> None:
    import sdft_kernels

    for name in sdft_kernels.__all__:
        assert getattr(sdft_kernels, name) is not None


def test_import_loads_this_package_alone() -> None:
    """What an import costs over torch's is counted, not timed: a few modules of this package, and no other's."""
    code = """
    import sys, torch
    before = set(sys.modules)
    import sdft_kernels
    sdft_kernels.linear_divergence
    print(*sorted(set(sys.modules) - before))
    """
    loaded = assert_passes(run_fresh(code)).split()
    own = {name for name in loaded if name.partition(".")[0] == "sdft_kernels"}
    assert [name for name in loaded if name not in own and name.partition(".")[0] not in sys.stdlib_module_names] == []
    assert "sdft_kernels.divergence.api" in own and len(own) <= MOST_MODULES, sorted(own)
    assert not [name for name in own if name.split(".")[1:2] in (["models"], ["distill"], ["integrations"], ["cli"])]
