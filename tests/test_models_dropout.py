"""`disable_dropout`: nothing drops afterwards, wherever the rate was held; what cannot be switched off is refused."""

import copy

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

import distill_tiny as tiny  # noqa: E402

from sdft_kernels.distill import DistillBatch, SDFTConfig, SDFTTrainer  # noqa: E402
from sdft_kernels.models.dropout import attention_drops, disable_dropout, dropout_rates  # noqa: E402

SIZES = dict(
    vocab_size=29, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, eos_token_id=1, bos_token_id=1,
)  # fmt: skip


def make(name, **options):
    torch.manual_seed(0)
    return getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**(SIZES | options)))


RATES = {
    "Starcoder2": dict(
        num_key_value_heads=2, intermediate_size=48, residual_dropout=0.5, embedding_dropout=0.5, attention_dropout=0.5
    ),
    "Falcon": dict(hidden_dropout=0.5, attention_dropout=0.5),
    "OPT": dict(ffn_dim=48, word_embed_proj_dim=32, dropout=0.5, attention_dropout=0.5, layerdrop=0.5),
    "Bloom": dict(n_head=4, hidden_dropout=0.5, attention_dropout=0.5),
}


@pytest.mark.parametrize("name", RATES)
def test_a_live_teacher_with_equal_prompts_has_no_loss(name, tmp_path):
    """Student and teacher are one model: whatever the loss is, dropout made it."""
    batch = DistillBatch([[3, 4, 5, 6]], [[3, 4, 5, 6]], [[[7, 8, 9, 10, 11], [12, 13, 14]]])
    losses = []
    for disable in (False, True):
        args = SDFTConfig(
            output_dir=str(tmp_path), report_to=[], use_cpu=True, teacher_model_kind="live", disable_dropout=disable,
            num_loss_tokens_to_skip=0, share_prefix=False,
        )  # fmt: skip
        model = make(name, **RATES[name])
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(10)
        trainer = SDFTTrainer(model, args, tiny.rows(2), processing_class=tiny.tokenizer())
        losses.append(trainer.distiller.model.train() and trainer.distiller(batch).loss.item())
    dropped, without = losses
    assert without < 1e-9 < 1e-3 < dropped


def test_what_the_configuration_says_afterwards():
    """It stays, unless modules read it in their forward."""
    llama = tiny.model(attention_dropout=0.3)
    before = copy.deepcopy(llama.config.to_dict())
    disable_dropout(llama)
    assert llama.config.to_dict() == before and not list(dropout_rates(llama))
    falcon = make("Falcon", **RATES["Falcon"])
    disable_dropout(falcon)
    assert falcon.config.hidden_dropout == falcon.config.attention_dropout == 0


def test_an_adapters_dropout():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        tiny.model(), peft.LoraConfig(target_modules=["q_proj"], lora_dropout=0.5, init_lora_weights=False)
    )
    assert len(list(dropout_rates(model))) == 2
    disable_dropout(model)
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        assert torch.equal(model.train()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_attention_dropout_is_told_from_other_dropout():
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=29, n_embd=32, n_layer=1, n_head=4, attn_pdrop=0.0, resid_pdrop=0.5)
    )
    assert not attention_drops(model.train())
    model.transformer.h[0].attn.attn_dropout.p = 0.1
    assert attention_drops(model) and not attention_drops(model.eval())
    model.transformer.h[0].attn.train()
    assert attention_drops(model)


def test_the_random_state_and_every_mode_stay():
    model = tiny.model(attention_dropout=0.3).eval()
    model.model.layers[0].train()
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    disable_dropout(model)
    assert [module.training for module in model.modules()] == modes and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "drop",
    [
        lambda x, training: nn.functional.dropout(x, 0.1, training),
        lambda x, training: torch.dropout(x, 0.1, train=training),
        lambda x, training: nn.functional.alpha_dropout(x, p=0.1, training=training),
        lambda x, training: nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=0.1 if training else 0.0),
    ],
)
def test_dropout_in_code_of_the_models_own_is_refused(drop):
    model = tiny.model()
    disable_dropout(model)  # control
    norm = model.model.norm
    forward = norm.forward
    norm.forward = lambda x: drop(forward(x), norm.training)
    with pytest.raises(ValueError, match="LlamaForCausalLM calls .*pass disable_dropout=False"):
        disable_dropout(model)
