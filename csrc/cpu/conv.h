// Direct convolution of a few planes, stride 1, vectorised along the flattened plane.
#pragma once

#include <cstdint>

#include "storage.h"

namespace mod_kernels {

// A plane is addressed flat, so that short rows (7x7) fill the vectors as long ones do. For a 3x3 it is
// padded: rows of `pitch` = W + 2, a row of zeros above and below; output position p = row * pitch + column
// is the sum over taps of in[p + dy * pitch + dx], and the last two columns of each row come out as garbage.
struct ConvShape {
  int64_t inputs = 0, outputs = 0;
  int64_t length = 0;  // flat output positions; loads and stores run on to the next multiple of kLanes<A>
  int64_t pitch = 0;   // row pitch of the padded planes (3x3 only)
};

// kOutputs output planes by kVectors vectors, in registers. emit(o, p, v) takes each finished vector.
template <class A, int kTaps, int kOutputs, int kVectors, class In, class Emit>
inline void conv_tile(const ConvShape& shape, const In& in, const A* weight, const A* bias, int64_t o,
                      int64_t p, const Emit& emit) {
  constexpr int kSide = kTaps == 9 ? 3 : 1;
  const int64_t stride_o = shape.inputs * kTaps;
  const A* w = weight + o * stride_o;
  Vec<A> acc[kOutputs][kVectors];
  for (int j = 0; j < kOutputs; ++j) {
    for (int v = 0; v < kVectors; ++v) acc[j][v] = splat(bias[o + j]);
  }
  for (int64_t i = 0; i < shape.inputs; ++i, w += kTaps) {
    const auto* plane = in(i) + p;
#pragma GCC unroll 3
    for (int dy = 0; dy < kSide; ++dy) {
#pragma GCC unroll 3
      for (int dx = 0; dx < kSide; ++dx) {
        Vec<A> x[kVectors];
        for (int v = 0; v < kVectors; ++v) x[v] = load(plane + dy * shape.pitch + dx + v * kLanes<A>);
        for (int j = 0; j < kOutputs; ++j) {
          const Vec<A> tap = splat(w[j * stride_o + dy * kSide + dx]);
          for (int v = 0; v < kVectors; ++v) acc[j][v] += tap * x[v];
        }
      }
    }
  }
  for (int j = 0; j < kOutputs; ++j) {
    for (int v = 0; v < kVectors; ++v) emit(o + j, p + v * kLanes<A>, acc[j][v]);
  }
}

template <class A, int kTaps, int kOutputs, class In, class Emit>
inline void conv_outputs(const ConvShape& shape, const In& in, const A* weight, const A* bias, int64_t o,
                         const Emit& emit) {
  // Eight sums (sixteen with 32 registers) in flight cover the latency of a multiply-add.
  constexpr int kVectors = kRegisters / 2 / kOutputs;
  int64_t p = 0;
  for (; p + (kVectors - 1) * kLanes<A> < shape.length; p += kVectors * kLanes<A>) {
    conv_tile<A, kTaps, kOutputs, kVectors>(shape, in, weight, bias, o, p, emit);
  }
  for (; p < shape.length; p += kLanes<A>) {
    conv_tile<A, kTaps, kOutputs, 1>(shape, in, weight, bias, o, p, emit);
  }
}

// in(i) is input plane i, of A or of a type that widens to it; emit(o, p, v) takes lanes p to
// p + kLanes<A> - 1 of output plane o.
template <class A, int kTaps, class In, class Emit>
inline void conv(const ConvShape& shape, const In& in, const A* weight, const A* bias, const Emit& emit) {
  int64_t o = 0;
  for (; o + 4 <= shape.outputs; o += 4) conv_outputs<A, kTaps, 4>(shape, in, weight, bias, o, emit);
  if (shape.outputs - o >= 2) {
    conv_outputs<A, kTaps, 2>(shape, in, weight, bias, o, emit);
    o += 2;
  }
  if (o < shape.outputs) conv_outputs<A, kTaps, 1>(shape, in, weight, bias, o, emit);
}

}  // namespace mod_kernels
