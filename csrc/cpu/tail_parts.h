// What the tails of all kinds of conv block share: planes in scratch, the gathered channels, the addition.
//
// These headers are parts of tail.cpp, and unnamed: what only it can call the compiler inlines. With external
// linkage the tail of a bottleneck at 256x56x56 took a tenth longer.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "conv.h"
#include "storage.h"
#include "tail.h"

namespace mod_kernels {
namespace {

template <class A>
struct Planes {
  A* data;
  int64_t stride;
  A* operator()(int64_t i) const { return data + i * stride; }
};

// One sample's tail: what it reads and writes, how its planes lie in scratch, and the steps that kinds share.
template <class T>
struct Tail {
  using A = Accumulate<T>;
  // Elements a plane is followed by, so that whole vectors can be loaded and stored at its end.
  static constexpr int64_t kSlack = 2 * kLanes<A>;
  // Of a sample up to this size the second-level cache still holds what pooling read.
  static constexpr int64_t kNearBytes = 1 << 20;
  // Pixels that the lines of a larger one are asked for ahead.
  static constexpr int64_t kAhead = 8;
  // What a band of k channels may take of the first-level cache.
  static constexpr int64_t kBandElements = 4096;

  const FeatureMap<T>& x;
  const ConvBlock<A>& block;
  T* sample = nullptr;
  const A* scores = nullptr;
  const int64_t* index = nullptr;

  int64_t h = x.h, w = x.w, hw = x.hw();
  // Planes are dense, or padded: a 3x3's, as conv.h wants them.
  int64_t dense_stride = whole_vectors(hw + kSlack);
  int64_t pitch = w + 2;
  int64_t padded_length = (h + 2) * pitch;
  int64_t padded_stride = whole_vectors(padded_length + kSlack);
  // Positions of the flat plane that the gathered channels, and the result, are held of at a time.
  int64_t band = std::min(whole_vectors(hw), band_of(block.k));

  static int64_t whole_vectors(int64_t length) { return (length + kLanes<A> - 1) / kLanes<A> * kLanes<A>; }
  static int64_t band_of(int64_t channels) {
    return std::max<int64_t>(64, whole_vectors(kBandElements / channels));
  }

  T* target(int64_t j) const {
    return sample + target_channel(block.position, j, block.k, x.c, index) * x.stride_c();
  }

  // Zeros around the rows of a padded plane, and behind it.
  void clear_halo(A* plane) const {
    std::memset(plane, 0, (pitch + 1) * sizeof(A));
    for (int64_t r = 1; r <= h; ++r) plane[r * pitch + w + 1] = plane[(r + 1) * pitch] = 0;
    std::memset(plane + (h + 1) * pitch, 0, (padded_stride - (h + 1) * pitch) * sizeof(A));
  }

  // Dense rows into a padded plane.
  void pad(const T* from, A* plane) const {
    for (int64_t r = 0; r < h; ++r) widen_row(from + r * w, w, plane + (r + 1) * pitch + 1);
    clear_halo(plane);
  }

  // Dense rows to padded ones within the plane, the last first; then the halo.
  void spread(A* plane) const {
    for (int64_t r = h - 1; r >= 0; --r) {
      std::memmove(plane + (r + 1) * pitch + 1, plane + r * w, w * sizeof(A));
    }
    clear_halo(plane);
  }

  // Rows of `pitch` to dense rows, in place.
  void close_up(A* plane, int64_t rows) const {
    for (int64_t r = 1; r < rows; ++r) std::memmove(plane + r * w, plane + r * pitch, w * sizeof(A));
  }

  static void widen_row(const T* from, int64_t count, A* to) {
    if constexpr (std::is_same_v<T, A>) {
      std::memcpy(to, from, count * sizeof(A));
    } else {
      int64_t i = 0;
      for (; i + kLanes<A> <= count; i += kLanes<A>) store(to + i, load(from + i));
      if (i < count) store_first(to + i, load_first(from + i, count - i), count - i);
    }
  }

