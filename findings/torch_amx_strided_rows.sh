#!/usr/bin/env bash
# Finding: on a processor with AMX, a bf16 product reads past the end of each row of a strided view.
# Versions: torch==2.13.0 (oneDNN 3.12.0 inside), numpy==2.4.6
# Expected: `view @ weight` depends on the elements of `view` alone, so it equals `view.contiguous() @ weight`.
# Behaviour: the AMX product takes K rounded up to a multiple of 32. Behind each row of the left factor it reads elements that are not
#   in the view and multiplies them by zeros. A finite element there adds nothing, so finite padding does not show the fault. NaN and
#   infinity do, since 0 x NaN is NaN. What is read lies inside the allocation that the view belongs to (here: the padding of its rows).
#   `view.contiguous()` avoids it only as far as the next row is finite too. `ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16` hides it.
#   oneDNN treats this as a fault: issue #5717, mended by pull requests #5603 (padded rows) and #5723, both later than the oneDNN in here.
# Output: as reported from a Xeon with AMX, for a gradient of 512 rows with K = 4,097 whose padding was never written: 66 of 2,048 rows
#   NaN over four seeds. The AMX branch below was NOT run where this script was written. That was a processor without AMX, whose output is
#       rows with NaN: strided view 0 of 512, contiguous copy 0 of 512
#       not shown on this processor: it has no AMX
# Exit: 0 if shown, or if there is no AMX and both products agree; 1 if the behaviour changed.

set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6

cat > "$folder/finding.py" <<'PYTHON'
import pathlib
import sys

import torch

ROWS, K, COLUMNS, PADDING = 512, 4097, 64, 63

torch.manual_seed(0)
buffer = torch.full((ROWS, K + PADDING), float("nan"), dtype=torch.bfloat16)
view = buffer[:, :K]
view.copy_(torch.randn(ROWS, K))
weight = torch.randn(K, COLUMNS).to(torch.bfloat16)
assert view.isfinite().all() and weight.isfinite().all()

strided, contiguous = view @ weight, view.contiguous() @ weight
nan_strided, nan_contiguous = (int(y.isnan().any(dim=1).sum()) for y in (strided, contiguous))
print(f"rows with NaN: strided view {nan_strided} of {ROWS}, contiguous copy {nan_contiguous} of {ROWS}")

cpuinfo = pathlib.Path("/proc/cpuinfo")
if not (cpuinfo.exists() and "amx_bf16" in cpuinfo.read_text()):
    print("not shown on this processor: it has no AMX")
    sys.exit(0 if torch.equal(strided, contiguous) else 1)
sys.exit(0 if nan_strided > 0 and nan_contiguous == 0 else 1)
PYTHON

unset ONEDNN_MAX_CPU_ISA ATEN_CPU_CAPABILITY
"$folder/venv/bin/python" -I "$folder/finding.py"
