"""`completion_hidden_states`: ragged batches equal one sequence at a time, values and gradients."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

from sdft_kernels.models import completion_hidden_states, context_length, hidden_states  # noqa: E402


def tiny():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=40,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def ragged():
    generator = torch.Generator().manual_seed(3)
    lengths = [(5, 4), (1, 1), (9, 0), (3, 7), (12, 2)]
    draw = lambda n: torch.randint(0, 61, (n,), generator=generator).tolist()  # noqa: E731
    return [draw(p) for p, _ in lengths], [draw(c) for _, c in lengths]


def one_at_a_time(model, prompts, completions):
    pieces = [
        hidden_states(model, torch.tensor([p + c]))[0, len(p) - 1 : len(p) + len(c) - 1]
        for p, c in zip(prompts, completions, strict=True)
    ]
    return torch.cat(pieces)


@pytest.mark.parametrize("token_budget", [1, 15, 10_000])
def test_ragged_batches_equal_single_sequences(token_budget):
    model = tiny()
    prompts, completions = ragged()
    packed = completion_hidden_states(model, prompts, completions, token_budget=token_budget)
    expected = one_at_a_time(model, prompts, completions)
    assert packed.shape == (14, 16)
    torch.testing.assert_close(packed, expected, rtol=1e-5, atol=1e-6)
    coefficients = torch.randn_like(packed)
    grads = torch.autograd.grad((packed * coefficients).sum(), model.model.layers[0].mlp.up_proj.weight)
    wanted = torch.autograd.grad((expected * coefficients).sum(), model.model.layers[0].mlp.up_proj.weight)
    torch.testing.assert_close(grads, wanted, rtol=1e-4, atol=1e-6)


def test_no_logits_are_computed():
    model = tiny()
    prompts, completions = ragged()
    calls = []
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    completion_hidden_states(model, prompts, completions)
    assert not calls
    model(input_ids=torch.tensor([prompts[0]]))
    assert calls  # negative control: the hook does see the head


def test_edges():
    model = tiny()
    assert completion_hidden_states(model, [[1]], [[]]).shape == (0, 16)
    assert completion_hidden_states(model, [], []).shape == (0, 16)
    with pytest.raises(ValueError, match=r"prompts\[1\] is empty"):
        completion_hidden_states(model, [[1], []], [[2], [3]])
    with pytest.raises(ValueError, match="pair up"):
        completion_hidden_states(model, [[1]], [])
    with pytest.raises(ValueError, match="no backbone"):
        hidden_states(model.model, torch.tensor([[1]]))
    assert context_length(model) == 40
