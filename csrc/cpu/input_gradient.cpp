#include "input_gradient.h"

#include <algorithm>

#include "runtime.h"
#include "storage.h"

namespace mod_kernels {
namespace {

// The ReLU's gradient: zero where its output is <= 0; a NaN is not.
template <class A>
inline Vec<A> masked(Vec<A> v, Vec<A> output) {
  return output <= 0 ? Vec<A>{} : v;
}

// dx = dy + add (+ dgathered), masked by y, over one plane.
template <class T, bool kGathered, bool kMasked>
inline void pass_plane(const T* dy, const T* dgathered, const T* y, Accumulate<T> add, T* dx, int64_t hw) {
  using A = Accumulate<T>;
  const auto value = [&](const auto& read) {
    Vec<A> v = read(dy) + splat(add);
    if constexpr (kGathered) v += read(dgathered);
    if constexpr (kMasked) v = masked<A>(v, read(y));
    return v;
  };
  int64_t i = 0;
  for (; i + kLanes<A> <= hw; i += kLanes<A>) {
    store(dx + i, value([&](const T* p) { return load(p + i); }));
  }
  if (const int64_t rest = hw - i) {
    store_first(dx + i, value([&](const T* p) { return load_first(p + i, rest); }), rest);
  }
}

// The same over the channels of one pixel, each with its own addend.
template <class T, bool kMasked>
inline void pass_pixel(const T* dy, const T* y, const Accumulate<T>* add, T* dx, int64_t channels) {
  using A = Accumulate<T>;
  int64_t c = 0;
  for (; c + kLanes<A> <= channels; c += kLanes<A>) {
    Vec<A> v = load(dy + c) + load(add + c);
    if constexpr (kMasked) v = masked<A>(v, load(y + c));
    store(dx + c, v);
  }
  if (const int64_t rest = channels - c) {
    Vec<A> v = load_first(dy + c, rest) + load_first(add + c, rest);
    if constexpr (kMasked) v = masked<A>(v, load_first(y + c, rest));
    store_first(dx + c, v, rest);
  }
}

constexpr int64_t whole_lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }

template <class T>
class Pass {
  using A = Accumulate<T>;

 public:
  explicit Pass(const InputGradient<T>& gradient)
      : g(gradient),
        k(g.dgathered.data ? g.dgathered.c : g.overwritten.c),
        linked(g.dgathered.data || (g.overwritten.data && g.position == Position::kOriginal)),
        add_bytes(whole_lines(g.dy.n * g.dy.c * sizeof(A))),
        head_bytes(linked ? whole_lines(g.dy.n * g.dy.c * sizeof(int32_t)) : 0) {}

  int64_t scratch_bytes() const {
    return add_bytes + head_bytes + (linked ? g.dy.n * k * static_cast<int64_t>(sizeof(int32_t)) : 0);
  }

