#include "select_backward.h"

#include <algorithm>

#include "runtime.h"
#include "storage.h"

namespace mod_kernels {
namespace {

// call(data) with the weight's own type.
template <class A, class F>
void with_weight(const Weight& weight, const F& call) {
  if constexpr (std::is_same_v<A, double>) {
    if (weight.dtype == DType::kDouble) return call(static_cast<const double*>(weight.data));
  } else {
    if (weight.dtype == DType::kHalf) return call(static_cast<const Half*>(weight.data));
    if (weight.dtype == DType::kBFloat16) return call(static_cast<const BFloat16*>(weight.data));
  }
  call(static_cast<const float*>(weight.data));
}

// to[i] += factor * from[i]
template <class A, class W>
inline void add_scaled(A factor, const W* from, A* to, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes<A> <= count; i += kLanes<A>) {
    store(to + i, load(to + i) + splat(factor) * load_as<A>(from + i));
  }
  if (const int64_t rest = count - i) {
    W lanes[kLanes<A>] = {};
    std::copy_n(from + i, rest, lanes);
    store_first(to + i, load_first(to + i, rest) + splat(factor) * load_as<A>(lanes), rest);
  }
}

// ---- out (rows, columns) = a b, with a's element (m, i) at a[m * row_step + i * depth_step] and b (depth,
// columns) row-major. A panel of b, a few vectors wide, is copied side by side first (its rows lie a power of
// two apart: in few sets of the cache), and as numbers of A: a narrow weight is widened once. A tile of out
// is then kept in registers.

constexpr int kTileRows = kRegisters == 32 ? 8 : 4;
constexpr int kPanelVectors = 3;
constexpr int64_t kPanelDepth = 64;  // 12 KB with AVX-512: a third of a first-level cache
template <class A>
inline constexpr int64_t kPanel = kPanelVectors * kLanes<A>;  // columns

template <class A>
struct Left {
  const A* data;
  int64_t row_step, depth_step;
};

// kRows rows of out from `to` on, `step` apart, `count` columns: the sum goes on from what is there, or from
// 0.
template <class A, int kRows>
inline void tile(const A* a, const Left<A>& left, const A* panel, int64_t depth, bool first, A* to,
                 int64_t step, int64_t count) {
  Vec<A> sum[kRows][kPanelVectors] = {};
  const auto each = [&](const auto& use) {
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
      for (int v = 0; v < kPanelVectors; ++v) {
        const int64_t here = count - v * kLanes<A>;
        if (here > 0) use(to + m * step + v * kLanes<A>, sum[m][v], std::min<int64_t>(here, kLanes<A>));
      }
    }
  };
  const auto go_on = [](const A* p, Vec<A>& s, int64_t here) {
    s = here == kLanes<A> ? load(p) : load_first(p, here);
  };
  if (!first) each(go_on);
  for (int64_t i = 0; i < depth; ++i) {
    Vec<A> b[kPanelVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kPanelVectors; ++v) b[v] = load(panel + i * kPanel<A> + v * kLanes<A>);
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
      const Vec<A> factor = splat(a[m * left.row_step + i * left.depth_step]);
#pragma GCC unroll 4
      for (int v = 0; v < kPanelVectors; ++v) sum[m][v] += factor * b[v];
    }
  }
  each([](A* p, Vec<A>& s, int64_t here) { here == kLanes<A> ? store(p, s) : store_first(p, s, here); });
}

template <class A, int kRows = kTileRows>
inline void tiles(const Left<A>& left, int64_t i, int64_t row, int64_t rows, const A* panel, int64_t depth,
                  A* to, int64_t step, int64_t count) {
  for (; row + kRows <= rows; row += kRows) {
    const A* a = left.data + row * left.row_step + i * left.depth_step;
    tile<A, kRows>(a, left, panel, depth, i == 0, to + row * step, step, count);
  }
  if constexpr (kRows > 1) tiles<A, kRows / 2>(left, i, row, rows, panel, depth, to, step, count);
}

