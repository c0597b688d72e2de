#include "prefix_attention.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <optional>

#include "scratch.h"

namespace sdft {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

void check_shape(const Tensor& t, const char* name, ScalarType dtype, std::initializer_list<int64_t> shape) {
  STD_TORCH_CHECK(t.scalar_type() == dtype, "prefix_attention: ", name, " must be ",
                  dtype == ScalarType::Float ? "fp32" : "int64");
  bool fits = t.dim() == static_cast<int64_t>(shape.size());
  int64_t axis = 0;
  for (int64_t size : shape) {
    fits = fits && t.size(axis++) == size;
  }
  STD_TORCH_CHECK(fits, "prefix_attention: ", name, " has another shape than the query, the key or the tables ask for");
}

void check_contiguous(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_contiguous(), "prefix_attention: ", name, " must be contiguous");
}

HeadRows head_rows(const Tensor& t, const char* name, int64_t tokens, int64_t heads, int64_t size) {
  check_shape(t, name, ScalarType::Float, {tokens, heads, size});
  STD_TORCH_CHECK(t.stride(2) == 1, "prefix_attention: ", name, " must have stride 1 in its last dimension");
  return {static_cast<const float*>(t.const_data_ptr()), t.stride(0), t.stride(1)};
}

const int64_t* table(const Tensor& t, const char* name, std::initializer_list<int64_t> shape) {
  check_shape(t, name, ScalarType::Long, shape);
  check_contiguous(t, name);
  return static_cast<const int64_t*>(t.const_data_ptr());
}

float* numbers(Tensor& t, const char* name, std::initializer_list<int64_t> shape) {
  check_shape(t, name, ScalarType::Float, shape);
  check_contiguous(t, name);
  return static_cast<float*>(t.mutable_data_ptr());
}

// The tables say where the kernels read and write: nothing in them is trusted.
void check_tables(const PrefixAttention& call, int64_t tokens, int64_t tiles, int64_t segments, int64_t ancestors) {
  const auto in_tokens = [&](int64_t first, int64_t count) {
    return first >= 0 && count >= 0 && first <= tokens && count <= tokens - first;
  };
  bool fits = call.ancestor_offsets[0] == 0 && call.ancestor_offsets[segments] == ancestors;
  for (int64_t i = 0; i < segments && fits; ++i) {
    const int64_t* run = call.segments + 3 * i;
    fits = in_tokens(run[0], run[1]) && run[2] >= 0 && run[2] < MAX_WINDOW - call.prefix - tokens &&
           call.ancestor_offsets[i] <= call.ancestor_offsets[i + 1];
  }
  for (int64_t i = 0; i < ancestors && fits; ++i) {
    fits = call.ancestors[i] >= 0 && call.ancestors[i] < segments;
  }
  for (int64_t i = 0; i < tiles && fits; ++i) {
    const int64_t* tile = call.tiles + 3 * i;
    fits = tile[0] >= 0 && tile[0] < segments && tile[1] >= 0 && tile[2] > 0 &&
           tile[1] + tile[2] <= call.segments[3 * tile[0] + 1];
  }
  STD_TORCH_CHECK(fits, "prefix_attention: the tables do not describe a tree of ", tokens, " tokens");
}

PrefixAttention make_call(const Tensor& query, const Tensor& key, const Tensor& value, const Optional& sinks,
                          const Optional& cached_key, const Optional& cached_value, const Tensor& tiles,
                          const Tensor& segments, const Tensor& offsets, const Tensor& ancestors, double scale,
                          double softcap, int64_t window) {
  STD_TORCH_CHECK(query.dim() == 3 && key.dim() == 3, "prefix_attention: query and key must have 3 dimensions");
  const int64_t tokens = query.size(0), heads = query.size(1), size = query.size(2), key_heads = key.size(1);
  STD_TORCH_CHECK(key_heads > 0 && heads % key_heads == 0 && size > 0 && size % 16 == 0,
                  "prefix_attention: ", key_heads, " key heads must divide ", heads, " query heads, 16 their size ",
                  size);
  STD_TORCH_CHECK(cached_key.has_value() == cached_value.has_value(), "prefix_attention: a cached key needs its value");
  PrefixAttention call{};
  call.query = head_rows(query, "query", tokens, heads, size);
  call.key = head_rows(key, "key", tokens, key_heads, size);
  call.value = head_rows(value, "value", tokens, key_heads, size);
  if (cached_key.has_value()) {
    call.prefix = cached_key->dim() > 0 ? cached_key->size(0) : 0;
    call.cached_key = head_rows(*cached_key, "cached_key", call.prefix, key_heads, size);
    call.cached_value = head_rows(*cached_value, "cached_value", call.prefix, key_heads, size);
  }
  if (sinks.has_value()) {
    check_shape(*sinks, "sinks", ScalarType::Float, {heads});
    check_contiguous(*sinks, "sinks");
    call.sinks = static_cast<const float*>(sinks->const_data_ptr());
  }
  call.heads = heads;
  call.key_heads = key_heads;
  call.size = size;
  call.scale = static_cast<float>(scale);
  call.softcap = static_cast<float>(softcap);
  call.window = std::min(window, MAX_WINDOW);
  const int64_t count = offsets.dim() == 1 ? offsets.size(0) - 1 : 0;
  call.tiles = table(tiles, "tiles", {tiles.size(0), 3});
  call.segments = table(segments, "segments", {count, 3});
  call.ancestor_offsets = table(offsets, "ancestor_offsets", {count + 1});
  call.ancestors = table(ancestors, "ancestors", {ancestors.size(0)});
  check_tables(call, tokens, tiles.size(0), count, ancestors.size(0));
  for (int64_t i = 0; i < tiles.size(0); ++i) {
    call.tile_tokens = std::max(call.tile_tokens, call.tiles[3 * i + 2]);
  }
  return call;
}