  // Positions p to p + count - 1 of the selected channels, and zeros up to a whole vector.
  void gather(int64_t p, int64_t count, Planes<A> to) const {
    if (!x.channels_last()) {
      for (int64_t j = 0; j < block.k; ++j) widen_row(sample + index[j] * hw + p, count, to(j));
    } else if (x.sample_size() * static_cast<int64_t>(sizeof(T)) <= kNearBytes) {
      for (int64_t i = 0; i < count; ++i) {
        const T* pixel = sample + (p + i) * x.c;
        for (int64_t j = 0; j < block.k; ++j) to(j)[i] = widen(pixel[index[j]]);
      }
    } else {
      gather_far(p, count, to);
    }
    for (int64_t j = 0; j < block.k; ++j) std::fill(to(j) + count, to(j) + whole_vectors(count), A{0});
  }

  // A line of memory for nearly every element: they are asked for some pixels ahead.
  void gather_far(int64_t p, int64_t count, Planes<A> to) const {
    for (int64_t i = 0; i < count; i += kAhead) {
      const int64_t here = std::min(kAhead, count - i), next = std::min(kAhead, hw - (p + i + here));
      for (int64_t j = 0; j < block.k; ++j) {
        const T* from = sample + (p + i) * x.c + index[j];
        for (int64_t l = 0; l < next; ++l) __builtin_prefetch(from + (here + l) * x.c);
        for (int64_t l = 0; l < here; ++l) to(j)[i + l] = widen(from[l * x.c]);
      }
    }
  }

  // The selected channels, each in a padded plane.
  void gather_padded(Planes<A> to) const {
    if (!x.channels_last()) {
      for (int64_t i = 0; i < block.k; ++i) pad(sample + index[i] * hw, to(i));
      return;
    }
    for (int64_t r = 0; r < h; ++r) gather(r * w, w, {to(0) + (r + 1) * pitch + 1, to.stride});
    for (int64_t i = 0; i < block.k; ++i) clear_halo(to(i));
  }

  // The block's first convolution where it is a 1x1 of k channels to m: then(v) into dense planes. memory
  // holds a band of k channels.
  template <class Then>
  void first_pointwise(A* memory, Planes<A> to, const Then& then) const {
    const Planes<A> channels{memory, band};
    const auto convolve = [&](int64_t p, int64_t count, const auto& in) {
      conv<A, 1>({block.k, block.m, count}, in, block.weight[0], block.bias[0],
                 [&](int64_t o, int64_t i, Vec<A> v) { store(to(o) + p + i, then(v)); });
    };
    if (!x.channels_last() && hw % kLanes<A> == 0) {
      // Whole vectors all the way: read the channels where they lie.
      return convolve(0, hw, [&](int64_t i) { return sample + index[i] * hw; });
    }
    // From the end: that is what pooling read last, and what the cache still holds.
    for (int64_t p = (hw - 1) / band * band; p >= 0; p -= band) {
      const int64_t count = std::min(band, hw - p);
      gather(p, count, channels);
      convolve(p, count, channels);
    }
  }

  // The block's last convolution where it is a 1x1 of m channels to k, and the addition: positions p to
  // p + count - 1, held by inner from its begin. p is a whole number of vectors, memory of
  // last_pointwise_scratch().
  void last_pointwise(int64_t p, int64_t count, Planes<A> inner, A* memory) const {
    if (!x.channels_last()) {
      return conv<A, 1>({block.m, block.k, count}, inner, block.weight[2], block.bias[2],
                        [&](int64_t o, int64_t i, Vec<A> v) { add_vector(o, p + i, v); });
    }
    if (along_channels()) return last_pointwise_along_channels(p, count, inner, memory);
    const Planes<A> result{memory, band};
    for (int64_t begin = 0; begin < count; begin += band) {
      const int64_t length = std::min(band, count - begin);
      conv<A, 1>({block.m, block.k, length}, Planes<A>{inner(0) + begin, inner.stride}, block.weight[2],
                 block.bias[2], [&](int64_t o, int64_t i, Vec<A> v) { store(result(o) + i, v); });
      add_pixels(p + begin, length, result);
    }
  }

