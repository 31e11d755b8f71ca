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
  const auto whole = [&](int64_t i) { store(dx + i, value([&](const T* p) { return load(p + i); })); };
  if (hw < kLanes<A>) {
    return store_first(dx, value([&](const T* p) { return load_first(p, hw); }), hw);
  }
  int64_t i = 0;
  for (; i + kLanes<A> <= hw; i += kLanes<A>) whole(i);
  if (i < hw) whole(hw - kLanes<A>);  // some of it again: nothing here reads what it writes
}

// dx = dy + add, masked by y, over `planes` planes, each with its own addend and no smaller than a vector.
// They are one run: planes that begin anywhere in a line of the cache would cost two accesses a vector.
template <class T, bool kMasked>
inline void pass_run(const T* dy, const T* y, const Accumulate<T>* add, T* dx, int64_t hw, int64_t planes) {
  using A = Accumulate<T>;
  constexpr int64_t kStep = kLanes<A>, kBytes = kStep * sizeof(T);
  const auto value = [&](Vec<A> a, const auto& read) {
    Vec<A> v = read(dy) + a;
    if constexpr (kMasked) v = masked<A>(v, read(y));
    return v;
  };
  const auto whole = [&](int64_t i, Vec<A> a) {
    store(dx + i, value(a, [&](const T* p) { return load(p + i); }));
  };
  const auto part = [&](int64_t i, Vec<A> a, int64_t count) {
    store_first(dx + i, value(a, [&](const T* p) { return load_first(p + i, count); }), count);
  };
  const int64_t past = reinterpret_cast<uintptr_t>(dx) % kBytes / sizeof(T);
  int64_t i = past ? kStep - past : 0;
  if (i) part(0, splat(add[0]), i);
  for (int64_t c = 0; c < planes; ++c) {
    const int64_t end = (c + 1) * hw;
    const Vec<A> a = splat(add[c]);
#pragma GCC unroll 4
    for (; i + kStep <= end; i += kStep) whole(i, a);
    if (i >= end) continue;
    if (c + 1 == planes) return part(i, a, end - i);
    const Mask<A> next = last_lanes<A>(i + kStep - end);
    whole(i, next ? splat(add[c + 1]) : a);
    i += kStep;
  }
}

