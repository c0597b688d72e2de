"""Sharded and fp16 models are refused when a student or teacher is made, before anything else happens."""

import sys

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import distill_tiny as tiny  # noqa: E402
from processes import leave, run_ranks  # noqa: E402

from sdft_kernels.distill import SDFTConfig, SDFTTrainer, SelfDistiller, make_teacher  # noqa: E402
from sdft_kernels.models.unsupported import refuse_sharded  # noqa: E402

IDS = torch.tensor([[3, 7, 9, 11]])
SHARDED = ["fully_shard", "fully_shard of one layer", "FSDP1", "one DTensor"]


def entries(model, folder):
    """Every way in."""
    arguments = SDFTConfig(output_dir=str(folder), use_cpu=True, report_to=[])
    rows = dict(train_dataset=tiny.rows(), processing_class=tiny.tokenizer())
    return {
        "SelfDistiller": lambda: SelfDistiller(model, "ema"),
        "SelfDistiller, unverified": lambda: SelfDistiller(model, "live", verify=False),
        "make_teacher": lambda: make_teacher(model, "frozen"),
        "teacher": lambda: SelfDistiller(tiny.model(), model),
        "SDFTTrainer": lambda: SDFTTrainer(model, arguments, **rows),
        "SDFTTrainer, teacher": lambda: SDFTTrainer(tiny.model(), arguments, teacher=model, **rows),
    }


def assert_refused(model, folder, error, message):
    for name, enter in entries(model, folder).items():
        if error is ValueError and name == "make_teacher":  # an average of fp16 weights is fine; the loss is not
            continue
        with pytest.raises(error, match=message):
            enter()
        assert not folder.exists(), name


def test_fp16_is_refused_at_construction(tmp_path):
    assert_refused(tiny.model().half(), tmp_path / "run", ValueError, r"(student|teacher) is fp16.*bfloat16\(\)")
    head = tiny.model(tie_word_embeddings=False)
    head.lm_head.half()
    with pytest.raises(ValueError, match="student is fp16"):
        SelfDistiller(head, verify=False)
    with pytest.raises(ValueError, match="fp16=True is not supported.*bf16=True"):
        SDFTConfig(output_dir=str(tmp_path), use_cpu=True, fp16=True)
    for name in ("fp16_full_eval", "bf16_full_eval"):
        with pytest.raises(ValueError, match="cast the student for good.*bf16=True"):
            SDFTConfig(output_dir=str(tmp_path), use_cpu=True, **{name: True})
    SelfDistiller(tiny.model().bfloat16())  # control


def test_partitioned_by_zero_3(tmp_path):
    model = tiny.model()
    model.model.norm.weight.ds_id = 7
    message = r"(student|teacher) is sharded: model.norm.weight is partitioned by DeepSpeed ZeRO-3"
    assert_refused(model, tmp_path / "run", NotImplementedError, message)


@pytest.mark.parametrize("way", SHARDED)
def test_sharded_models_are_refused_after_a_forward(way, tmp_path):
    run_ranks(__file__, 1, way, tmp_path / "run", ACCELERATE_USE_CPU="true")


def sharded(way):
    """A model and what the message names."""
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.tensor import DTensor, Replicate, init_device_mesh

    model, mesh = tiny.model().eval(), init_device_mesh("cpu", (1,))
    if way == "fully_shard":
        return fully_shard(model, mesh=mesh), r"the whole is an FSDP2 \(fully_shard\) unit"
    if way == "fully_shard of one layer":
        fully_shard(model.model.layers[1], mesh=mesh)
        return model, r"model.layers.1 is an FSDP2 \(fully_shard\) unit"
    if way == "FSDP1":
        model.model.layers[0] = FullyShardedDataParallel(model.model.layers[0], device_id=torch.device("cpu"))
        return model, "model.layers.0 is an FSDP1 unit"
    norm = model.model.norm
    norm.weight = nn.Parameter(DTensor.from_local(norm.weight.detach(), mesh, [Replicate()]))
    return model, "model.norm.weight is a DTensor"


if __name__ == "__main__":
    from pathlib import Path

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    refuse_sharded(tiny.model())  # control
    model, message = sharded(sys.argv[1])
    if sys.argv[1] != "one DTensor":  # which a plain norm cannot multiply
        with torch.no_grad():
            model(input_ids=IDS)
    if sys.argv[1] == "fully_shard":  # nothing to be seen in its tensors
        assert type(model.lm_head.weight) is nn.Parameter and not hasattr(model.lm_head.weight, "placements")
    assert_refused(model, Path(sys.argv[2]), NotImplementedError, f"(student|teacher) is sharded: {message}.*use DDP")
    leave()