  int64_t last_pointwise_scratch() const {
    if (!x.channels_last()) return 0;
    return along_channels() ? (block.m + 2) * whole_vectors(block.k) : block.k * band;
  }

  // channels_last: a pixel's k targets lie side by side. Of a few of them most of a vector would lie idle.
  bool along_channels() const { return block.position != Position::kOriginal && 4 * block.k >= kLanes<A>; }

  // Vectors run along the output channels. table holds the weights, transposed, and behind them the biases
  // and the scores.
  void last_pointwise_along_channels(int64_t p, int64_t count, Planes<A> inner, A* table) const {
    const int64_t k = block.k, m = block.m, row = whole_vectors(k);
    A *bias = table + m * row, *scale = bias + row;
    std::fill(table, scale + row, A{0});
    for (int64_t j = 0; j < k; ++j) {
      for (int64_t i = 0; i < m; ++i) table[i * row + j] = block.weight[2][j * m + i];
    }
    std::copy_n(block.bias[2], k, bias);
    std::copy_n(scores, k, scale);
    T* pixel = target(0) + p * x.c;
    for (int64_t q = 0; q < count; ++q, pixel += x.c) {
      for (int64_t j = 0; j < k; j += kLanes<A>) {
        Vec<A> sum = load(bias + j);
        for (int64_t i = 0; i < m; ++i) sum += load(table + i * row + j) * splat(inner(i)[q]);
        if (block.final_relu) sum = relu<A>(sum);
        if (k - j >= kLanes<A>) {
          store(pixel + j, load(pixel + j) + load(scale + j) * sum);
        } else {
          store_first(pixel + j, load_first(pixel + j, k - j) + load(scale + j) * sum, k - j);
        }
      }
    }
  }

  // x[target(j), p .. p + lanes - 1] += scores[j] * v, NCHW, as far as the plane goes.
  void add_vector(int64_t j, int64_t p, Vec<A> v) const {
    T* to = target(j) + p;
    if (block.final_relu) v = relu<A>(v);
    const int64_t rest = hw - p;
    if (rest >= kLanes<A>) {
      store(to, load(to) + splat(scores[j]) * v);
    } else {
      store_first(to, load_first(to, rest) + splat(scores[j]) * v, rest);
    }
  }

  // x[target(j), p .. p + count - 1] += scores[j] * z[j].
  void add_planes(int64_t p, int64_t count, Planes<A> z) const {
    if (x.channels_last()) return add_pixels(p, count, z);
    const bool final_relu = block.final_relu;
    for (int64_t j = 0; j < block.k; ++j) {
      T* to = target(j) + p;
      const A* from = z(j);
      const Vec<A> scale = splat(scores[j]);
      const auto addend = [&](int64_t i) {
        const Vec<A> v = load(from + i);
        return scale * (final_relu ? relu<A>(v) : v);
      };
      int64_t i = 0;
      for (; i + kLanes<A> <= count; i += kLanes<A>) store(to + i, load(to + i) + addend(i));
      if (i < count) store_first(to + i, load_first(to + i, count - i) + addend(i), count - i);
    }
  }

  void add_pixels(int64_t p, int64_t count, Planes<A> z) const {
    const bool in_order = block.position != Position::kOriginal;
    T* pixel = (in_order ? target(0) : sample) + p * x.c;
    for (int64_t i = 0; i < count; ++i, pixel += x.c) {
      for (int64_t j = 0; j < block.k; ++j) {
        const A v = z(j)[i];
        T& to = pixel[in_order ? j : index[j]];
        to = narrow<T>(widen(to) + scores[j] * (block.final_relu && v < 0 ? A{0} : v));
      }
    }
  }
};

}  // namespace
}  // namespace mod_kernels
