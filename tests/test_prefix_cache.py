"""`PrefixCache`: what may be found again and what may not, the budget to the byte, both policies."""

import gc
import weakref

import pytest
import torch
from torch import nn

from sdft_kernels.prefix_attention import CacheStatistics, PrefixCache
from sdft_kernels.prefix_attention.identity import SAMPLES, _sample, fingerprint, model_state

BYTES = 2 * 2 * 3 * 4  # of one token: layers, key and value, (heads 1, size 3), fp32


class Config:
    def __init__(self):
        self.rope_parameters = {"rope_type": "default", "rope_theta": 1e4}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.config = Config()


class Prefill:
    """Computes keys and values that no two calls share, and counts its calls."""

    def __init__(self, tokens=5):
        self.tokens, self.calls = tokens, 0

    def __call__(self):
        self.calls += 1
        return {layer: tuple(torch.rand(self.tokens, 1, 3) for _ in range(2)) for layer in range(2)}


def fetch(cache, model, ids, prefill=None, **options):
    prefill = prefill or Prefill(len(ids))
    before = prefill.calls
    layers = cache.fetch(cache.owner(model), ids, prefill, **options)
    return layers, prefill.calls == before


def hit(cache, model, ids, **options):
    return fetch(cache, model, ids, **options)[1]


def test_a_hit_returns_what_was_computed():
    cache, model = PrefixCache(budget_bytes=10_000), Model()
    first, was_hit = fetch(cache, model, [1, 2, 3])
    again, was_hit_again = fetch(cache, model, [1, 2, 3])
    assert (was_hit, was_hit_again) == (False, True)
    for layer in first:
        for a, b in zip(first[layer], again[layer], strict=True):
            assert torch.equal(a, b)
    assert cache.statistics == CacheStatistics(
        hits=1, misses=1, tokens_saved=3, tokens_computed=3, entries=1, bytes=3 * BYTES
    )


def test_what_differs_is_not_found():
    cache, model = PrefixCache(budget_bytes=100_000), Model()
    fetch(cache, model, [1, 2, 3])
    assert not hit(cache, model, [1, 2, 4])
    assert not hit(cache, model, [1, 2])
    assert not hit(cache, model, [1, 2, 3], first_position=1)
    assert not hit(cache, model, [1, 2 + 2**32, 3])
    assert not hit(cache, Model(), [1, 2, 3])
    model.config.rope_parameters["rope_theta"] = 5e5
    assert not hit(cache, model, [1, 2, 3])
    model.config.rope_parameters["rope_theta"] = 1e4
    model.eval()
    assert not hit(cache, model, [1, 2, 3])
    model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not hit(cache, model, [1, 2, 3])
    with torch.autocast("cpu", dtype=torch.float16):
        assert not hit(cache, model, [1, 2, 3])
    model.bfloat16()
    assert not hit(cache, model, [1, 2, 3])
    model.float()
    cache.invalidate(model)  # a round trip through bf16 is another model
    assert not hit(cache, model, [1, 2, 3])
    assert hit(cache, model, [1, 2, 3])  # control


@pytest.mark.parametrize(
    "change",
    [
        lambda model: nn.init.normal_(model.second.weight),
        lambda model: model.second.weight.data.mul_(1.5),  # behind autograd's back: no version counter moves
        lambda model: setattr(model, "second", nn.Linear(8, 8)),
        lambda model: model.load_state_dict(Model().state_dict()),
        lambda model: torch.optim.SGD(model.parameters(), lr=0.1).step(),
    ],
)
def test_weights_that_change_unannounced_raise(change):
    cache, model = PrefixCache(budget_bytes=10_000), Model()
    fetch(cache, model, [1, 2])
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with torch.no_grad():
        change(model)
    with pytest.raises(RuntimeError, match=r"weights of this Model changed.*cache.invalidate"):
        cache.owner(model)
    cache.invalidate(model)
    assert not hit(cache, model, [1, 2])
    assert hit(cache, model, [1, 2])


def test_weights_that_stay_do_not_raise():
    cache, model = PrefixCache(budget_bytes=10_000), Model()
    fetch(cache, model, [1, 2])
    model.requires_grad_(False)
    model.zero_grad()
    assert hit(cache, model, [1, 2])


def one_parameter(dtype=torch.float32, shape=(256, 256)):
    model = nn.Module()
    model.p = nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False)
    return model


