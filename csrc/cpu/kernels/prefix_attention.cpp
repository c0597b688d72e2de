#include "prefix_attention.h"

#include <math.h>

#include "gemm_tile.h"

// A vector's lanes are query rows, so that all of a row's arithmetic stays in its lane: its bits do not depend on the
// rows beside it. A tile of tokens has a row for each query head that shares the key head, so that few tokens fill
// vectors too. Everything is held transposed, [size or key][row], `pitch` floats apart.
namespace sdft::SDFT_ISA {
namespace {

using M = Math<vfloat>;
constexpr float INF = __builtin_inff();

// The rows of one tile.
struct Tile {
  int64_t segment, token, tokens, position;  // of the first token: its packed row, its place in its sequence
  int64_t head, group, rows, vectors;

  Tile(const PrefixAttention& call, int64_t index, int64_t key_head) {
    const int64_t* entry = call.tiles + 3 * index;
    const int64_t* own = call.segments + 3 * entry[0];
    segment = entry[0];
    token = own[0] + entry[1];
    tokens = entry[2];
    position = call.prefix + own[2] + entry[1];
    group = call.group();
    head = key_head * group;
    rows = tokens * group;
    vectors = (rows + LANES - 1) / LANES;
  }

  int64_t token_of(int64_t row) const { return token + row / group; }
  int64_t head_of(int64_t row) const { return head + row % group; }
};

// Keys of one block, of one key head, copied to adjacent rows: as they lie, rows a power of two apart would share few
// sets of the cache.
struct Keys {
  float *key, *value;
  int64_t first, count;  // first: its row among the packed or the cached ones
  int64_t position;      // of the first in its sequence
  bool cached, masked;   // masked: not every row of the tile sees all of them
};

void copy_rows(const HeadRows& from, int64_t first, int64_t head, int64_t count, int64_t size, float* to) {
  for (int64_t i = 0; i < count; ++i) {
    std::memcpy(to + i * size, from.at(first + i, head), size * sizeof(float));
  }
}

// `visit(keys)` for the blocks of `count` keys that some row of the tile sees.
template <class Visit>
void visit_run(const PrefixAttention& call, const Tile& tile, int64_t key_head, int64_t row, int64_t count,
               int64_t position, bool cached, float* scratch, Visit&& visit) {
  const int64_t last = tile.position + tile.tokens - 1;
  for (int64_t at = 0; at < count; at += KEY_BLOCK) {
    const int64_t size = count - at < KEY_BLOCK ? count - at : KEY_BLOCK, begin = position + at, end = begin + size - 1;
    if (begin > last || end <= tile.position - call.window) {
      continue;
    }
    const bool masked = end > tile.position || begin <= last - call.window;
    const Keys keys{scratch, scratch + KEY_BLOCK * call.size, row + at, size, begin, cached, masked};
    copy_rows(cached ? call.cached_key : call.key, row + at, key_head, size, call.size, keys.key);
    copy_rows(cached ? call.cached_value : call.value, row + at, key_head, size, call.size, keys.value);
    visit(keys);
  }
}

// All blocks, the cached prefix first, then from the root to the tile's own segment.
template <class Visit>
void visit_keys(const PrefixAttention& call, const Tile& tile, int64_t key_head, float* scratch, Visit&& visit) {
  visit_run(call, tile, key_head, 0, call.prefix, 0, true, scratch, visit);
  for (int64_t i = call.ancestor_offsets[tile.segment]; i < call.ancestor_offsets[tile.segment + 1]; ++i) {
    const int64_t* run = call.segments + 3 * call.ancestors[i];
    visit_run(call, tile, key_head, run[0], run[1], call.prefix + run[2], false, scratch, visit);
  }
}

// to[d * pitch + row] = scale * from[row, d], and, unless null, copy[row * size + d]; zeros in rows beyond the tile's.
void load_rows(const HeadRows& from, const Tile& tile, int64_t size, float scale, int64_t pitch, float* to,
               float* copy) {
  for (int64_t row = 0; row < tile.vectors * LANES; row += LANES) {
    const float* rows[LANES];
    for (int64_t i = 0; i < LANES; ++i) {
      rows[i] = row + i < tile.rows ? from.at(tile.token_of(row + i), tile.head_of(row + i)) : nullptr;
    }
    for (int64_t d = 0; d < size; d += LANES) {
      vfloat lines[LANES];
      for (int64_t i = 0; i < LANES; ++i) {
        lines[i] = rows[i] != nullptr ? load(rows[i] + d) * scale : vfloat{};
        if (copy != nullptr) {
          store(copy + (row + i) * size + d, lines[i]);
        }
      }
      transpose(lines);
      for (int64_t i = 0; i < LANES; ++i) {
        store(to + (d + i) * pitch + row, lines[i]);
      }
    }
  }
}

// to[row, d] = from[d * pitch + row] * factor[row], rows of (tokens, heads, size).
void store_rows(const float* from, const Tile& tile, int64_t size, int64_t pitch, const float* factor, int64_t heads,
                float* to) {
  for (int64_t row = 0; row < tile.rows; row += LANES) {
    const int64_t count = tile.rows - row < LANES ? tile.rows - row : LANES;
    float* rows[LANES];
    for (int64_t i = 0; i < count; ++i) {
      rows[i] = to + (tile.token_of(row + i) * heads + tile.head_of(row + i)) * size;
    }
    for (int64_t d = 0; d < size; d += LANES) {
      vfloat lines[LANES];
      for (int64_t i = 0; i < LANES; ++i) {
        lines[i] = load(from + (d + i) * pitch + row) * load(factor + row);
      }
      transpose(lines);
      for (int64_t i = 0; i < count; ++i) {
        store(rows[i] + d, lines[i]);
      }
    }
  }
}

template <int N>
struct Width {
  static constexpr int VECTORS = N;
};

// out[i, j] += (or, with ADD false, =) sum over k of a(i, k) b[k, j], i < rows and j < vectors * LANES, where a(i, k)
// is a[i * a_step + k], or with COLUMNS a[k * a_step + i].
template <bool COLUMNS, bool ADD>
void multiply(int64_t rows, int64_t vectors, int64_t steps, const float* a, int64_t a_step, const float* b,
              int64_t b_step, float* out, int64_t out_step) {
  int64_t vector = 0;
  const auto panel = [&](auto width) {
    constexpr int WIDTH = decltype(width)::VECTORS;
    for (int64_t i = 0; i < rows; i += TILE_ROWS) {
      strided_tile<COLUMNS, ADD, TILE_ROWS, WIDTH>(rows - i, a + (COLUMNS ? i : i * a_step), a_step, b + vector * LANES,
                                                   b_step, steps, out + i * out_step + vector * LANES, out_step);
    }
    vector += WIDTH;
  };
  while (vector < vectors) {
    const int64_t left = vectors - vector;
    // Two pairs in place of three and one, which would wait for its broadcasts.
    if (TILE_VECTORS >= 3 && left >= 3 && left != 4) {
      panel(Width<TILE_VECTORS>());
    } else if (left >= 2) {
      panel(Width<2>());
    } else {
      panel(Width<1>());
    }
  }
}

// The youngest key that each lane's row sees, counted from the block's first; below 0 where it sees none.
vint youngest(const Tile& tile, const Keys& keys, int64_t row) {
  vint last;
  for (int64_t lane = 0; lane < LANES; ++lane) {
    const int64_t r = row + lane < tile.rows ? row + lane : tile.rows - 1;
    last[lane] = static_cast<int32_t>(tile.position + r / tile.group - keys.position);
  }
  return last;
}

vint sees(const vint& last, int64_t key, int64_t window) {
  const int32_t k = static_cast<int32_t>(key), width = static_cast<int32_t>(window);
  return (last >= k) & (last < k + width);
}

// Softmax goes on over one block, for the lanes at `row`: scores become weights relative to the new peak. Returns what
// the sums so far are to be multiplied by.
vfloat weigh(const PrefixAttention& call, const Tile& tile, const Keys& keys, int64_t row, int64_t pitch, float* scores,
             float* peak, float* total) {
  const vint last = keys.masked ? youngest(tile, keys, row) : vint{};
  const vfloat before = load(peak + row), cap = broadcast(call.softcap);
  vfloat now = before;
  for (int64_t k = 0; k < keys.count; ++k) {
    float* at = scores + k * pitch + row;
    vfloat score = load(at);
    if (call.softcap != 0.0f) {
      score = cap * M::tanh(score / cap);
    }
    if (keys.masked) {
      score = sees(last, k, call.window) ? score : broadcast(-INF);
    }
    now = score > now ? score : now;
    store(at, score);
  }
  // Where nothing is seen still, -inf - -inf would be NaN.
  const vfloat pivot = now == broadcast(-INF) ? vfloat{} : now;
  vfloat sum = {};
  for (int64_t k = 0; k < keys.count; ++k) {
    float* at = scores + k * pitch + row;
    const vfloat weight = M::exp(load(at) - pivot);
    sum += weight;
    store(at, weight);
  }
  const vfloat factor = M::exp(before - pivot);
  store(peak + row, now);
  store(total + row, fused(load(total + row), factor, sum));
  return factor;
}

// Scores become probabilities, and `slopes`, products of value and gradient, gradients of the scores.
void differentiate(const PrefixAttention& call, const Tile& tile, const Keys& keys, int64_t row, int64_t pitch,
                   const float* lse, const float* delta, float* scores, float* slopes) {
  const vint last = keys.masked ? youngest(tile, keys, row) : vint{};
  const vfloat norm = load(lse + row), mean = load(delta + row), cap = broadcast(call.softcap);
  for (int64_t k = 0; k < keys.count; ++k) {
    vfloat score = load(scores + k * pitch + row), slope = load(slopes + k * pitch + row) - mean;
    if (call.softcap != 0.0f) {
      const vfloat tanh = M::tanh(score / cap);
      score = cap * tanh;
      slope *= 1.0f - tanh * tanh;
    }
    vfloat probability = M::exp(score - norm);
    if (keys.masked) {
      probability = sees(last, k, call.window) ? probability : vfloat{};
    }
    store(scores + k * pitch + row, probability);
    store(slopes + k * pitch + row, probability * slope);
  }
}

bool all_ones(const float* factors, int64_t vectors) {
  vint other = {};
  for (int64_t row = 0; row < vectors * LANES; row += LANES) {
    other |= load(factors + row) != broadcast(1.0f);
  }
  int32_t any = 0;
  for (int64_t lane = 0; lane < LANES; ++lane) {
    any |= other[lane];
  }
  return any == 0;
}

// Peak and denominator of no keys: the sink's, if there is one.
void start(const PrefixAttention& call, const Tile& tile, float* peak, float* total) {
  for (int64_t row = 0; row < tile.vectors * LANES; ++row) {
    const float sink = call.sinks != nullptr && row < tile.rows ? call.sinks[tile.head_of(row)] : -INF;
    peak[row] = sink;
    total[row] = sink == -INF ? 0.0f : 1.0f;
  }
}

// The log-sum-exp and, in place of the denominators, their inverses.
void finish(const PrefixAttention& call, const Tile& tile, const float* peak, float* total, float* lse) {
  for (int64_t row = 0; row < tile.rows; ++row) {
    lse[tile.token_of(row) * call.heads + tile.head_of(row)] = total[row] == 0.0f ? -INF : peak[row] + logf(total[row]);
    total[row] = total[row] == 0.0f ? 0.0f : 1.0f / total[row];
  }
}

// Of each row: the log-sum-exp, and rowsum(grad * out) - grad_lse, which is also written down.
void load_statistics(const PrefixAttention& call, const PrefixAttentionGrad& grads, const Tile& tile,
                     const float* grad_rows, float* lse, float* delta) {
  for (int64_t row = 0; row < tile.vectors * LANES; ++row) {
    lse[row] = INF;  // no probability
    delta[row] = 0.0f;
    if (row >= tile.rows) {
      continue;
    }
    const int64_t at = tile.token_of(row) * call.heads + tile.head_of(row);
    vfloat sum = {};
    for (int64_t d = 0; d < call.size; d += LANES) {
      sum = fused(load(grad_rows + row * call.size + d), load(grads.out + at * call.size + d), sum);
    }
    float total = grads.grad_lse == nullptr ? 0.0f : -grads.grad_lse[at];
    for (int64_t lane = 0; lane < LANES; ++lane) {
      total += sum[lane];
    }
    grads.delta[at] = delta[row] = total;
    lse[row] = grads.lse[at] == -INF ? INF : grads.lse[at];
  }
}

}  // namespace

void attend(const PrefixAttention& call, int64_t index, int64_t key_head, float* out, float* lse, float* scratch) {
  const Tile tile(call, index, key_head);
  const int64_t size = call.size, pitch = call.pitch();
  float* queries = scratch + 2 * KEY_BLOCK * size;
  float* sums = queries + size * pitch;
  float* scores = sums + size * pitch;
  float* peak = scores + KEY_BLOCK * pitch;
  float *total = peak + pitch, *factors = total + pitch;
  load_rows(call.query, tile, size, call.scale, pitch, queries, nullptr);
  std::memset(sums, 0, size * pitch * sizeof(float));
  start(call, tile, peak, total);
  visit_keys(call, tile, key_head, scratch, [&](const Keys& keys) {
    multiply<false, false>(keys.count, tile.vectors, size, keys.key, size, queries, pitch, scores, pitch);
    for (int64_t row = 0; row < tile.vectors * LANES; row += LANES) {
      store(factors + row, weigh(call, tile, keys, row, pitch, scores, peak, total));
    }
    if (!all_ones(factors, tile.vectors)) {
      for (int64_t d = 0; d < size; ++d) {
        for (int64_t row = 0; row < tile.vectors * LANES; row += LANES) {
          store(sums + d * pitch + row, load(sums + d * pitch + row) * load(factors + row));
        }
      }
    }
    multiply<true, true>(size, tile.vectors, keys.count, keys.value, size, scores, pitch, sums, pitch);
  });
  finish(call, tile, peak, total, lse);
  store_rows(sums, tile, size, pitch, total, call.heads, out);
}

void attend_backward(const PrefixAttention& call, const PrefixAttentionGrad& grads, int64_t index, int64_t key_head,
                     float* grad_key, float* grad_value, float* scratch) {
  const Tile tile(call, index, key_head);
  const int64_t size = call.size, pitch = call.pitch(), step = call.key_heads * size;
  float* queries = scratch + 2 * KEY_BLOCK * size;
  float *query_rows = queries + size * pitch, *upstream = query_rows + size * pitch;
  float *upstream_rows = upstream + size * pitch, *grad_query = upstream_rows + size * pitch;
  float *scores = grad_query + size * pitch, *slopes = scores + KEY_BLOCK * pitch;
  float *lse = slopes + KEY_BLOCK * pitch, *delta = lse + pitch;
  load_rows(call.query, tile, size, call.scale, pitch, queries, query_rows);
  load_rows(grads.grad, tile, size, 1.0f, pitch, upstream, upstream_rows);
  load_statistics(call, grads, tile, upstream_rows, lse, delta);
  std::memset(grad_query, 0, size * pitch * sizeof(float));
  visit_keys(call, tile, key_head, scratch, [&](const Keys& keys) {
    multiply<false, false>(keys.count, tile.vectors, size, keys.key, size, queries, pitch, scores, pitch);
    multiply<false, false>(keys.count, tile.vectors, size, keys.value, size, upstream, pitch, slopes, pitch);
    for (int64_t row = 0; row < tile.vectors * LANES; row += LANES) {
      differentiate(call, tile, keys, row, pitch, lse, delta, scores, slopes);
    }
    if (!keys.cached) {
      const int64_t at = (keys.first * call.key_heads + key_head) * size, vectors = size / LANES;
      multiply<false, true>(keys.count, vectors, tile.rows, scores, pitch, upstream_rows, size, grad_value + at, step);
      multiply<false, true>(keys.count, vectors, tile.rows, slopes, pitch, query_rows, size, grad_key + at, step);
    }
    multiply<true, true>(size, tile.vectors, keys.count, keys.key, size, slopes, pitch, grad_query, pitch);
  });
  for (int64_t row = 0; row < tile.vectors * LANES; ++row) {
    lse[row] = call.scale;
  }
  store_rows(grad_query, tile, size, pitch, lse, call.heads, grads.grad_query);
}

}  // namespace sdft::SDFT_ISA
