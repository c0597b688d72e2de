#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

// Plans for attention over a prefix tree: segments of tokens with a length and a parent (-1: a root). Host code, done
// once a batch. sdft_kernels/prefix_attention/planner.py holds the contract, and the same in Python for where this is
// not built.
namespace sdft {

using Integers = std::vector<int64_t>;

struct Span {
  const int64_t* data;
  int64_t size;
};

struct PrefixPlan {
  Integers lengths, parents, leaves, tokens;
};

// Sequences that share the tokens before `depth` and have the next one in common (or none: empty sequences).
struct PrefixGroup {
  int64_t parent, depth;
  Integers members;  // in the order of the input
};

// The depth up to which all members agree, their shortest at the most.
inline int64_t common_depth(const std::vector<Span>& sequences, const PrefixGroup& group) {
  const Span first = sequences[group.members.front()];
  int64_t end = first.size;
  for (const int64_t member : group.members) {
    const Span other = sequences[member];
    end = std::min(end, other.size);
    end = std::mismatch(first.data + group.depth, first.data + end, other.data + group.depth).first - first.data;
  }
  return end;
}

// Appends to `queue` a group for each token that follows at `depth`, in the order in which members show them.
template <typename ended_t>
void split_by_token(const std::vector<Span>& sequences, const Integers& members, int64_t parent, int64_t depth,
                    std::vector<PrefixGroup>& queue, ended_t ended) {
  std::unordered_map<int64_t, size_t> group_of;
  for (const int64_t member : members) {
    const Span sequence = sequences[member];
    if (sequence.size == depth) {
      ended(member);
      continue;
    }
    const auto [found, added] = group_of.try_emplace(sequence.data[depth], queue.size());
    if (added) {
      queue.push_back({parent, depth, {}});
    }
    queue[found->second].members.push_back(member);
  }
}

// The radix tree of the sequences. Every token is compared once, so the time is that of reading the input.
inline PrefixPlan prefix_tree(const std::vector<Span>& sequences) {
  PrefixPlan plan;
  plan.leaves.resize(sequences.size());
  Integers everyone;
  size_t total = 0;
  for (const Span sequence : sequences) {
    everyone.push_back(static_cast<int64_t>(everyone.size()));
    total += static_cast<size_t>(sequence.size);
  }
  plan.tokens.reserve(total);      // pages that sharing leaves unused are never touched
  std::vector<PrefixGroup> queue;  // a group's index is its segment
  constexpr size_t NONE = SIZE_MAX;
  size_t empty = NONE;
  split_by_token(sequences, everyone, -1, 0, queue, [&](int64_t member) {
    if (empty == NONE) {
      empty = queue.size();
      queue.push_back({-1, 0, {}});
    }
    queue[empty].members.push_back(member);
  });
  for (size_t segment = 0; segment < queue.size(); ++segment) {
    const PrefixGroup group = std::move(queue[segment]);  // the queue grows below
    const int64_t end = common_depth(sequences, group);
    const int64_t* first = sequences[group.members.front()].data;
    plan.lengths.push_back(end - group.depth);
    plan.parents.push_back(group.parent);
    plan.tokens.insert(plan.tokens.end(), first + group.depth, first + end);
    split_by_token(sequences, group.members, static_cast<int64_t>(segment), end, queue,
                   [&](int64_t member) { plan.leaves[member] = static_cast<int64_t>(segment); });
  }
  return plan;
}

// Throws std::invalid_argument naming the index and the value.
inline void check_tree(const Integers& lengths, const Integers& parents) {
  if (lengths.size() != parents.size()) {
    throw std::invalid_argument("parents must have as many entries as lengths, " + std::to_string(lengths.size()) +
                                ", got " + std::to_string(parents.size()));
  }
  for (size_t i = 0; i < lengths.size(); ++i) {
    const std::string index = "[" + std::to_string(i) + "]";
    if (lengths[i] < 0) {
      throw std::invalid_argument("lengths" + index + " must not be negative, got " + std::to_string(lengths[i]));
    }
    if (parents[i] < -1 || parents[i] >= static_cast<int64_t>(i)) {
      throw std::invalid_argument("parents" + index + " must be -1 or an earlier segment, got " +
                                  std::to_string(parents[i]));
    }
  }
}

// Of each packed token, the position in its own sequence.
inline Integers positions(const Integers& lengths, const Integers& parents) {
  check_tree(lengths, parents);
  Integers ends, out;
  for (size_t i = 0; i < lengths.size(); ++i) {
    const int64_t start = parents[i] < 0 ? 0 : ends[parents[i]];
    ends.push_back(start + lengths[i]);
    for (int64_t position = start; position < ends[i]; ++position) {
      out.push_back(position);
    }
  }
  return out;
}

// In CSR form: segments[offsets[i] .. offsets[i + 1]) lead from the root to segment i, itself included.
struct Ancestors {
  Integers offsets, segments;
};

inline Ancestors ancestors(const Integers& lengths, const Integers& parents) {
  check_tree(lengths, parents);
  Ancestors out{{0}, {}};
  for (size_t i = 0; i < parents.size(); ++i) {
    if (parents[i] >= 0) {
      for (int64_t k = out.offsets[parents[i]]; k < out.offsets[parents[i] + 1]; ++k) {
        out.segments.push_back(out.segments[k]);
      }
    }
    out.segments.push_back(static_cast<int64_t>(i));
    out.offsets.push_back(static_cast<int64_t>(out.segments.size()));
  }
  return out;
}

// Rows of three: segment, first token within it, tokens in the tile. No tile crosses a segment.
inline Integers tile_table(const Integers& lengths, const Integers& parents, int64_t query_tile) {
  check_tree(lengths, parents);
  if (query_tile < 1) {
    throw std::invalid_argument("query_tile must be positive, got " + std::to_string(query_tile));
  }
  Integers out;
  for (size_t i = 0; i < lengths.size(); ++i) {
    for (int64_t start = 0; start < lengths[i]; start += query_tile) {
      out.insert(out.end(), {static_cast<int64_t>(i), start, std::min(query_tile, lengths[i] - start)});
    }
  }
  return out;
}

}  // namespace sdft
