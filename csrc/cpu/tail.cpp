#include "tail.h"

#include <algorithm>
#include <cstring>

#include "conv.h"
#include "storage.h"

namespace mod_kernels {
namespace {

template <class A>
struct Planes {
  A* data;
  int64_t stride;
  A* operator()(int64_t i) const { return data + i * stride; }
};

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
  int64_t pitch = w + 2;
  int64_t padded_length = (h + 2) * pitch;
  int64_t padded_stride = whole_vectors(padded_length + kSlack);
  // Positions of the flat plane that the gathered channels, and the result, are held of at a time.
  int64_t band = std::min(whole_vectors(hw), std::max<int64_t>(64, whole_vectors(kBandElements / block.k)));

  static int64_t whole_vectors(int64_t length) { return (length + kLanes<A> - 1) / kLanes<A> * kLanes<A>; }

  int64_t scratch_size() const {
    if (block.kind == BlockKind::kBasic) return 2 * block.k * padded_stride;
    return block.k * band + 2 * block.m * padded_stride + (block.m + 2) * whole_vectors(block.k);
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
  void close_up(A* plane) const {
    for (int64_t r = 1; r < h; ++r) std::memmove(plane + r * w, plane + r * pitch, w * sizeof(A));
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

  // x[target(j), p .. p + lanes - 1] += scores[j] * v, NCHW.
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

  // x[target(j), p .. p + count - 1] += scores[j] * z[j], channels_last.
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

  void bottleneck(A* memory) const {
    const int64_t k = block.k, m = block.m;
    const Planes<A> channels{memory, band};  // a band of the gathered ones, later of the result
    const Planes<A> inner{memory + k * band,
                          padded_stride};             // after the first 1x1; later after the 3x3, dense
    const Planes<A> padded{inner(m), padded_stride};  // the same with its halo

    const auto narrow_band = [&](int64_t p, int64_t count, const auto& in) {
      conv<A, 1>({k, m, count}, in, block.weight[0], block.bias[0],
                 [&](int64_t o, int64_t i, Vec<A> v) { store(padded(o) + p + i, relu<A>(v)); });
    };
    if (!x.channels_last() && hw % kLanes<A> == 0) {
      // Whole vectors all the way: read the channels where they lie.
      narrow_band(0, hw, [&](int64_t i) { return sample + index[i] * hw; });
    } else {
      // From the end: that is what pooling read last, and what the cache still holds.
      for (int64_t p = (hw - 1) / band * band; p >= 0; p -= band) {
        const int64_t count = std::min(band, hw - p);
        gather(p, count, channels);
        narrow_band(p, count, channels);
      }
    }
    for (int64_t i = 0; i < m; ++i) spread(padded(i));
    conv<A, 9>({m, m, h * pitch, pitch}, padded, block.weight[1], block.bias[1],
               [&](int64_t o, int64_t p, Vec<A> v) { store(inner(o) + p, relu<A>(v)); });
    for (int64_t i = 0; i < m; ++i) close_up(inner(i));
    if (!x.channels_last()) {
      conv<A, 1>({m, k, hw}, inner, block.weight[2], block.bias[2],
                 [&](int64_t o, int64_t p, Vec<A> v) { add_vector(o, p, v); });
      return;
    }
    if (block.position != Position::kOriginal) return widen_pixels(inner, padded(m));
    for (int64_t p = 0; p < hw; p += band) {
      const int64_t count = std::min(band, hw - p);
      conv<A, 1>({m, k, count}, Planes<A>{inner(0) + p, padded_stride}, block.weight[2], block.bias[2],
                 [&](int64_t o, int64_t i, Vec<A> v) { store(channels(o) + i, v); });
      add_pixels(p, count, channels);
    }
  }

  // The last 1x1 and the addition, channels_last: a pixel's k targets lie side by side, so the vectors run
  // along the output channels. table holds the weights, transposed, and behind them the biases and the
  // scores.
  void widen_pixels(Planes<A> inner, A* table) const {
    const int64_t k = block.k, m = block.m, row = whole_vectors(k);
    A *bias = table + m * row, *scale = bias + row;
    std::fill(table, scale + row, A{0});
    for (int64_t j = 0; j < k; ++j) {
      for (int64_t i = 0; i < m; ++i) table[i * row + j] = block.weight[2][j * m + i];
    }
    std::copy_n(block.bias[2], k, bias);
    std::copy_n(scores, k, scale);
    T* pixel = target(0);
    for (int64_t p = 0; p < hw; ++p, pixel += x.c) {
      for (int64_t j = 0; j < k; j += kLanes<A>) {
        Vec<A> sum = load(bias + j);
        for (int64_t i = 0; i < m; ++i) sum += load(table + i * row + j) * splat(inner(i)[p]);
        if (block.final_relu) sum = relu<A>(sum);
        if (k - j >= kLanes<A>) {
          store(pixel + j, load(pixel + j) + load(scale + j) * sum);
        } else {
          store_first(pixel + j, load_first(pixel + j, k - j) + load(scale + j) * sum, k - j);
        }
      }
    }
  }

  void basic(A* memory) const {
    const int64_t k = block.k;
    const Planes<A> first{memory, padded_stride};  // the gathered channels, padded; at the end the result
    const Planes<A> second{first(k), padded_stride};

    if (x.channels_last()) {
      for (int64_t r = 0; r < h; ++r) {
        gather(r * w, w, {first(0) + (r + 1) * pitch + 1, padded_stride});
      }
      for (int64_t i = 0; i < k; ++i) clear_halo(first(i));
    } else {
      for (int64_t i = 0; i < k; ++i) pad(sample + index[i] * hw, first(i));
    }
    const ConvShape shape{k, k, h * pitch, pitch};
    // Written one row down and one column right, the output lies as the next convolution's padded input, and
    // its garbage columns fall on the halo.
    conv<A, 9>(shape, first, block.weight[0], block.bias[0],
               [&](int64_t o, int64_t p, Vec<A> v) { store(second(o) + pitch + 1 + p, relu<A>(v)); });
    for (int64_t i = 0; i < k; ++i) clear_halo(second(i));
    conv<A, 9>(shape, second, block.weight[1], block.bias[1],
               [&](int64_t o, int64_t p, Vec<A> v) { store(first(o) + p, v); });
    for (int64_t i = 0; i < k; ++i) close_up(first(i));
    if (x.channels_last()) return add_pixels(0, hw, first);
    for (int64_t j = 0; j < k; ++j) {
      for (int64_t p = 0; p < hw; p += kLanes<A>) add_vector(j, p, load(first(j) + p));
    }
  }
};

}  // namespace

template <class T>
int64_t tail_scratch(const FeatureMap<T>& x, const ConvBlock<Accumulate<T>>& block) {
  return Tail<T>{x, block}.scratch_size();
}

template <class T>
void tail_sample(const FeatureMap<T>& x, int64_t sample, const ConvBlock<Accumulate<T>>& block,
                 const Accumulate<T>* scores, const int64_t* index, Accumulate<T>* scratch) {
  const Tail<T> tail{x, block, x.sample(sample), scores, index};
  if (block.kind == BlockKind::kBottleneck) {
    tail.bottleneck(scratch);
  } else {
    tail.basic(scratch);
  }
}

#define MOD_KERNELS_TAIL(T)                                                                    \
  template int64_t tail_scratch<T>(const FeatureMap<T>&, const ConvBlock<Accumulate<T>>&);     \
  template void tail_sample<T>(const FeatureMap<T>&, int64_t, const ConvBlock<Accumulate<T>>&, \
                               const Accumulate<T>*, const int64_t*, Accumulate<T>*);
MOD_KERNELS_FOR_EACH_DTYPE(MOD_KERNELS_TAIL)

}  // namespace mod_kernels