  void run(char* scratch) {
    prepare(scratch);
    const int64_t threads = threads_for(g.dy.n * g.dy.sample_size()), hw = g.dy.hw(), channels = g.dy.c;
    // A map of one pixel a channel fits both layouts: its channels lie side by side.
    if (g.dy.channels_last() || hw == 1) {
      parallel(threads, g.dy.n * hw, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) pixel(i / hw, i % hw);
      });
    } else {
      parallel(threads, g.dy.n * channels, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) plane(i / channels, i % channels);
      });
    }
  }

 private:
  const InputGradient<T>& g;
  const int64_t k;
  const bool linked;
  const int64_t add_bytes, head_bytes;
  A* add = nullptr;         // (N, C), what all of a plane gets
  int32_t* head = nullptr;  // (N, C): the first j with index[n, j] == c, or -1
  int32_t* next = nullptr;  // (N, k): the next j with the same channel, or -1

  void prepare(char* scratch) {
    const int64_t samples = g.dy.n, channels = g.dy.c, size = samples * channels;
    add = reinterpret_cast<A*>(scratch);
    const A count = static_cast<A>(g.dy.hw());
    // -0.0 leaves every number as it is; 0.0 would turn -0.0 into itself.
    for (int64_t i = 0; i < size; ++i) add[i] = g.dpooled ? g.dpooled[i] / count : A{-0.0};
    if (!linked) return;
    head = reinterpret_cast<int32_t*>(scratch + add_bytes);
    next = reinterpret_cast<int32_t*>(scratch + add_bytes + head_bytes);
    std::fill_n(head, size, -1);
    for (int64_t n = 0; n < samples; ++n) {
      for (int64_t j = k - 1; j >= 0; --j) {  // backwards: a channel's list is then ascending
        int32_t& first = head[n * channels + g.index[n * k + j]];
        next[n * k + j] = first;
        first = static_cast<int32_t>(j);
      }
    }
  }

  int64_t first_of(int64_t n, int64_t c) const { return linked ? head[n * g.dy.c + c] : -1; }

  // The first channel of P where they are a range.
  int64_t range_begin() const { return target_channel(g.position, 0, g.overwritten.c, g.dy.c, nullptr); }

  // Which of overwritten's channels stands for channel c; -1 where y's own does.
  int64_t overwritten_at(int64_t n, int64_t c) const {
    if (!g.overwritten.data) return -1;
    if (g.position == Position::kOriginal) return first_of(n, c);
    const int64_t j = c - range_begin();
    return j >= 0 && j < g.overwritten.c ? j : -1;
  }

  // One element, however many gathered channels it takes.
  T element(int64_t n, int64_t c, int64_t p, int64_t first, int64_t over) const {
    const auto at = [&](const FeatureMap<T>& map, int64_t channel) {
      return widen(map.sample(n)[channel * map.stride_c() + p * map.stride_p()]);
    };
    A v = at(g.dy, c) + add[n * g.dy.c + c];
    if (g.dgathered.data) {
      for (int64_t j = first; j >= 0; j = next[n * k + j]) v += at(g.dgathered, j);
    }
    if (g.y.data && (over >= 0 ? at(g.overwritten, over) : at(g.y, c)) <= 0) v = 0;
    return narrow<T>(v);
  }

  void plane(int64_t n, int64_t c) const {
    const int64_t hw = g.dy.hw(), first = first_of(n, c), over = overwritten_at(n, c);
    const T* dy = g.dy.sample(n) + c * hw;
    T* dx = g.dx.sample(n) + c * hw;
    const T *dgathered = nullptr, *y = nullptr;
    if (g.dgathered.data && first >= 0) {
      if (next[n * k + first] >= 0) {  // a caller's own index: no selection repeats a channel
        for (int64_t p = 0; p < hw; ++p) dx[p] = element(n, c, p, first, over);
        return;
      }
      dgathered = g.dgathered.sample(n) + first * hw;
    }
    if (g.y.data) y = over >= 0 ? g.overwritten.sample(n) + over * hw : g.y.sample(n) + c * hw;
    const A a = add[n * g.dy.c + c];
    if (dgathered) {
      if (y) return pass_plane<T, true, true>(dy, dgathered, y, a, dx, hw);
      return pass_plane<T, true, false>(dy, dgathered, y, a, dx, hw);
    }
    if (y) return pass_plane<T, false, true>(dy, dgathered, y, a, dx, hw);
    pass_plane<T, false, false>(dy, dgathered, y, a, dx, hw);
  }

  void pixel(int64_t n, int64_t p) const {
    const int64_t channels = g.dy.c, at = p * channels;
    const T* dy = g.dy.sample(n) + at;
    T* dx = g.dx.sample(n) + at;
    const A* a = add + n * channels;
    if (!g.y.data) {
      pass_pixel<T, false>(dy, nullptr, a, dx, channels);
    } else {
      const T* y = g.y.sample(n) + at;
      if (g.overwritten.data && g.position != Position::kOriginal) {
        const int64_t begin = range_begin(), end = begin + g.overwritten.c;
        pass_pixel<T, true>(dy, y, a, dx, begin);
        pass_pixel<T, true>(dy + begin, g.overwritten.sample(n) + p * g.overwritten.c, a + begin, dx + begin,
                            end - begin);
        pass_pixel<T, true>(dy + end, y + end, a + end, dx + end, channels - end);
      } else {
        pass_pixel<T, true>(dy, y, a, dx, channels);
      }
    }
    if (!linked) return;
    // The few channels of index again, one by one.
    const int64_t* index = g.index + n * k;
    for (int64_t j = 0; j < k; ++j) {
      const int64_t c = index[j], first = head[n * channels + c];
      if (first == j) dx[c] = element(n, c, p, first, overwritten_at(n, c));
    }
  }
};

}  // namespace

template <class T>
void input_gradient(const InputGradient<T>& gradient) {
  if (gradient.dy.n * gradient.dy.sample_size() == 0) return;
  Pass<T> pass(gradient);
  pass.run(Scratch(pass.scratch_bytes()).data());
}

#define MOD_KERNELS_INPUT_GRADIENT(T) template void input_gradient<T>(const InputGradient<T>&);
MOD_KERNELS_FOR_EACH_DTYPE(MOD_KERNELS_INPUT_GRADIENT)

}  // namespace mod_kernels
