#pragma once

// Tiles of shared-prefix attention, for the planner and the kernels. They depend on the head size and on nothing else,
// so that a segment's output does not depend on its neighbours. Starting values: those of FlashAttention-2 on an A100,
// to be measured again with the first kernel that uses them.
namespace sdft {

struct Tiles {
  int head_size;  // the largest that the row is for
  int query_tile;
  int key_tile;
};

constexpr Tiles TILES[] = {{64, 128, 128}, {128, 128, 64}, {256, 64, 64}};

// The row for a head size, or one of zeros where there is none.
constexpr Tiles tiles_for(int head_size) {
  for (const Tiles& tiles : TILES) {
    if (head_size <= tiles.head_size) {
      return tiles;
    }
  }
  return {0, 0, 0};
}

}  // namespace sdft
