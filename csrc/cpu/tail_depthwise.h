// The tails of blocks with a depthwise convolution: MobileNetV2's and ConvNeXt's.
#pragma once

#include <cmath>

#include "depthwise.h"
#include "gelu.h"
#include "tail_parts.h"

namespace mod_kernels {
namespace {

template <class A>
inline Vec<A> relu6(Vec<A> v) {
  v = relu<A>(v);
  return v > 6 ? splat(A{6}) : v;  // NaN > 6 is false: NaN stays
}

template <class T>
int64_t inverted_residual_scratch(const Tail<T>& t) {
  return t.block.k * t.band + t.block.m * t.dense_stride +
         DepthwisePlane<Accumulate<T>, 3>::elements(t.h, t.w) + t.last_pointwise_scratch();
}

template <class T>
void inverted_residual(const Tail<T>& t, Accumulate<T>* memory) {
  using A = Accumulate<T>;
  const ConvBlock<A>& block = t.block;
  const Planes<A> hidden{memory + block.k * t.band, t.dense_stride};
  const DepthwisePlane<A, 3> padded{t.h, t.w, hidden(block.m)};

  const auto activation = [](Vec<A> v) { return relu6<A>(v); };
  t.first_pointwise(memory, hidden, activation);
  padded.clear();
  for (int64_t i = 0; i < block.m; ++i) {
    padded.fill(hidden(i));
    padded.convolve(block.weight[1] + 9 * i, block.bias[1][i], hidden(i), activation);
  }
  t.last_pointwise(0, t.hw, hidden, padded.end());
}

// Mean 0 and variance 1 over the k channels of each of `count` pixels, and up to a whole vector of them.
template <class A>
inline void layer_norm(Planes<A> planes, int64_t k, int64_t count) {
  constexpr A kEps = A(1e-6);  // LAYER_NORM_EPS of mod_kernels/spec.py
  for (int64_t p = 0; p < count; p += kLanes<A>) {
    Vec<A> sum{}, squares{};
    for (int64_t j = 0; j < k; ++j) sum += load(planes(j) + p);
    const Vec<A> mean = sum / static_cast<A>(k);
    for (int64_t j = 0; j < k; ++j) {
      const Vec<A> centred = load(planes(j) + p) - mean;
      squares += centred * centred;
    }
    Vec<A> scale = squares / static_cast<A>(k) + kEps;
    for (int l = 0; l < kLanes<A>; ++l) scale[l] = std::sqrt(scale[l]);
    for (int64_t j = 0; j < k; ++j) store(planes(j) + p, (load(planes(j) + p) - mean) / scale);
  }
}

// Of the m hidden channels as many positions are held at a time as stay in the cache.
template <class T>
int64_t convnext_scratch(const Tail<T>& t) {
  return t.block.k * t.dense_stride + DepthwisePlane<Accumulate<T>, 7>::elements(t.h, t.w) +
         t.block.m * t.band_of(t.block.m) + t.last_pointwise_scratch();
}

template <class T>
void convnext(const Tail<T>& t, Accumulate<T>* memory) {
  using A = Accumulate<T>;
  const ConvBlock<A>& block = t.block;
  const int64_t k = block.k, m = block.m, band = t.band_of(m);
  const Planes<A> channels{memory, t.dense_stride};
  const DepthwisePlane<A, 7> padded{t.h, t.w, channels(k)};
  const Planes<A> hidden{padded.end(), band};

  const auto convolve = [&](int64_t j, const auto* plane) {
    padded.fill(plane);
    padded.convolve(block.weight[0] + 49 * j, block.bias[0][j], channels(j), [](Vec<A> v) { return v; });
  };
  padded.clear();
  if (t.x.channels_last()) {
    t.gather(0, t.hw, channels);
    for (int64_t j = 0; j < k; ++j) convolve(j, channels(j));
  } else {
    for (int64_t j = 0; j < k; ++j) convolve(j, t.sample + t.index[j] * t.hw);
  }
  for (int64_t p = 0; p < t.hw; p += band) {
    const int64_t count = std::min(band, t.hw - p);
    const Planes<A> here{channels(0) + p, t.dense_stride};
    layer_norm(here, k, count);
    conv<A, 1>({k, m, count}, here, block.weight[1], block.bias[1],
               [&](int64_t o, int64_t i, Vec<A> v) { store(hidden(o) + i, gelu<A>(v)); });
    t.last_pointwise(p, count, hidden, hidden(m));
  }
}

}  // namespace
}  // namespace mod_kernels
