// The gradient of a convolution's weight over one sample, in registers along the flattened plane.
#pragma once

#include <cstdint>

#include "plane_loops.h"

namespace mod_kernels {

// The sums of the lanes of v[kBegin ...] into sums, as many vectors at a time as one reduction takes.
template <class A, int kCount, int kBegin = 0>
inline void reduce_all(const Vec<A> (&v)[kCount], A (&sums)[kCount]) {
  if constexpr (kBegin < kCount) {
    constexpr int kRest = kCount - kBegin < kLanes<A> ? kCount - kBegin : kLanes<A>;
    constexpr int kChunk = kRest >= 16 ? 16 : kRest >= 8 ? 8 : kRest >= 4 ? 4 : kRest >= 2 ? 2 : 1;
    Vec<A> chunk[kChunk];
#pragma GCC unroll 16
    for (int i = 0; i < kChunk; ++i) chunk[i] = v[kBegin + i];
    const Vec<A> reduced = reduce_lanes<A>(chunk);
    for (int i = 0; i < kChunk; ++i) sums[kBegin + i] = reduced[i * kLanes<A> / kChunk];
    reduce_all<A, kCount, kBegin + kChunk>(v, sums);
  }
}

// What a weight's gradient is made from: dweight[o, i, dy, dx] += sum over p of dc(o)[p] * in(i)[p + dy *
// pitch + dx], p below length. Up to the next whole vector dc is zero and `in` is finite.
template <class A>
struct WeightGradient {
  PlaneRow<A> dc, in;
  int64_t outputs, inputs, length, pitch;
  A* dweight;  // (outputs, inputs, taps)
};

template <class A, int kTaps, int kOutputs, int kInputs>
inline void weight_tile(const WeightGradient<A>& g, int64_t o, int64_t i) {
  constexpr int kSide = kTaps == 9 ? 3 : 1, kCount = kOutputs * kInputs * kTaps;
  Vec<A> acc[kCount] = {};
  for (int64_t p = 0; p < g.length; p += kLanes<A>) {
    Vec<A> d[kOutputs];
#pragma GCC unroll 4
    for (int a = 0; a < kOutputs; ++a) d[a] = load(g.dc(o + a) + p);
#pragma GCC unroll 4
    for (int b = 0; b < kInputs; ++b) {
#pragma GCC unroll 9
      for (int t = 0; t < kTaps; ++t) {
        const Vec<A> x = load(g.in(i + b) + p + t / kSide * g.pitch + t % kSide);
#pragma GCC unroll 4
        for (int a = 0; a < kOutputs; ++a) acc[(a * kInputs + b) * kTaps + t] += d[a] * x;
      }
    }
  }
  A sums[kCount];
  reduce_all<A, kCount>(acc, sums);
  for (int a = 0; a < kOutputs; ++a) {
    A* to = g.dweight + ((o + a) * g.inputs + i) * kTaps;
    for (int j = 0; j < kInputs * kTaps; ++j) to[j] += sums[a * kInputs * kTaps + j];
  }
}

template <class A, int kTaps, int kOutputs, int kInputs>
inline void weight_rows(const WeightGradient<A>& g, int64_t o) {
  int64_t i = 0;
  for (; i + kInputs <= g.inputs; i += kInputs) weight_tile<A, kTaps, kOutputs, kInputs>(g, o, i);
  for (; i < g.inputs; ++i) weight_tile<A, kTaps, kOutputs, 1>(g, o, i);
}

template <class A, int kTaps>
inline void weight_gradient(const WeightGradient<A>& g) {
  // Half the registers hold sums and more do not pay: 4 x 4 (2 x 4) pairs of planes, 2 x 9 (1 x 9) taps.
  constexpr int kInputs = kTaps == 9 ? 1 : 4;
  constexpr int kOutputs = kTaps == 9 ? kRegisters / 16 : kRegisters / 8;
  int64_t o = 0;
  for (; o + kOutputs <= g.outputs; o += kOutputs) weight_rows<A, kTaps, kOutputs, kInputs>(g, o);
  for (; o < g.outputs; ++o) weight_rows<A, kTaps, 1, kInputs>(g, o);
}

}  // namespace mod_kernels