def test_every_row_and_column_region_is_sampled():
    content = torch.arange(256 * 256 * 4)
    sampled = _sample(content) // 4
    assert SAMPLES // 2 < len(sampled) <= SAMPLES
    assert len((sampled % 256).unique()) > 100 and len((sampled // 256).unique()) > 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8])
@pytest.mark.parametrize("shape", [(256, 256), (1, 1), (7, 3), (127, 129)])
def test_one_element_written_behind_autograds_back_is_seen(dtype, shape):
    model = one_parameter(dtype, shape)
    before = fingerprint(model)
    for index in {0, model.p.numel() // 3, model.p.numel() - 1}:
        model.p.data.view(-1)[index] = 1
        after = fingerprint(model)
        assert after.versions == before.versions and after.digest != before.digest, index
        model.p.data.view(-1)[index] = 0
        assert fingerprint(model) == before


def test_views_of_one_storage_are_read_where_they_lie():
    """A flat buffer cut into parameters: they start at no multiple of 8 bytes."""
    flat = torch.randn(100, dtype=torch.bfloat16)
    views, copies = nn.Module(), nn.Module()
    views.p, copies.p = nn.Parameter(flat[3:90]), nn.Parameter(flat[3:90].clone())
    views.q, copies.q = nn.Parameter(flat[::2]), nn.Parameter(flat[::2].clone())  # not contiguous
    assert fingerprint(views).digest == fingerprint(copies).digest
    flat[89] += 1
    assert fingerprint(views).digest != fingerprint(copies).digest


def test_an_exchange_of_elements_is_seen_by_its_version_alone():
    """What `fingerprint` says that it misses through `.data`: equal sums, outside the sample."""
    model = one_parameter()
    model.p[100, 2] = 1.0
    before = fingerprint(model)
    model.p.data[100, 2], model.p.data[100, 4] = 0.0, 1.0
    assert fingerprint(model) == before
    model.p[100, 4], model.p[100, 6] = 0.0, 1.0
    after = fingerprint(model)
    assert after.digest == before.digest and after != before


@pytest.mark.parametrize("persistent", [True, False])
def test_a_buffer_that_changes_is_another_state(persistent):
    """Rotary frequencies rescaled in place: keys carry their rotation."""
    cache, model = PrefixCache(budget_bytes=100_000), Model()
    model.first.register_buffer("inv_freq", torch.rand(64), persistent=persistent)
    fetch(cache, model, [1, 2])
    assert hit(cache, model, [1, 2])
    kept = model.first.inv_freq.clone()
    model.first.inv_freq[63] *= 1.5
    assert not hit(cache, model, [1, 2])
    model.first.inv_freq.data[:2] = kept[:2].flip(0)
    assert not hit(cache, model, [1, 2])
    model.first.inv_freq = kept  # assigned, equal values
    assert hit(cache, model, [1, 2])


def test_two_sets_of_weights_in_one_module_need_two_caches():
    model, cache = Model(), PrefixCache(budget_bytes=10_000)
    own, other = model.first._parameters["weight"], nn.Parameter(torch.randn(8, 8))
    fetch(cache, model, [1, 2])
    model.first._parameters["weight"] = other
    with pytest.raises(RuntimeError, match="swap"):
        cache.owner(model)
    model.first._parameters["weight"] = own
    assert hit(cache, model, [1, 2])


def test_an_owner_from_before_invalidate_is_refused():
    cache, model = PrefixCache(budget_bytes=10_000), Model()
    owner = cache.owner(model)
    cache.invalidate(model)
    with pytest.raises(ValueError, match="out of date"):
        cache.fetch(owner, [1], Prefill(1))


def test_invalidate_leaves_other_models_alone():
    cache, one, two = PrefixCache(budget_bytes=10_000), Model(), Model()
    fetch(cache, one, [1, 2])
    fetch(cache, two, [1, 2])
    cache.invalidate(one)
    assert cache.statistics.bytes == 2 * BYTES
    assert hit(cache, two, [1, 2])
    assert not hit(cache, one, [1, 2])
    cache.invalidate()
    assert (cache.statistics.entries, cache.statistics.bytes) == (0, 0)


def test_entries_die_with_their_model():
    cache, model = PrefixCache(budget_bytes=10_000), Model()
    fetch(cache, model, [1, 2])
    del model
    gc.collect()
    assert (cache.statistics.entries, cache.statistics.bytes) == (0, 0)
    assert not cache._watched


def test_the_cache_does_not_outlive_its_last_reference():
    model, cache = Model(), PrefixCache(budget_bytes=10_000)
    layers, _ = fetch(cache, model, [1, 2])
    reference = weakref.ref(cache)
    del cache
    gc.collect()
    assert reference() is None and layers


def test_the_budget_holds_to_the_byte():
    model = Model()
    exact = PrefixCache(budget_bytes=5 * BYTES)
    fetch(exact, model, [1, 2, 3, 4, 5])
    assert exact.statistics.bytes == exact.budget_bytes
    assert hit(exact, model, [1, 2, 3, 4, 5])
    short = PrefixCache(budget_bytes=5 * BYTES - 1)
    fetch(short, model, [1, 2, 3, 4, 5])
    assert (short.statistics.bytes, short.statistics.rejected) == (0, 1)
    assert not hit(short, model, [1, 2, 3, 4, 5])


@pytest.mark.parametrize("policy", ["admit_until_full", "lru"])
def test_an_entry_larger_than_the_budget_evicts_nothing(policy):
    model, cache = Model(), PrefixCache(budget_bytes=4 * BYTES, policy=policy)
    fetch(cache, model, [1, 2])
    fetch(cache, model, [1, 2, 3, 4, 5])
    assert hit(cache, model, [1, 2])
    assert (cache.statistics.rejected, cache.statistics.evicted) == (1, 0)


def test_policies_over_epochs_in_a_fixed_order():
    """Ten prefixes of which four fit: LRU never hits, admit-until-full hits on four in every epoch after the first."""
    model, hits = Model(), {}
    for policy in ("admit_until_full", "lru"):
        cache = PrefixCache(budget_bytes=4 * 2 * BYTES, policy=policy)
        for _ in range(3):
            for i in range(10):
                fetch(cache, model, [i, i])
        hits[policy] = cache.statistics.hits
        assert cache.statistics.bytes == cache.budget_bytes
    assert hits == {"admit_until_full": 8, "lru": 0}


def test_lru_drops_the_least_recently_used():
    model, cache = Model(), PrefixCache(budget_bytes=2 * BYTES, policy="lru")
    for ids in ([1], [2], [1], [3]):
        fetch(cache, model, ids)
    assert cache.statistics.evicted == 1
    assert hit(cache, model, [1])
    assert not hit(cache, model, [2])


def test_entries_hold_no_more_memory_than_is_counted():
    """A value is a view of the fused projection's output, and under autograd of its graph: neither may be kept."""
    model, cache = Model(), PrefixCache(budget_bytes=10_000)
    fused = torch.rand(2, 3, 12, requires_grad=True) * 2
    view = fused[..., :3].transpose(0, 1)
    layers = cache.fetch(cache.owner(model), [1, 2, 3], lambda: {0: (view, view)})
    held = [t for pair in cache.fetch(cache.owner(model), [1, 2, 3], Prefill()).values() for t in pair]
    assert sum(t.untyped_storage().nbytes() for t in held) == cache.statistics.bytes == 2 * view.numel() * 4
    assert view.untyped_storage().nbytes() > view.numel() * 4  # control
    assert all(not t.requires_grad and t.grad_fn is None for t in held)
    assert torch.equal(layers[0][0], view)


def test_kept_where_asked_and_returned_where_computed():
    model = Model()
    for options in (dict(device="cpu"), dict(offload=True)):
        cache = PrefixCache(budget_bytes=10_000, **options)
        first, _ = fetch(cache, model, [1, 2])
        again, was_hit = fetch(cache, model, [1, 2])
        assert was_hit and torch.equal(first[0][0], again[0][0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(budget_bytes=-1), "budget_bytes must not be negative, got -1"),
        (dict(budget_bytes=1, policy="fifo"), "policy must be one of .*'fifo'"),
        (dict(budget_bytes=1, offload=True, device="cuda"), "offload keeps entries on the CPU"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        PrefixCache(**options)


def test_adapters():
    """Another adapter, or none, is another state; weights of adapters that are off may change freely."""
    peft = pytest.importorskip("peft")
    model = Model()
    model.config = None
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["first"], r=2), adapter_name="a")
    wrapped.add_adapter("b", peft.LoraConfig(target_modules=["first"], r=2))
    cache = PrefixCache(budget_bytes=100_000)
    wrapped.set_adapter("a")
    assert model_state(wrapped).adapters == ((("a",), ()),)
    fetch(cache, wrapped, [1, 2])
    assert hit(cache, wrapped, [1, 2])
    assert hit(cache, wrapped.get_base_model(), [1, 2])  # the same layers
    wrapped.set_adapter("b")
    assert not hit(cache, wrapped, [1, 2])
    with wrapped.disable_adapter():
        assert not hit(cache, wrapped, [1, 2])
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if ".b." in name:
                    parameter.add_(1.0)
        assert hit(cache, wrapped, [1, 2])  # the teacher with adapters off, after a student's step
    with pytest.raises(RuntimeError, match="changed"):
        cache.owner(wrapped)  # "b" is on again
    wrapped.set_adapter("a")
    assert hit(cache, wrapped, [1, 2])
