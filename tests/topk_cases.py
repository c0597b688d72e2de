"""What the tests of op 2 share: the sizes, the options, and short names for the public test kit."""

from sdft_kernels.testing import cast, make_divergence_inputs, random_weight, restrict_support, run_topk_divergence
from sdft_kernels.testing import teacher_logprobs as logprobs_of_teacher
from sdft_kernels.topk_divergence.fields import SUPPORTS as NAMED
from sdft_kernels.topk_divergence.fields import TAILS

__all__ = [
    "EVERY_OPTION",
    "NAMED",
    "SUPPORTS",
    "TAILS",
    "TRAINED",
    "K",
    "draw",
    "logprobs_of_teacher",
    "restrict",
    "run",
    "to",
    "upstream",
]

K = 7
SUPPORTS = (*NAMED, "given", "cached", "cached-intersection")
EVERY_OPTION = {
    "temperature": 0.7, "student_logit_scale": 0.5, "teacher_logit_scale": 0.8,
    "student_softcap": 20.0, "teacher_softcap": 30.0,
}  # fmt: skip
TRAINED = ("student_input", "student_weight", "student_bias")

restrict, run, to, upstream = restrict_support, run_topk_divergence, cast, random_weight


def draw(kind="near", **options):
    return make_divergence_inputs(kind, **options).tensors()