// `work(unit, scratch)` for units [0, count), each by the first thread that is free: they take different times.
template <class Work>
void share(int64_t count, int64_t scratch_floats, Work&& work) {
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, count, 1, [&](int64_t, int64_t) {
    const Scratch scratch(scratch_floats);
    for (int64_t unit = next++; unit < count; unit = next++) {
      work(unit, scratch.data());
    }
  });
}

void prefix_attention_cpu(const Tensor& query, const Tensor& key, const Tensor& value, const Optional& sinks,
                          const Optional& cached_key, const Optional& cached_value, const Tensor& tiles,
                          const Tensor& segments, const Tensor& offsets, const Tensor& ancestors, double scale,
                          double softcap, int64_t window, Tensor out, Tensor lse) {
  const PrefixAttention call = make_call(query, key, value, sinks, cached_key, cached_value, tiles, segments, offsets,
                                         ancestors, scale, softcap, window);
  float* outputs = numbers(out, "out", {query.size(0), call.heads, call.size});
  float* norms = numbers(lse, "lse", {query.size(0), call.heads});
  share(tiles.size(0) * call.key_heads, forward_scratch_floats(call.size, call.pitch()),
        [&](int64_t unit, float* scratch) {
          SDFT_DISPATCH(attend, call, unit / call.key_heads, unit % call.key_heads, outputs, norms, scratch);
        });
}

void prefix_attention_backward_cpu(const Tensor& query, const Tensor& key, const Tensor& value,
                                   const Optional& cached_key, const Optional& cached_value, const Tensor& tiles,
                                   const Tensor& segments, const Tensor& offsets, const Tensor& ancestors, double scale,
                                   double softcap, int64_t window, const Tensor& out, const Tensor& lse,
                                   const Tensor& grad, const Optional& grad_lse, Tensor delta, Tensor grad_query,
                                   Tensor partial) {
  const PrefixAttention call = make_call(query, key, value, {}, cached_key, cached_value, tiles, segments, offsets,
                                         ancestors, scale, softcap, window);
  const int64_t tokens = query.size(0);
  const int64_t parts = partial.dim() == 5 ? partial.size(0) : 0;
  STD_TORCH_CHECK(parts > 0, "prefix_attention: partial must be (parts, 2, tokens, key heads, size)");
  float* partials = numbers(partial, "partial", {parts, 2, tokens, call.key_heads, call.size});
  check_shape(out, "out", ScalarType::Float, {tokens, call.heads, call.size});
  check_contiguous(out, "out");
  check_shape(lse, "lse", ScalarType::Float, {tokens, call.heads});
  check_contiguous(lse, "lse");
  if (grad_lse.has_value()) {
    check_shape(*grad_lse, "grad_lse", ScalarType::Float, {tokens, call.heads});
    check_contiguous(*grad_lse, "grad_lse");
  }
  const PrefixAttentionGrad grads{
      static_cast<const float*>(out.const_data_ptr()),
      static_cast<const float*>(lse.const_data_ptr()),
      grad_lse.has_value() ? static_cast<const float*>(grad_lse->const_data_ptr()) : nullptr,
      head_rows(grad, "grad", tokens, call.heads, call.size),
      numbers(delta, "delta", {tokens, call.heads}),
      numbers(grad_query, "grad_query", {tokens, call.heads, call.size})};
  // A part has every parts-th tile, so that all take about the same time, and sums of its own: two threads never add to
  // the same gradient, and the sums do not depend on their number.
  const int64_t rows = tokens * call.key_heads, both = 2 * rows * call.size;
  share(parts * call.key_heads, backward_scratch_floats(call.size, call.pitch()), [&](int64_t unit, float* scratch) {
    const int64_t part = unit / call.key_heads, key_head = unit % call.key_heads;
    float* grad_key = partials + part * both;
    float* grad_value = grad_key + rows * call.size;
    for (int64_t row = key_head; row < 2 * rows; row += call.key_heads) {
      std::memset(grad_key + row * call.size, 0, call.size * sizeof(float));
    }
    for (int64_t tile = part; tile < tiles.size(0); tile += parts) {
      SDFT_DISPATCH(attend_backward, call, grads, tile, key_head, grad_key, grad_value, scratch);
    }
  });
  torch::stable::parallel_for(0, 2 * rows, 64, [&](int64_t begin, int64_t end) {
    for (int64_t part = 1; part < parts; ++part) {
      const float* from = partials + part * both;
      for (int64_t i = begin * call.size; i < end * call.size; ++i) {
        partials[i] += from[i];
      }
    }
  });
}

}  // namespace
}  // namespace sdft

STABLE_TORCH_LIBRARY_IMPL(sdft_kernels, CPU, m) {
  m.impl("prefix_attention", TORCH_BOX(&sdft::prefix_attention_cpu));
  m.impl("prefix_attention_backward", TORCH_BOX(&sdft::prefix_attention_backward_cpu));
}
