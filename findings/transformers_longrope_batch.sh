#!/usr/bin/env bash
# Finding: with longrope, what a short sequence gets depends on how long its neighbour in the padded batch is.
# Versions: torch==2.13.0, transformers==5.24.0, numpy==2.4.6
# Expected: padding is masked, so a row of a padded batch has the logits it has alone, to rounding.
# Behaviour: one length per batch, the longest, chooses between the short and the long frequencies for all rows. A row below
#   `original_max_position_embeddings` beside one above it is rotated by the long frequencies. Alone it would get the short ones.
#   Loss and generated text of the short rows then depend on how a batch was put together.
# Output:
#     largest change of a logit of the short row: neighbour within the limit 2e-06, beyond it 2.8
# Exit: 0 if shown; 1 if the behaviour changed.

set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 numpy==2.4.6

cat > "$folder/finding.py" <<'PYTHON'
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

SHORT, LIMIT = 8, 16

torch.manual_seed(0)
rope = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "original_max_position_embeddings": LIMIT,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "factor": 4.0,
}
sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=4 * LIMIT, rope_parameters=rope)).eval()
for parameter in model.parameters():
    if parameter.ndim == 2:
        torch.nn.init.normal_(parameter, std=0.3)


@torch.no_grad()
def beside(length):
    """The logits [SHORT, 61] of a row of SHORT tokens, padded on the right beside a row of `length` tokens."""
    input_ids = torch.arange(1, length + 1).repeat(2, 1)
    attention_mask = torch.ones_like(input_ids)
    input_ids[0, SHORT:] = attention_mask[0, SHORT:] = 0
    return model(input_ids=input_ids, attention_mask=attention_mask).logits[0, :SHORT]


with torch.no_grad():
    alone = model(input_ids=torch.arange(1, SHORT + 1)[None]).logits[0]
within, beyond = ((beside(length) - alone).abs().max().item() for length in (LIMIT, LIMIT + 8))
print(f"largest change of a logit of the short row: neighbour within the limit {within:.0e}, beyond it {beyond:.1f}")
sys.exit(0 if within < 1e-4 and beyond > 0.1 else 1)
PYTHON

"$folder/venv/bin/python" -I "$folder/finding.py"
