#pragma once

#include <cstdint>

#include "isa.h"

namespace sdft {

// (tokens, heads, size) fp32, the numbers of a head adjacent.
struct HeadRows {
  const float* data;
  int64_t token_stride, head_stride;

  const float* at(int64_t token, int64_t head) const { return data + token * token_stride + head * head_stride; }
};

// Attention over a prefix tree; the tables are those of `PrefixTree`.
struct PrefixAttention {
  HeadRows query, key, value;
  HeadRows cached_key, cached_value;  // `prefix` tokens before every root
  const float* sinks;                 // of each query head, or null
  int64_t heads, key_heads, size, prefix;
  float scale, softcap;     // a softcap of none is 0
  int64_t window;           // keys that a token sees, at most MAX_WINDOW
  const int64_t* tiles;     // segment, first token within it, tokens
  const int64_t* segments;  // first row, tokens, position of the first token
  const int64_t* ancestor_offsets;
  const int64_t* ancestors;
  int64_t tile_tokens;  // of the largest tile

  int64_t group() const { return heads / key_heads; }
  // Rows of a tile in memory: a query row of each head that shares the key head, whole vectors of every build.
  int64_t pitch() const { return (tile_tokens * group() + 15) / 16 * 16; }
};

// Of the saved output, and what the backward pass writes. All of them contiguous but `grad`.
struct PrefixAttentionGrad {
  const float* out;       // (tokens, heads, size)
  const float* lse;       // (tokens, heads)
  const float* grad_lse;  // the same, or null
  HeadRows grad;
  float* delta;       // (tokens, heads): rowsum(grad * out) - grad_lse
  float* grad_query;  // (tokens, heads, size)
};

constexpr int64_t MAX_WINDOW = 1 << 30;
// Keys that are multiplied, weighed and summed at a time, counted from a segment's first.
constexpr int64_t KEY_BLOCK = 64;

// Floats that a thread needs.
constexpr int64_t forward_scratch_floats(int64_t size, int64_t pitch) {
  return 2 * KEY_BLOCK * size + (2 * size + KEY_BLOCK + 3) * pitch;
}
constexpr int64_t backward_scratch_floats(int64_t size, int64_t pitch) {
  return 2 * KEY_BLOCK * size + (5 * size + 2 * KEY_BLOCK + 2) * pitch;
}

}  // namespace sdft

// Rows of one tile that share a key head. `size` is a multiple of 16; `out` (tokens, heads, size) and `lse` (tokens,
// heads) are contiguous.
SDFT_DECLARE(void attend(const PrefixAttention& call, int64_t tile, int64_t key_head, float* out, float* lse,
                         float* scratch))
// The same rows' gradients; adds to `grad_key` and `grad_value`, both contiguous.
SDFT_DECLARE(void attend_backward(const PrefixAttention& call, const PrefixAttentionGrad& grads, int64_t tile,
                                  int64_t key_head, float* grad_key, float* grad_value, float* scratch))
