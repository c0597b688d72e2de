#!/usr/bin/env bash
# Finding: leaving `with model.disable_adapter():` does not bring a merged LoRA back, and in bf16 base and model have moved for good.
# Versions: torch==2.13.0, transformers==5.24.0, peft==0.21.2, accelerate==1.15.0, numpy==2.4.6
# Expected: a context manager restores what it found: the adapter is merged again, and the logits are those from before.
# Behaviour: entering subtracts the adapter from the base weights, leaving does not add it again, so the model goes on unmerged. In bf16
#   merging and subtracting each round, so the base weights are no longer those that were loaded. No training and no error is involved.
#   A reference model that is read this way ("the adapter off") moves a little. In fp64 the logits come back to rounding.
# Output:
#     torch.bfloat16: merged before True, after False; base weights that changed 73.3%, logits moved by 3e-03
#     torch.float64: merged before True, after False; base weights that changed 0.1%, logits moved by 0e+00
# Exit: 0 if shown; 1 if the behaviour changed. Counts may differ between processors; that they are large in bf16 must not.

set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 peft==0.21.2 accelerate==1.15.0 numpy==2.4.6

cat > "$folder/finding.py" <<'PYTHON'
import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM


@torch.no_grad()
def measure(dtype):
    """Returns whether every layer is merged before and after, the share of base weights and the logits moved."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2)).to(dtype), lora).eval()
    input_ids = torch.arange(1, 17)[None]
    layers = [module for module in model.modules() if hasattr(module, "merged_adapters")]
    base = [layer.get_base_layer().weight.clone() for layer in layers]

    model.merge_adapter()
    merged_before, before = all(layer.merged for layer in layers), model(input_ids=input_ids).logits
    with model.disable_adapter():
        model(input_ids=input_ids)
    merged_after, after = any(layer.merged for layer in layers), model(input_ids=input_ids).logits

    changed = sum(int((layer.get_base_layer().weight != w).sum()) for layer, w in zip(layers, base, strict=True))
    share, moved = changed / sum(w.numel() for w in base), (after - before).abs().max().item()
    print(
        f"{dtype}: merged before {merged_before}, after {merged_after}; base weights that changed {share:.1%}, "
        f"logits moved by {moved:.0e}"
    )
    return merged_before, merged_after, share, moved


bf16, fp64 = measure(torch.bfloat16), measure(torch.float64)
shown = bf16[:2] == fp64[:2] == (True, False) and bf16[2] > 0.2 and bf16[3] > 1e-3 and fp64[3] < 1e-12
sys.exit(0 if shown else 1)
PYTHON

"$folder/venv/bin/python" -I -W ignore "$folder/finding.py"
