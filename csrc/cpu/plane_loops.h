// Loops over planes, vector by vector, for the trained conv block: dense planes and planes with a halo.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "storage.h"

namespace mod_kernels {

// How a step of a loop reads and writes: all lanes of a vector, or the first `count` at the end of a row,
// where the others are read as zeros.
template <class A>
struct AllLanes {
  Vec<A> load(const A* p) const { return mod_kernels::load(p); }
  void store(A* p, Vec<A> v) const { mod_kernels::store(p, v); }
  Vec<A> keep(Vec<A> v) const { return v; }
};
template <class A>
struct FirstLanes {
  int64_t count;
  Vec<A> load(const A* p) const { return load_first(p, count); }
  void store(A* p, Vec<A> v) const { store_first(p, v, count); }
  Vec<A> keep(Vec<A> v) const { return (Vec<A>)((Mask<A>)v & ~last_lanes<A>(kLanes<A> - count)); }
};

// Sums that a loop keeps side by side: an addition takes as long as several steps.
inline constexpr int kSums = 2;

// step(i, lanes, which) over 0 to length - 1; which (below kSums, known to the compiler) alternates.
template <class A, class F>
inline void each_vector(int64_t length, const F& step) {
  int64_t i = 0;
  for (; i + kSums * kLanes<A> <= length; i += kSums * kLanes<A>) {
    step(i, AllLanes<A>{}, std::integral_constant<int, 0>{});
    step(i + kLanes<A>, AllLanes<A>{}, std::integral_constant<int, 1>{});
  }
  if (i + kLanes<A> <= length) {
    step(i, AllLanes<A>{}, std::integral_constant<int, 0>{});
    i += kLanes<A>;
  }
  if (i < length) step(i, FirstLanes<A>{length - i}, std::integral_constant<int, 1>{});
}

// kCount sums over a plane, by lanes until the end.
template <class A, int kCount>
struct LaneSums {
  Vec<A> lanes[kCount][kSums] = {};
  A total(int i) {
    Vec<A> one[1] = {lanes[i][0] + lanes[i][1]};
    return reduce_lanes<A>(one)[0];
  }
};

// How the planes of an h x w map lie in scratch. Dense (a 1x1 convolution): h * w values in one row. Padded
// (3x3): rows of `pitch` = w + 2 with a row of zeros above and below, as conv.h wants them. Both are followed
// by zeros for whole vectors to be read and written at their end.
template <class A>
struct PlaneShape {
  int64_t rows, width, pitch, begin, stride, length;

  PlaneShape(int64_t h, int64_t w, int taps) {
    const bool padded = taps == 9;
    rows = padded ? h : 1;
    width = padded ? w : h * w;
    pitch = padded ? w + 2 : width;
    begin = padded ? pitch + 1 : 0;  // of the first row in a plane
    length = rows * pitch;           // flat positions of a convolution's output
    const int64_t elements = padded ? (h + 2) * pitch : width;
    stride = (elements + 3 * kLanes<A> - 1) / kLanes<A> * kLanes<A>;
  }

  // Calls step as each_vector does, row by row: at `dense` in a map's plane, at `at` from a plane's `begin`.
  template <class F>
  void each(const F& step) const {
    for (int64_t r = 0; r < rows; ++r) {
      each_vector<A>(width, [&](int64_t i, auto lanes, auto which) {
        step(r * width + i, r * pitch + i, lanes, which);
      });
    }
  }
};

// Planes side by side in scratch, or in a map.
template <class A>
struct PlaneRow {
  A* data;
  int64_t stride;
  A* operator()(int64_t i) const { return data + i * stride; }
};

}  // namespace mod_kernels