// dx = dy + add, masked by y, over the channels of one pixel, each with its own addend.
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
        // A map of one pixel a channel fits both layouts: its channels lie side by side.
        by_pixels(g.dy.channels_last() || g.dy.hw() == 1),
        threads(threads_for(g.dy.n * g.dy.sample_size())),
        add_bytes(whole_lines(g.dy.c * sizeof(A))),
        row_bytes(by_pixels && g.dgathered.data ? whole_lines(2 * g.dy.c * sizeof(A)) : 0),
        head_bytes(linked ? whole_lines(g.dy.c * sizeof(int32_t)) : 0),
        next_bytes(linked ? whole_lines(k * sizeof(int32_t)) : 0) {}

  int64_t scratch_bytes() const { return threads * thread_bytes(); }

  void run(char* scratch) {
    // Pixels or planes of a sample.
    const int64_t each = by_pixels ? g.dy.hw() : g.dy.c, count = g.dy.n * each;
    parallel(threads, count, [&](int64_t begin, int64_t end) {
      // A thread has an index only where work was shared out.
      const int64_t thread = threads == 1 || count == 1 ? 0 : thread_index();
      char* own = scratch + thread * thread_bytes();
      for (int64_t i = begin; i < end;) {
        const int64_t first = i % each, last = std::min(each, first + end - i);
        const Sample sample = prepared(i / each, own);
        if (by_pixels) {
          pixels(sample, first, last);
        } else if (g.y.data) {
          planes<true>(sample, first, last);
        } else {
          planes<false>(sample, first, last);
        }
        i += last - first;
      }
    });
  }

 private:
  // What a thread knows of the sample it is at. In the thread's own memory, where it stays in the cache: for
  // a whole batch it would be read and written beside the maps.
  struct Sample {
    int64_t n;
    A* add;         // (C), what all of a plane gets
    A* rows;        // two rows of addends, where pixels gather
    int32_t* head;  // (C), where linked: the first j with index[n, j] == c, or -1
    int32_t* next;  // (k): the next j with the same channel, or -1

    int64_t first_of(int64_t c) const { return head ? head[c] : -1; }
  };

  const InputGradient<T>& g;
  const int64_t k;
  const bool linked, by_pixels;
  const int64_t threads, add_bytes, row_bytes, head_bytes, next_bytes;

  int64_t thread_bytes() const { return add_bytes + row_bytes + head_bytes + next_bytes; }

  Sample prepared(int64_t n, char* own) const {
    const int64_t channels = g.dy.c;
    char *rows = own + add_bytes, *links = rows + row_bytes;
    Sample s{n, reinterpret_cast<A*>(own), reinterpret_cast<A*>(rows), nullptr, nullptr};
    const A count = static_cast<A>(g.dy.hw());
    if (g.dpooled) {
      for (int64_t c = 0; c < channels; ++c) s.add[c] = g.dpooled[n * channels + c] / count;
    } else {  // -0.0 leaves every number as it is; 0.0 would turn -0.0 into itself
      std::fill_n(s.add, channels, A{-0.0});
    }
    if (!linked) return s;
    s.head = reinterpret_cast<int32_t*>(links);
    s.next = reinterpret_cast<int32_t*>(links + head_bytes);
    std::fill_n(s.head, channels, -1);
    for (int64_t j = k - 1; j >= 0; --j) {  // backwards: a channel's list is then ascending
      int32_t& first = s.head[g.index[n * k + j]];
      s.next[j] = first;
      first = static_cast<int32_t>(j);
    }
    return s;
  }

  // The first channel of P where they are a range.
  int64_t range_begin() const { return target_channel(g.position, 0, g.overwritten.c, g.dy.c, nullptr); }

  // Which of overwritten's channels stands for channel c; -1 where y's own does.
  int64_t overwritten_at(const Sample& s, int64_t c) const {
    if (!g.overwritten.data) return -1;
    if (g.position == Position::kOriginal) return s.first_of(c);
    const int64_t j = c - range_begin();
    return j >= 0 && j < g.overwritten.c ? j : -1;
  }

  bool is_plain(const Sample& s, int64_t c) const {
    return !(g.dgathered.data && s.first_of(c) >= 0) && overwritten_at(s, c) < 0;
  }

  template <bool kMasked>
  void planes(const Sample& s, int64_t begin, int64_t end) const {
    const int64_t n = s.n, hw = g.dy.hw();
    // Locals: the compiler takes a store through dx for one that may change the members.
    const T *dy = g.dy.sample(n), *y = kMasked ? g.y.sample(n) : nullptr;
    T* dx = g.dx.sample(n);
    const A* a = s.add;
    for (int64_t c = begin; c < end;) {
      const int64_t at = c * hw, first = c;
      if (hw < kLanes<A> || !is_plain(s, c)) {
        plane<kMasked>(s, c++);
        continue;
      }
      do ++c;
      while (c < end && is_plain(s, c));
      pass_run<T, kMasked>(dy + at, kMasked ? y + at : nullptr, a + first, dx + at, hw, c - first);
    }
  }

  // One plane, whatever it gets.
  template <bool kMasked>
  void plane(const Sample& s, int64_t c) const {
    const int64_t n = s.n, hw = g.dy.hw(), at = c * hw, over = overwritten_at(s, c), first = s.first_of(c);
    const T* output = kMasked ? g.y.sample(n) + at : nullptr;
    if (over >= 0) output = g.overwritten.sample(n) + over * hw;
    if (g.dgathered.data && first >= 0) return gathered_plane<kMasked>(s, c, first, output);
    pass_plane<T, false, kMasked>(g.dy.sample(n) + at, nullptr, output, s.add[c], g.dx.sample(n) + at, hw);
  }

  template <bool kMasked>
  void gathered_plane(const Sample& s, int64_t c, int64_t first, const T* output) const {
    const int64_t n = s.n, hw = g.dy.hw(), at = c * hw;
    T* dx = g.dx.sample(n) + at;
    if (s.next[first] < 0) {
      const T* dgathered = g.dgathered.sample(n) + first * hw;
      pass_plane<T, true, kMasked>(g.dy.sample(n) + at, dgathered, output, s.add[c], dx, hw);
      return;
    }
    // A caller's own index: no selection repeats a channel.
    for (int64_t p = 0; p < hw; ++p) {
      A v = widen(g.dy.sample(n)[at + p]) + s.add[c];
      for (int64_t j = first; j >= 0; j = s.next[j]) v += widen(g.dgathered.sample(n)[j * hw + p]);
      dx[p] = narrow<T>(kMasked && widen(output[p]) <= 0 ? A{0} : v);
    }
  }

  // Pixels begin to end - 1 of a sample.
  void pixels(const Sample& s, int64_t begin, int64_t end) const {
    const int64_t n = s.n, channels = g.dy.c;
    if (!g.dgathered.data) {
      for (int64_t p = begin; p < end; ++p) pixel(n, p, s.add);
      return;
    }
    // The gathered channels' own addends are put into a row of addends, a pixel ahead: a vector that holds
    // what has just been written one by one waits for it.
    const bool repeats = std::any_of(s.next, s.next + k, [](int32_t j) { return j >= 0; });
    A* const row[] = {s.rows, s.rows + channels};
    for (A* each : row) std::copy_n(s.add, channels, each);
    put_gathered(s, begin, repeats, row[begin % 2]);
    for (int64_t p = begin; p < end; ++p) {
      if (p + 1 < end) put_gathered(s, p + 1, repeats, row[(p + 1) % 2]);
      pixel(n, p, row[p % 2]);
    }
  }

  void put_gathered(const Sample& s, int64_t p, bool repeats, A* row) const {
    const A* a = s.add;
    const int64_t* index = g.index + s.n * k;
    const T* dgathered = g.dgathered.sample(s.n) + p * k;
    if (!repeats) {
      for (int64_t j = 0; j < k; ++j) row[index[j]] = a[index[j]] + widen(dgathered[j]);
      return;
    }
    for (int64_t j = 0; j < k; ++j) row[index[j]] = a[index[j]];
    for (int64_t j = 0; j < k; ++j) row[index[j]] += widen(dgathered[j]);
  }

  void pixel(int64_t n, int64_t p, const A* a) const {
    const int64_t channels = g.dy.c, at = p * channels;
    const T* dy = g.dy.sample(n) + at;
    T* dx = g.dx.sample(n) + at;
    if (!g.y.data) return pass_pixel<T, false>(dy, nullptr, a, dx, channels);
    const T* y = g.y.sample(n) + at;
    if (!g.overwritten.data) return pass_pixel<T, true>(dy, y, a, dx, channels);
    const int64_t count = g.overwritten.c;
    const T* overwritten = g.overwritten.sample(n) + p * count;
    if (g.position != Position::kOriginal) {
      const int64_t begin = range_begin(), end = begin + count;
      pass_pixel<T, true>(dy, y, a, dx, begin);
      pass_pixel<T, true>(dy + begin, overwritten, a + begin, dx + begin, count);
      return pass_pixel<T, true>(dy + end, y + end, a + end, dx + end, channels - end);
    }
    pass_pixel<T, true>(dy, y, a, dx, channels);
    const int64_t* index = g.index + n * k;
    for (int64_t j = k - 1; j >= 0; --j) {  // of a channel that repeats the first j counts, as in planes
      const int64_t c = index[j];
      dx[c] = narrow<T>(widen(overwritten[j]) <= 0 ? A{0} : widen(dy[c]) + a[c]);
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
