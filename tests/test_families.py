"""Every causal family of transformers: one default step in eval and in train mode, or a refusal at construction."""

import logging

import pytest
import torch

transformers = pytest.importorskip("transformers")

from family_models import VOCABULARY, build, families, with_dropout  # noqa: E402

from sdft_kernels.distill import DistillBatch, SelfDistiller  # noqa: E402
from sdft_kernels.models.attention_hook import is_hooked  # noqa: E402
from sdft_kernels.models.dropout import disable_dropout  # noqa: E402


def names(words):
    return set(words.split())


# Families without a tiny random model of their own, and what building one says.
UNBUILT = {
    "gemma3n": "timm",  # its vision tower is another library's
    "gemma4_assistant": "must be 0",  # its default configuration is invalid; a drafter that reads another model's keys
    "musicgen": "has no attribute",  # the Auto class hands the model the whole configuration, not its decoder's
    "musicgen_melody": "has no attribute",
}
INSIDE = "sits inside another module"
MULTIMODAL = "is multimodal: pass the text model, text ="
REFUSED = (
    {
        "beam": "final_logit_softcapping=30.0, logit post-processing that is not known",
        "cpmant": "is not causal",
        "dory": "only a plain torch.nn.Linear",
        "electra": "cannot be fused",
        "inkling2_loop_text": "not known",
        "inkling2_text": "not known",
        "inkling_text": "not known",
        "modernbert-decoder": "cannot be fused",
        "prophetnet": "between its head and its logits",
        "xlnet": "is not causal",
        "xlstm": "cannot be fused",
    }
    | dict.fromkeys(
        names(
            "bert bert-generation big_bird camembert data2vec-text ernie megatron-bert reformer rembert roberta "
            "roberta-prelayernorm roc_bert roformer xlm xlm-roberta xlm-roberta-xl xmod"
        ),
        INSIDE,
    )
    | dict.fromkeys(
        names("fuyu gemma3 gemma4 gemma4_unified gemma4_unified_assistant got_ocr2 moss_transcribe_diarize"),
        MULTIMODAL,
    )
)
# Families whose sequences are computed separately: other layers than attention, attention of their own, positions that
# a packed row cannot give, or keywords that do not reach the attention.
SEPARATE = names("""
    axk1 axk2 bailing_hybrid bamba bart bigbird_pegasus blenderbot blenderbot-small bloom blt deepseek_v2 deepseek_v3
    deepseek_v32 deepseek_v4 diffllama doge dots3_note dots3_note_text falcon falcon_h1 falcon_mamba gemma4_unified_text
    git glm4_moe_lite glm_moe_dsa gpt_neo gpt_neox_japanese granitemoehybrid hrm_text hy_v4 jamba kimi_linear lara_mini
    lfm2_moe lfm3 llama4 llama4_text longcat_flash mamba mamba2 marian mbart minicpm3 minimax mllama moshi mpt mvp
    nemotron nemotron_h olmo_hybrid openai-gpt pegasus phi4_multimodal phimoe plbart qwen3_5 qwen3_5_moe
    qwen3_5_moe_text qwen3_5_text qwen3_next qwen4_exp qwen4_exp_text recurrent_gemma rwkv sarvam_mla stablelm trocr
    xglm youtu zamba zamba2 zaya
""")
STOCHASTIC = {"phimoe"}  # its router samples the experts in training, which is no dropout
NEW = "this family is not in tests/test_families.py: see what it needs, and list it if it cannot take a default step"


def draw():
    generator = torch.Generator().manual_seed(0)
    ids = lambda n: torch.randint(3, VOCABULARY, (n,), generator=generator).tolist()  # noqa: E731
    return DistillBatch([ids(7), ids(5)], [ids(9), ids(8)], [[ids(5), ids(6), ids(1)], [ids(4), ids(7)]])


def alone(model, batch):
    """(N,) log-probabilities of the completions, by the model's own logits, one sequence at a time."""
    flat, pieces = batch.flatten(), []
    with torch.no_grad():
        for prompt, completion in zip(flat.student_prompts, flat.completions, strict=True):
            logits = model(input_ids=torch.tensor([[*prompt, *completion]]), use_cache=False).logits[0]
            logprobs = logits[len(prompt) - 1 : -1].float().log_softmax(-1)
            pieces.append(logprobs.gather(1, torch.tensor(completion)[:, None])[:, 0])
    return torch.cat(pieces)


def step(model, **options):
    model.zero_grad()
    distiller = SelfDistiller(model, skip_first_tokens=0, **options)
    out = distiller(draw())
    out.loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert out.loss.isfinite() and gradients and all(g.isfinite().all() for g in gradients)
    return distiller, out


@pytest.mark.parametrize("family", families())
def test_one_default_step(family, caplog):
    if family in UNBUILT:
        with pytest.raises(Exception, match=UNBUILT[family]):
            build(family)
        return
    model = build(family)
    if family in REFUSED:
        with pytest.raises((ValueError, NotImplementedError), match=REFUSED[family]):
            SelfDistiller(model)
        return
    with caplog.at_level(logging.INFO, logger="sdft_kernels"):
        distiller, out = step(model)
    assert distiller.passes.shares == (family not in SEPARATE), NEW + "\n" + caplog.text
    assert distiller.passes.shares or "prefixes are computed once per completion" in caplog.text
    assert is_hooked(model.config._attn_implementation) == distiller.passes.shares
    assert (out.metrics["tokens_saved"] > 0) == distiller.passes.shares
    torch.testing.assert_close(out.tokens.student_logprob, alone(model, draw()), rtol=0, atol=1e-4)
    step(model.train())
    disable_dropout(model)
    _, out = step(model)
    assert (out.metrics["tokens_saved"] > 0) == (family not in SEPARATE)
    if family not in STOCHASTIC:
        torch.testing.assert_close(out.tokens.student_logprob, alone(model.eval(), draw()), rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", sorted(SEPARATE & set(families())))
def test_share_prefix_true_raises_and_leaves_the_model_alone(family):
    model = build(family)
    before = model.config._attn_implementation
    with pytest.raises(Exception) as caught:  # noqa: B017 - whatever the model's own code raises
        SelfDistiller(model, share_prefix=True)
    assert str(caught.value) and model.config._attn_implementation == before


# Of those that a step can be taken with: their configurations hold no dropout rate, or one that nothing reads.
UNDROPPED = names("""
    bailing_hybrid bamba ernie4_5 ernie4_5_moe falcon_mamba granitemoehybrid jamba kimi_linear lfm2 lfm2_moe lfm3 mamba
    mamba2 qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_next qwen4_exp qwen4_exp_text
    recurrent_gemma rwkv mpt
""")


WITH_A_STEP = [f for f in families() if f not in {*REFUSED, *UNBUILT, *STOCHASTIC, "diffllama"}]  # which refuses any


@pytest.mark.parametrize("family", WITH_A_STEP)
def test_disabled_dropout_is_eval_mode(family):
    """Large rates wherever the configuration has one; without them train mode gives the bits of eval mode."""
    model = with_dropout(family, 0.4)
    ids = torch.arange(3, 12)[None]
    settings = model.config.to_dict()
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        dropped = model.train()(input_ids=ids, use_cache=False).logits
        assert torch.equal(dropped, expected) == (family in UNDROPPED), NEW
        disable_dropout(model)
        assert model.training and all(module.training for module in model.modules())
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, expected)
    if family not in ("blt", "falcon", "persimmon"):  # which read their configuration in the forward
        assert model.config.to_dict() == settings
