"""What is particular to the Triton row kernels; what they share with the others is in `test_divergence_rows.py`.

In fp64 the interpreter shows the formulas to 1e-10; in fp32 it shows the arithmetic, except for the hardware's exp2 and
log2. What only a GPU shows (races, the memory model, speed) is left to `benchmarks/gpu_run.sh`.
"""

from types import SimpleNamespace

import pytest
import torch
from rows_cases import draw, tile

from sdft_kernels import _dispatch, linear_divergence, linear_divergence_loss
from sdft_kernels._head import IDENTITY
from sdft_kernels.divergence.fields import FIELDS
from sdft_kernels.testing import (
    assert_within_budget,
    make_divergence_inputs,
    relative_error,
    run_divergence_loss,
)

rows_triton = pytest.importorskip("sdft_kernels.divergence.rows_triton")
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy, on purpose


def test_tiles_without_padding_are_refused(interpreted):
    student, teacher, _ = draw(2, 203, torch.float32, interpreted)
    with pytest.raises(ValueError, match=f"{rows_triton.row_stride(203)} apart"):
        rows_triton.divergence_stats(student, teacher, None, (IDENTITY,) * 2, None, None, student.new_zeros(8, 2))


def test_registered_operator_and_full_graph(interpreted):
    """opcheck and torch.compile with the Triton rows inside the operator."""
    x = make_divergence_inputs("near", tokens=3, vocabulary=203, hidden=16, device=interpreted)
    head = (x.student_input, x.student_weight, None, x.teacher_input, x.teacher_weight, None, x.target, None)
    tail = (0.5, 1.0, 1.0, 1.0, None, None, torch.float32, None, True, None, "triton", None)
    weights = torch.ones(1, 3, device=interpreted)
    args = (*head, weights, ["jsd"], None, None, True, True, False, *tail)
    op = torch.ops.sdft_kernels.linear_divergence.default
    torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.unpoisoned
def test_compiles_without_a_graph_break(interpreted):
    # A GPU passes scalars to a kernel in fp32, so there the dispatch refuses fp64.
    dtype, limit = (torch.float32, 1e-5) if interpreted.type == "cuda" else (torch.float64, 1e-10)
    x = make_divergence_inputs("peaked", 3, 203, 16, dtype=dtype, device=interpreted)

    def step(h, w):
        return linear_divergence_loss(h, w, x.teacher_input, x.teacher_weight, impl="triton")[0]

    h, w = x.student_input.requires_grad_(), x.student_weight.requires_grad_()
    loss = torch.compile(step, fullgraph=True, backend="aot_eager")(h, w)
    loss.backward()
    want = run_divergence_loss(x.replace(target=None), "torch")
    assert relative_error(loss, want["loss"]) < limit
    assert relative_error(w.grad, want["grad_student_weight"]) < limit


def test_exp_and_log_are_accurate_where_the_kernels_use_them(interpreted):
    """Why the kernels have an exp of their own: e^x as 2^fl(x log2 e) is off by 1e-6 at x = -20."""
    x = torch.linspace(-60, 0, 4001, dtype=torch.float32)
    naive = torch.exp2((x * 1.4426950408889634).double())
    assert ((naive - x.double().exp()) / x.double().exp()).abs().max() > 1e-6
    z = torch.stack([x, x - 1.0]).to(interpreted)
    tokens = z.new_zeros(len(FIELDS), 2)
    grad = rows_triton.affine_(
        tile(rows_triton, z), tile(rows_triton, z.roll(1, 1)), None, {"kl_teacher_student": z.new_ones(2)}, None, None,
        (IDENTITY, IDENTITY), None, None, tokens, z.new_zeros(2), torch.float32,
    )  # fmt: skip
    truth = z.double().softmax(-1) - z.roll(1, 1).double().softmax(-1)
    eager = z.softmax(-1) - z.roll(1, 1).softmax(-1)
    assert_within_budget(grad, eager, truth)


def test_dispatch(monkeypatch):
    """By name an implementation runs or says why not; on CPU `auto` is the compiled one, or PyTorch."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(_dispatch, "_WHY_NOT_NATIVE", "")
    assert _dispatch.resolve("auto") == _dispatch.resolve("native") == "native"
    monkeypatch.setattr(_dispatch, "_HAS_CUDA_KERNELS", False)
    with pytest.raises(RuntimeError, match="built without CUDA kernels"):
        _dispatch.resolve("native", device="cuda:0")
    monkeypatch.setattr(_dispatch, "_HAS_CUDA_KERNELS", True)
    assert _dispatch.resolve("native", device="cuda:0") == "native"
    with pytest.raises(RuntimeError, match="fp32 only"):
        _dispatch.resolve("native", device="cuda:0", dtype=torch.float64)
    monkeypatch.setattr(_dispatch, "_WHY_NOT_NATIVE", "not built: no compiler")
    assert _dispatch.resolve("auto") == "torch"
    with pytest.raises(RuntimeError, match="compiled operators are not built: no compiler"):
        _dispatch.resolve("native")
    with pytest.raises(RuntimeError, match="run on CUDA, not on cpu"):
        _dispatch.resolve("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert _dispatch.resolve("triton") == "triton" and _dispatch.resolve("auto") == "torch"
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(major=9))
    assert _dispatch.resolve("auto", device="cuda:0") == "triton"
    assert _dispatch.resolve("auto", device="cuda:0", dtype=torch.float64) == "torch"
    with pytest.raises(RuntimeError, match="not enough for fp64"):
        _dispatch.resolve("triton", device="cuda:0", dtype=torch.float64)
    assert _dispatch.resolve("auto", "linear_token_logprob", device="cuda:0") == "torch"
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(major=7))
    with pytest.raises(RuntimeError, match=r"compute capability 8\.0"):
        _dispatch.resolve("triton", device="cuda:0")
    monkeypatch.setattr(_dispatch, "_HAS_TRITON", False)
    with pytest.raises(RuntimeError, match="pip install"):
        _dispatch.resolve("triton")


def test_shipped_tables():
    """Lines in order, the last without a limit, blocks that Triton accepts; a newer device takes the newest table."""
    tables = rows_triton.configurations()
    for capability, table in tables.items():
        limits = [c.max_vocabulary for c in table]
        assert limits[-1] is None and limits[:-1] == sorted(limits[:-1])
        for c in table:
            assert c.block & (c.block - 1) == 0 and c.block >= 32 * c.num_warps
            assert c.num_warps * 32 * c.max_registers <= 65536
        assert rows_triton.choose(table[0].max_vocabulary, capability) == table[0]
        assert rows_triton.choose(262144, capability) == table[-1]
    assert rows_triton.choose(5, 90) == tables[80][0] and rows_triton.choose(5, 121) == tables[100][0]


def test_outputs_names_by_the_public_call(interpreted):
    x = make_divergence_inputs("near", tokens=2, vocabulary=203, hidden=16, device=interpreted)
    tokens = linear_divergence(**x.tensors(), outputs=("kl_teacher_student",), impl="triton")
    assert tokens.kl_student_teacher is None and tokens.kl_teacher_student.shape == (2,)
