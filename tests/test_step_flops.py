"""`step_flops`: its parts equal what PyTorch counts and what masks show; what is shared saves what it should."""

import pytest
import torch

pytest.importorskip("transformers")

import prefix_models  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from sdft_kernels.models import step_flops  # noqa: E402
from sdft_kernels.models.flops import body_flops_per_token, visible_pairs  # noqa: E402


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (0, 1), (0, 9), (3, 9), (8, 9), (9, 9)])
@pytest.mark.parametrize("window", [None, 1, 3, 5, 9, 20])
def test_pairs_are_those_of_the_mask(start, stop, window):
    mask = torch.ones(stop, stop, dtype=torch.bool).tril()
    if window is not None:
        mask &= ~torch.ones(stop, stop, dtype=torch.bool).tril(-window)
    assert visible_pairs(start, stop, window) == int(mask[start:].sum())


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "mistral", "phi3"])
def test_body_and_head_are_what_pytorch_counts(family):
    """Of one sequence, where attention (which PyTorch counts without its mask) is set apart."""
    model = prefix_models.tiny(family, attn_implementation="eager")
    config, tokens = model.config, 7
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(input_ids=torch.arange(tokens)[None])
    counted = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    flops = step_flops(config, [(1, [tokens])], gradient=False).shared
    assert flops.tokens == tokens
    assert counted["aten.mm"] == flops.body + flops.head
    assert flops.body == tokens * body_flops_per_token(config)
    heads, size = config.num_attention_heads, getattr(config, "head_dim", None) or 8
    assert counted["aten.bmm"] >= 2 * 2 * 2 * heads * size * tokens**2  # two layers, two products, every pair
    causal = step_flops(prefix_models.tiny("llama").config, [(1, [tokens])], gradient=False).shared.attention
    assert causal == 2 * 2 * 2 * 4 * 8 * tokens * (tokens + 1) // 2
    assert (flops.attention / size < causal / 8) == (family in prefix_models.WINDOWED)


def test_experts_that_run_are_counted():
    config = prefix_models.tiny("qwen3_moe").config
    projections = 32 * 16 * (4 + 4 + 2 + 2)
    assert body_flops_per_token(config) == 2 * 2 * (projections + 32 * 4 + 2 * 3 * 32 * 12)


def test_shared_is_the_prompt_once():
    config = prefix_models.tiny("llama").config
    flops = step_flops(config, [(10, [4, 0, 1]), (7, []), (3, [2])])
    assert flops.shared.tokens == 10 + 3 + 0 + 3 + 1
    assert flops.repeated.tokens == 13 + 10 + 3 + 1
    assert flops.shared.body / flops.repeated.body == flops.shared.tokens / flops.repeated.tokens
    assert flops.shared.head == flops.repeated.head == 3 * 2 * 7 * 61 * 32
    triangle = lambda n: n * (n + 1) // 2  # noqa: E731
    saved = triangle(10) * config.num_hidden_layers * 4.0 * 32 * 3.5
    assert flops.repeated.attention - flops.shared.attention == saved
    assert flops.ratio > 1


def test_the_ratio_is_one_where_nothing_is_shared():
    config = prefix_models.tiny("gemma3").config
    for groups in ([(10, [4]), (10, [5])], [(10, [])], []):
        assert step_flops(config, groups, teacher_groups=groups).ratio == 1.0
    assert step_flops(config, [(10, [4])], teacher_groups=[(20, [4])], teacher_cached=True).ratio > 1.0


def test_a_cached_teacher_runs_one_token_of_its_prompt():
    config = prefix_models.tiny("llama").config
    student, teacher = [(5, [3, 3])] * 2, [(20, [3, 3])] * 2
    plain = step_flops(config, student, teacher_groups=teacher)
    warm = step_flops(config, student, teacher_groups=teacher, teacher_cached=True)
    half = step_flops(config, student, teacher_groups=teacher, teacher_cached=[True, False])
    assert (plain.shared.tokens, half.shared.tokens, warm.shared.tokens) == (66, 47, 28)
    assert plain.shared.body - warm.shared.body == 38 * body_flops_per_token(config)
    assert plain.repeated == warm.repeated and plain.shared.head == 4 * 2 * 12 * 61 * 32


def test_backward_and_checkpointing():
    config = prefix_models.tiny("llama").config
    forward, both, again = (
        step_flops(config, [(5, [3])], gradient=gradient, checkpointing=checkpointing).shared
        for gradient, checkpointing in ((False, True), (True, False), (True, True))
    )
    assert (both.body, both.attention) == (3 * forward.body, 3.5 * forward.attention)
    assert (again.body, again.attention) == (4 * forward.body, 4.5 * forward.attention)


def test_bad_input():
    config = prefix_models.tiny("llama").config
    with pytest.raises(ValueError, match="a prompt must have a token, got one of 0"):
        step_flops(config, [(0, [3])])
    with pytest.raises(ValueError, match=r"one per teacher group \(1\), got 2"):
        step_flops(config, [(1, [3])], teacher_groups=[(1, [3])], teacher_cached=[True, True])
