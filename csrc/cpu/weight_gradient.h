// The gradient of a convolution's weight over a few samples, in registers along the flattened plane.
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
    A lanes[kLanes<A>];  // through memory: taking lanes out of a register one by one is slow
    store(lanes, reduced);
    for (int i = 0; i < kChunk; ++i) sums[kBegin + i] = lanes[i * kLanes<A> / kChunk];
    reduce_all<A, kCount, kBegin + kChunk>(v, sums);
  }
}

// Planes of a few samples, `next` values from each sample's to the next one's.
template <class A>
struct SamplePlanes {
  PlaneRow<A> first;
  int64_t next;
};

// What a weight's gradient is made from: dweight[o, i, dy, dx] += sum over samples and p of dc(o)[p] *
// in(i)[p + dy * pitch + dx], p below length. Up to the next whole vector dc is zero and `in` is finite.
template <class A>
struct WeightGradient {
  SamplePlanes<A> dc, in;
  int64_t samples, outputs, inputs, length, pitch;
  A* dweight;  // (outputs, inputs, taps)
};

// kOutputs x kInputs pairs of planes, in registers: the taps of kRows rows of the kernel, `row` the first.
template <class A, int kTaps, int kRows, int kOutputs, int kInputs>
inline void weight_tile(const WeightGradient<A>& g, int64_t o, int64_t i, int row) {
  constexpr int kSide = kTaps == 9 ? 3 : 1, kHere = kRows * kSide, kCount = kOutputs * kInputs * kHere;
  Vec<A> acc[kCount] = {};
  for (int64_t n = 0; n < g.samples; ++n) {
    const A* dc = g.dc.first(o) + n * g.dc.next;
    const A* in = g.in.first(i) + n * g.in.next + row * g.pitch;
    for (int64_t p = 0; p < g.length; p += kLanes<A>) {
      Vec<A> d[kOutputs];
#pragma GCC unroll 4
      for (int a = 0; a < kOutputs; ++a) d[a] = load(dc + a * g.dc.first.stride + p);
#pragma GCC unroll 4
      for (int b = 0; b < kInputs; ++b) {
#pragma GCC unroll 9
        for (int t = 0; t < kHere; ++t) {
          const Vec<A> x = load(in + b * g.in.first.stride + p + t / kSide * g.pitch + t % kSide);
#pragma GCC unroll 4
          for (int a = 0; a < kOutputs; ++a) acc[(a * kInputs + b) * kHere + t] += d[a] * x;
        }
      }
    }
  }
  A sums[kCount];
  reduce_all<A, kCount>(acc, sums);
  for (int a = 0; a < kOutputs; ++a) {
    for (int b = 0; b < kInputs; ++b) {
      A* to = g.dweight + ((o + a) * g.inputs + i + b) * kTaps + row * kSide;
      for (int t = 0; t < kHere; ++t) to[t] += sums[(a * kInputs + b) * kHere + t];
    }
  }
}

// kOutputs planes of dc against all of `in`.
template <class A, int kTaps, int kOutputs>
inline void weight_rows(const WeightGradient<A>& g, int64_t o) {
  int64_t i = 0;
  if constexpr (kTaps == 1) {
    for (; i + 4 <= g.inputs; i += 4) weight_tile<A, 1, 1, kOutputs, 4>(g, o, i, 0);
    for (; i < g.inputs; ++i) weight_tile<A, 1, 1, kOutputs, 1>(g, o, i, 0);
  } else if constexpr (kOutputs > 1) {
    // By rows of the kernel: 6 loads of `in` serve kOutputs times as many products.
    for (; i + 2 <= g.inputs; i += 2) {
      for (int row = 0; row < 3; ++row) weight_tile<A, 9, 1, kOutputs, 2>(g, o, i, row);
    }
    for (; i < g.inputs; ++i) {
      for (int a = 0; a < kOutputs; ++a) weight_tile<A, 9, 3, 1, 1>(g, o + a, i, 0);
    }
  } else {
    for (; i < g.inputs; ++i) weight_tile<A, 9, 3, 1, 1>(g, o, i, 0);
  }
}

template <class A, int kTaps>
inline void weight_gradient(const WeightGradient<A>& g) {
  // Sums take half the registers (4 x 4 or 2 x 4 pairs of planes), or three quarters (4 x 2 or 2 x 2 pairs by
  // three taps).
  constexpr int kOutputs = kRegisters / 8;
  int64_t o = 0;
  for (; o + kOutputs <= g.outputs; o += kOutputs) weight_rows<A, kTaps, kOutputs>(g, o);
  for (; o < g.outputs; ++o) weight_rows<A, kTaps, 1>(g, o);
}

}  // namespace mod_kernels
