#!/usr/bin/env bash
# Finding: `set_decoder` of a causal language model returns without an error and changes nothing.
# Versions: torch==2.13.0, transformers==5.24.0, numpy==2.4.6
# Expected: after `model.set_decoder(other)`, `model.get_decoder() is other`, since the setter is documented as the getter's mirror.
# Behaviour: `LlamaForCausalLM` keeps its own decoder. The call passes to the decoder's own `set_decoder`, which stores the argument
#   nowhere. Whoever shares or replaces a decoder this way goes on with the old weights. `model.model = other` does replace it.
# Output:
#     after set_decoder: decoder replaced False, logits changed False
#     after assignment:  decoder replaced True, logits changed True
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

torch.manual_seed(0)
config = LlamaConfig(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
model, other = LlamaForCausalLM(config).eval(), LlamaForCausalLM(config).eval().get_decoder()
input_ids = torch.arange(1, 17)[None]


@torch.no_grad()
def logits():
    return model(input_ids=input_ids).logits


def state(before):
    return model.get_decoder() is other, not torch.equal(logits(), before)


before = logits()
model.set_decoder(other)
by_setter = state(before)
model.model = other
by_assignment = state(before)
print(f"after set_decoder: decoder replaced {by_setter[0]}, logits changed {by_setter[1]}")
print(f"after assignment:  decoder replaced {by_assignment[0]}, logits changed {by_assignment[1]}")
sys.exit(0 if by_setter == (False, False) and by_assignment == (True, True) else 1)
PYTHON

"$folder/venv/bin/python" -I "$folder/finding.py"