template <class A, class W>
void product(const Left<A>& left, const W* b, int64_t rows, int64_t depth, int64_t columns, A* out) {
  const int64_t panels = (columns + kPanel<A> - 1) / kPanel<A>;
  parallel(threads_for(rows * depth * columns), panels, [&](int64_t begin, int64_t end) {
    alignas(64) A panel[kPanelDepth * kPanel<A>];
    for (int64_t c = begin * kPanel<A>; c < std::min(end * kPanel<A>, columns); c += kPanel<A>) {
      const int64_t count = std::min(kPanel<A>, columns - c);
      for (int64_t i = 0; i < depth; i += kPanelDepth) {
        const int64_t here = std::min(kPanelDepth, depth - i);
        for (int64_t r = 0; r < here; ++r) {
          const W* from = b + (i + r) * columns + c;
          A* to = panel + r * kPanel<A>;
          if (count == kPanel<A>) {
            for (int v = 0; v < kPanelVectors; ++v)
              store(to + v * kLanes<A>, load_as<A>(from + v * kLanes<A>));
          } else {
            for (int64_t l = 0; l < kPanel<A>; ++l) to[l] = l < count ? static_cast<A>(widen(from[l])) : A{0};
          }
        }
        tiles<A>(left, i, 0, rows, panel, here, out + c, columns, count);
      }
    }
  });
}

// dfc2 and db2 of channels begin to end - 1.
template <class A>
void scatter(const SelectGradient<A>& g, const A* dlogits, int64_t begin, int64_t end) {
  if (g.dfc2) std::fill(g.dfc2 + begin * g.units, g.dfc2 + end * g.units, A{0});
  if (g.db2) std::fill(g.db2 + begin, g.db2 + end, A{0});
  for (int64_t i = 0; i < g.samples * g.k; ++i) {
    const int64_t c = g.index[i];
    if (c < begin || c >= end) continue;
    if (g.dfc2) add_scaled(dlogits[i], g.hidden + i / g.k * g.units, g.dfc2 + c * g.units, g.units);
    if (g.db2) g.db2[c] += dlogits[i];
  }
}

template <class A>
void hidden_gradient(const SelectGradient<A>& g, const A* dlogits, A* dhidden) {
  with_weight<A>(g.fc2, [&](const auto* fc2) {
    parallel(threads_for(g.samples * g.k * g.units), g.samples, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        A* to = dhidden + n * g.units;
        const A* hidden = g.hidden + n * g.units;
        std::fill_n(to, g.units, A{0});
        for (int64_t i = n * g.k; i < (n + 1) * g.k; ++i) {
          add_scaled(dlogits[i], fc2 + g.index[i] * g.units, to, g.units);
        }
        for (int64_t r = 0; r < g.units; ++r) to[r] = hidden[r] <= 0 ? A{0} : to[r];
      }
    });
  });
}

}  // namespace

template <class A>
void select_backward(const SelectGradient<A>& g) {
  const Scratch scratch(g.samples * (g.k + g.units) * sizeof(A));
  A* dlogits = reinterpret_cast<A*>(scratch.data());
  for (int64_t i = 0; i < g.samples * g.k; ++i) dlogits[i] = g.dscores[i] * g.scores[i] * (1 - g.scores[i]);
  if (g.dfc2 || g.db2) {
    parallel(threads_for(g.dfc2 ? (g.channels + g.samples * g.k) * g.units : g.channels), g.channels,
             [&](int64_t begin, int64_t end) { scatter(g, dlogits, begin, end); });
  }
  if (!g.dpooled && !g.dfc1 && !g.db1) return;
  A* dhidden = dlogits + g.samples * g.k;
  hidden_gradient(g, dlogits, dhidden);
  if (g.db1) {
    std::fill_n(g.db1, g.units, A{0});
    for (int64_t n = 0; n < g.samples; ++n) add_scaled(A{1}, dhidden + n * g.units, g.db1, g.units);
  }
  if (g.dfc1) {
    if (g.samples == 0) std::fill_n(g.dfc1, g.units * g.channels, A{0});
    product<A>({dhidden, 1, g.units}, g.pooled, g.units, g.samples, g.channels, g.dfc1);
  }
  if (g.dpooled) {
    with_weight<A>(g.fc1, [&](const auto* fc1) {
      product<A>({dhidden, g.units, 1}, fc1, g.samples, g.units, g.channels, g.dpooled);
    });
  }
}

template void select_backward<float>(const SelectGradient<float>&);
template void select_backward<double>(const SelectGradient<double>&);

}  // namespace mod_kernels
