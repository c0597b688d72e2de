#!/usr/bin/env bash
# Versions:  torch 2.13.0 (CPU build with oneDNN), a processor with AMX (amx_bf16); see also oneDNN #5717 and #5723
# Expected:  the product of a view whose rows are further apart than they are long depends on the view's elements alone.
# Behaviour: on AMX the bf16 product reads the inner dimension up to the next multiple of 32 numbers. What lies behind a
#            row is multiplied by 0, so finite values behind the rows do not show; a value that is not finite does, since
#            0 * NaN is NaN. Unwritten memory now and then holds such values: a gradient written as bf16 over a tile of
#            fp32 had 66 NaN rows of 2,048, on a Xeon. Only memory of the view's own allocation is meant here.
# Seen:      on that Xeon as above; ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 hid it. This script was written where there is no
#            AMX: there it shows that finite values behind the rows change nothing, and that zeros written behind the
#            rows, which avoid it everywhere, give the same bits. Its part for AMX says what to look for and does no more.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import torch

torch.manual_seed(0)
rows, inner, columns, apart = 16, 203, 8, 256
right = torch.randn(inner, columns).bfloat16()


def product(behind):
    """Of the same elements, with `behind` in the gaps between their rows."""
    memory = torch.full((rows, apart), behind, dtype=torch.bfloat16)
    view = memory[:, :inner]
    view.copy_(torch.arange(rows * inner).view(rows, inner) % 17 / 16)
    return view @ right


zeros, ones = product(0.0), product(1.0)
dense = (torch.arange(rows * inner).view(rows, inner) % 17 / 16).bfloat16() @ right
print("gaps of ones and gaps of zeros give the same bits:", torch.equal(zeros, ones))
print("a view and a dense copy differ by", (zeros.float() - dense.float()).abs().max().item())
assert torch.equal(zeros, ones) and torch.allclose(zeros, dense), "the behaviour has changed"
flags = open("/proc/cpuinfo").read()
print("this processor has AMX: put a value that is not finite behind the rows" if "amx_bf16" in flags
      else "not shown on this processor: it has no AMX")
PYTHON
