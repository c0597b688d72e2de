#pragma once

#include <cstdint>
#include <memory>

namespace sdft {

// Uninitialised floats on a cache line's boundary.
class Scratch {
 public:
  explicit Scratch(int64_t floats) : lines_(new Line[static_cast<std::size_t>((floats + 15) / 16)]) {}
  float* data() const { return lines_[0].values; }

 private:
  struct alignas(64) Line {
    float values[16];
  };
  std::unique_ptr<Line[]> lines_;
};

}  // namespace sdft
