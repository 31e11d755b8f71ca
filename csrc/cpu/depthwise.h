// Depthwise convolution of one plane, stride 1: rows of the output side by side in registers.
#pragma once

#include <algorithm>
#include <cstdint>

#include "storage.h"

namespace mod_kernels {

// A plane of h x w among zeros, as a kSide x kSide convolution reads it: rows of `pitch` = w + kSide - 1, and
// kSide / 2 rows of zeros above and below. Vectors are cut along a row, where conv.h has them run on into the
// next: with one input plane to each output it is loads that limit, and here each serves kRows rows.
template <class A, int kSide>
struct DepthwisePlane {
  static constexpr int64_t kReach = kSide / 2;
  // Rows and vectors of a tile. Seven divides the height of every plane of a network for 224x224.
  static constexpr int kRows = 7;
  static constexpr int kWide = kSide == 3 ? 2 : 1;

  int64_t h, w;
  A* data;
  int64_t pitch = w + 2 * kReach;

  // Elements that it takes: whole vectors are loaded and stored at its end.
  static int64_t elements(int64_t h, int64_t w) {
    const int64_t length = (h + 2 * kReach) * (w + 2 * kReach) + 2 * kLanes<A>;
    return (length + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
  }
  A* end() const { return data + elements(h, w); }

  void clear() const { std::fill(data, end(), A{0}); }

  // Dense rows of A, or of a type that widens to it, in place of those before. The zeros behind a row's last
  // vector fall on zeros, and on the next row before it is written.
  template <class E>
  void fill(const E* from) const {
    A* to = data + kReach * pitch + kReach;
    for (int64_t r = 0; r < h; ++r, from += w, to += pitch) {
      int64_t i = 0;
      for (; i + kLanes<A> <= w; i += kLanes<A>) store(to + i, load(from + i));
      if (i < w) store(to + i, load_first(from + i, w - i));
    }
  }

  // then(the convolution) into dense rows; out has room for two vectors behind the last one.
  template <class Then>
  void convolve(const A* weight, A bias, A* out, const Then& then) const {
    if (h < kRows) {
      for (int64_t r = 0; r < h; ++r) rows<1>(weight, bias, r, out, then);
      return;
    }
    // The last rows may be computed twice, to the same values.
    for (int64_t r = 0; r < h; r += kRows) rows<kRows>(weight, bias, std::min(r, h - kRows), out, then);
  }

 private:
  // Rows r to r + kCount - 1, the last columns first: what their vectors write beyond the row's end is the
  // begin of the next row, which is written after it.
  template <int kCount, class Then>
  void rows(const A* weight, A bias, int64_t r, A* out, const Then& then) const {
    int64_t vectors = (w + kLanes<A> - 1) / kLanes<A>;
    if (vectors % kWide == 1) tile<kCount, 1>(weight, bias, r, --vectors * kLanes<A>, out, then);
    while (vectors > 0) tile<kCount, kWide>(weight, bias, r, (vectors -= kWide) * kLanes<A>, out, then);
  }

  // kCount rows by kVectors vectors, in registers.
  template <int kCount, int kVectors, class Then>
  void tile(const A* weight, A bias, int64_t r, int64_t column, A* out, const Then& then) const {
    Vec<A> acc[kCount][kVectors];
    for (int j = 0; j < kCount; ++j) {
      for (int v = 0; v < kVectors; ++v) acc[j][v] = splat(bias);
    }
    const A* row = data + r * pitch + column;
#pragma GCC unroll 16
    for (int i = 0; i < kCount + kSide - 1; ++i, row += pitch) {
#pragma GCC unroll 7
      for (int dx = 0; dx < kSide; ++dx) {
        Vec<A> x[kVectors];
        for (int v = 0; v < kVectors; ++v) x[v] = held<A>(load(row + dx + v * kLanes<A>));
#pragma GCC unroll 8
        for (int j = 0; j < kCount; ++j) {
          const int dy = i - j;
          if (dy < 0 || dy >= kSide) continue;
          const Vec<A> tap = splat(weight[dy * kSide + dx]);
          for (int v = 0; v < kVectors; ++v) acc[j][v] += tap * x[v];
        }
      }
    }
    for (int j = 0; j < kCount; ++j) {
      for (int v = 0; v < kVectors; ++v) store(out + (r + j) * w + column + v * kLanes<A>, then(acc[j][v]));
    }
  }
};

}  // namespace mod_kernels
