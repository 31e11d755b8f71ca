// The tails of blocks whose 3x3 convolutions go over all channels: ResNet's two, and VGG's.
#pragma once

#include "tail_parts.h"

namespace mod_kernels {
namespace {

template <class T>
int64_t bottleneck_scratch(const Tail<T>& t) {
  return t.block.k * t.band + 2 * t.block.m * t.padded_stride + t.last_pointwise_scratch();
}

template <class T>
void bottleneck(const Tail<T>& t, Accumulate<T>* memory) {
  using A = Accumulate<T>;
  const ConvBlock<A>& block = t.block;
  const int64_t m = block.m;
  const Planes<A> inner{memory + block.k * t.band, t.padded_stride};  // after the 3x3, dense
  const Planes<A> padded{inner(m), t.padded_stride};                  // after the first 1x1

  t.first_pointwise(memory, padded, [](Vec<A> v) { return relu<A>(v); });
  for (int64_t i = 0; i < m; ++i) t.spread(padded(i));
  conv<A, 9>({m, m, t.h * t.pitch, t.pitch}, padded, block.weight[1], block.bias[1],
             [&](int64_t o, int64_t p, Vec<A> v) { store(inner(o) + p, relu<A>(v)); });
  for (int64_t i = 0; i < m; ++i) t.close_up(inner(i), t.h);
  t.last_pointwise(0, t.hw, inner, padded(m));
}

template <class T>
int64_t basic_scratch(const Tail<T>& t) {
  return 2 * t.block.k * t.padded_stride;
}

template <class T>
void basic(const Tail<T>& t, Accumulate<T>* memory) {
  using A = Accumulate<T>;
  const ConvBlock<A>& block = t.block;
  const int64_t k = block.k;
  const Planes<A> first{memory, t.padded_stride};  // the gathered channels, padded; at the end the result
  const Planes<A> second{first(k), t.padded_stride};

  t.gather_padded(first);
  const ConvShape shape{k, k, t.h * t.pitch, t.pitch};
  // Written one row down and one column right, the output lies as the next convolution's padded input, and
  // its garbage columns fall on the halo.
  conv<A, 9>(shape, first, block.weight[0], block.bias[0],
             [&](int64_t o, int64_t p, Vec<A> v) { store(second(o) + t.pitch + 1 + p, relu<A>(v)); });
  for (int64_t i = 0; i < k; ++i) t.clear_halo(second(i));
  conv<A, 9>(shape, second, block.weight[1], block.bias[1],
             [&](int64_t o, int64_t p, Vec<A> v) { store(first(o) + p, v); });
  for (int64_t i = 0; i < k; ++i) t.close_up(first(i), t.h);
  t.add_planes(0, t.hw, first);
}

// The result of a single 3x3 is held in bands of rows: planes of 224x224 would not stay in the cache.
template <class T>
struct RowBands {
  int64_t rows, stride;
  explicit RowBands(const Tail<T>& t)
      : rows(std::clamp<int64_t>(t.kBandElements / (t.block.k * t.pitch), 1, t.h)),
        stride(t.whole_vectors(rows * t.pitch)) {}
};

template <class T>
int64_t single_conv_scratch(const Tail<T>& t) {
  return t.block.k * (t.padded_stride + RowBands<T>(t).stride);
}

template <class T>
void single_conv(const Tail<T>& t, Accumulate<T>* memory) {
  using A = Accumulate<T>;
  const int64_t k = t.block.k;
  const RowBands<T> bands(t);
  const Planes<A> channels{memory, t.padded_stride};
  const Planes<A> result{channels(k), bands.stride};

  t.gather_padded(channels);
  for (int64_t r = 0; r < t.h; r += bands.rows) {
    const int64_t rows = std::min(bands.rows, t.h - r);
    const Planes<A> from{channels(0) + r * t.pitch, t.padded_stride};
    conv<A, 9>({k, k, rows * t.pitch, t.pitch}, from, t.block.weight[0], t.block.bias[0],
               [&](int64_t o, int64_t p, Vec<A> v) { store(result(o) + p, v); });
    for (int64_t i = 0; i < k; ++i) t.close_up(result(i), rows);
    t.add_planes(r * t.w, rows * t.w, result);
  }
}

}  // namespace
}  // namespace mod_kernels
