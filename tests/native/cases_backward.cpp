#include <functional>
#include <memory>
#include <utility>

#include "../../csrc/cpu/fuse_backward.h"
#include "../../csrc/cpu/input_gradient.h"
#include "../../csrc/cpu/select_backward.h"
#include "cases.h"
#include "host_runtime.h"
#include "support.h"

namespace mod_kernels {
namespace {

struct Shape {
  int64_t n, c, h, w, k;
  int64_t hw() const { return h * w; }
};

std::string describe(const Shape& s, bool last) {
  return spell(" N=", s.n, " C=", s.c, " H=", s.h, " W=", s.w, " k=", s.k, last ? " channels_last" : " NCHW");
}

template <class T>
Map<T> make_map(Random& random, const Shape& shape, int64_t channels, bool last, bool dense = false) {
  return {shape.n,
          channels,
          shape.h,
          shape.w,
          last ? Layout::kChannelsLast : Layout::kNchw,
          !dense && random.coin() ? 3 : 0,
          random.side()};
}

std::vector<int64_t> random_index(Random& random, const Shape& shape, bool repeats) {
  std::vector<int64_t> index;
  for (int64_t n = 0; n < shape.n; ++n) {
    std::vector<int64_t> channels(shape.c);
    for (int64_t c = 0; c < shape.c; ++c) {
      channels[c] = repeats ? random.below(shape.c) : c;
      std::swap(channels[c], channels[random.below(c + 1)]);
    }
    index.insert(index.end(), channels.begin(), channels.begin() + shape.k);
  }
  return index;
}

// The channels P of one sample.
std::vector<int64_t> targets(Position position, const Shape& shape, const int64_t* index, int64_t n) {
  return reference::targets(position, shape.c, {index + n * shape.k, index + (n + 1) * shape.k});
}

// What `run` gives on one thread; the same bits on three.
template <class T>
std::vector<T> on_threads(const std::function<std::vector<T>()>& run) {
  set_thread_count(3);
  const std::vector<T> shared = one_nan(run());
  set_thread_count(1);
  const std::vector<T> alone = one_nan(run());
  check_same("on three threads", shared, alone);
  return alone;
}

template <class T>
void fuse_backward_case(const Shape& shape, Position position, bool last, Random& random) {
  using A = Accumulate<T>;
  begin_case(
      spell("fuse_backward, ", kName<T>, describe(shape, last), " position ", static_cast<int>(position)));
  const int64_t n = shape.n, c = shape.c, k = shape.k, hw = shape.hw();
  const Map<T> dy = make_map<T>(random, shape, c, last), z = make_map<T>(random, shape, k, last);
  const std::vector<T> dy_values = map_values<T>(random, n, c, hw),
                       z_values = map_values<T>(random, n, k, hw);
  dy.assign(dy_values);
  z.assign(z_values);
  const Guarded<A> scores(random_values<A>(random, n * k), random.side());
  const Guarded<int64_t> index(random_index(random, shape, true), random.side());
  Values expected_dz, expected_dscores, sizes;
  for (int64_t i = 0; i < n; ++i) {
    const auto target = targets(position, shape, index.data(), i);
    for (int64_t j = 0; j < k; ++j) {
      double sum = 0;
      for (int64_t p = 0; p < hw; ++p) {
        const double d = widen(dy_values[(i * c + target[j]) * hw + p]);
        expected_dz.push_back(scores[i * k + j] * d);
        sum += widen(z_values[(i * k + j) * hw + p]) * d;
      }
      expected_dscores.push_back(sum);
    }
  }
  const Side side = random.side();
  const auto run = [&](bool with_dz, bool with_dscores) {
    const Map<T> dz = make_map<T>(random, shape, k, last, true);
    const Guarded<A> dscores(n * k, side);
    FuseGradient<T> g{dy.map, z.map, {}, scores.data(), nullptr, position};
    if (position == Position::kOriginal) g.index = index.data();
    if (with_dz) g.dz = dz.map;
    if (with_dscores) g.dscores = dscores.data();
    fuse_backward(g);
    return std::pair(dz.values(), dscores.values());
  };
  const auto dz = on_threads<T>([&] { return run(true, true).first; });
  const auto dscores = on_threads<A>([&] { return run(true, true).second; });
  check_values("dz", to_double(dz), expected_dz, kValuesTolerance<T>);
  // Of the typical term: a sum may cancel.
  check_largest("dscores", to_double(dscores), expected_dscores, kValuesTolerance<A>, 1);
  check_same("dz alone", run(true, false).first, dz);
  check_same("dscores alone", run(false, true).second, dscores);
}

template <class T>
void input_gradient_case(const Shape& shape, Position position, bool last, Random& random) {
  using A = Accumulate<T>;
  const bool pooled = random.coin(), gathered = random.coin(), masked = random.coin();
  const bool overwrites = masked && random.coin(), repeats = random.below(4) == 0;
  begin_case(spell("input_gradient, ", kName<T>, describe(shape, last), " position ",
                   static_cast<int>(position), pooled ? " dpooled" : "", gathered ? " dgathered" : "",
                   masked ? " y" : "", overwrites ? " overwritten" : "",
                   repeats ? " an index that repeats" : ""));
  const int64_t n = shape.n, c = shape.c, k = shape.k, hw = shape.hw();
  const Map<T> dy = make_map<T>(random, shape, c, last), y = make_map<T>(random, shape, c, last);
  const Map<T> dgathered = make_map<T>(random, shape, k, last),
               overwritten = make_map<T>(random, shape, k, last);
  const std::vector<T> dy_values = map_values<T>(random, n, c, hw), added = map_values<T>(random, n, k, hw);
  // Half of it zero or below, a NaN here and there.
  std::vector<T> y_values = map_values<T>(random, n, c, hw, 5), stood(n * k * hw);
  const Guarded<A> dpooled(random_values<A>(random, n * c), random.side());
  const Guarded<int64_t> index(random_index(random, shape, repeats), random.side());
  const std::vector<T> output = y_values;
  for (int64_t i = 0; i < n && overwrites; ++i) {
    const auto target = targets(position, shape, index.data(), i);
    for (int64_t j = 0; j < k; ++j) {
      std::copy_n(output.begin() + (i * c + target[j]) * hw, hw, stood.begin() + (i * k + j) * hw);
      for (int64_t p = 0; p < hw; ++p) y_values[(i * c + target[j]) * hw + p] = special_value<T>(random);
    }
  }
  Values expected = to_double(dy_values);
  for (int64_t i = 0; i < n * c * hw && pooled; ++i) expected[i] += dpooled[i / hw] / hw;
  for (int64_t i = 0; i < n * k * hw && gathered; ++i) {
    expected[(i / (k * hw) * c + index[i / hw]) * hw + i % hw] += widen(added[i]);
  }
  for (int64_t i = 0; i < n * c * hw && masked; ++i) {
    if (widen(output[i]) <= 0) expected[i] = 0;
  }
  dy.assign(dy_values);
  y.assign(y_values);
  dgathered.assign(added);
  overwritten.assign(stood);
  const auto dx = on_threads<T>([&] {
    const Map<T> to = make_map<T>(random, shape, c, last, true);
    InputGradient<T> g{dy.map, to.map};
    g.position = position;
    if (pooled) g.dpooled = dpooled.data();
    if (gathered) g.dgathered = dgathered.map;
    if (masked) g.y = y.map;
    if (overwrites) g.overwritten = overwritten.map;
    if (gathered || (overwrites && position == Position::kOriginal)) g.index = index.data();
    input_gradient(g);
    return to.values();
  });
  check_values("dx", to_double(dx), expected, kValuesTolerance<T>);
  check_same("dy", one_nan(dy.values()), one_nan(dy_values));
}

template <class A, class W>
void select_backward_case(int64_t n, int64_t c, int64_t r, int64_t k, Random& random) {
  begin_case(spell("select_backward, ", kName<A>, " by ", kName<W>, " N=", n, " C=", c, " R=", r, " k=", k));
  const auto values = [&](int64_t count) {
    return Guarded<A>(random_values<A>(random, count), random.side());
  };
  const Guarded<A> dscores = values(n * k), scores = values(n * k), hidden = values(n * r),
                   pooled = values(n * c);
  const Guarded<W> fc1(random_values<W>(random, r * c), random.side());
  const Guarded<W> fc2(random_values<W>(random, c * r), random.side());
  const Guarded<int64_t> index(random_index(random, {n, c, 1, 1, k}, false), random.side());
  Values dpooled(n * c), dfc1(r * c), dfc2(c * r), db1(r), db2(c);
  for (int64_t i = 0; i < n; ++i) {
    Values dhidden(r);
    for (int64_t j = i * k; j < (i + 1) * k; ++j) {
      const double s = scores[j], dlogit = dscores[j] * s * (1 - s);
      db2[index[j]] += dlogit;
      for (int64_t u = 0; u < r; ++u) {
        dfc2[index[j] * r + u] += dlogit * hidden[i * r + u];
        dhidden[u] += dlogit * widen(fc2[index[j] * r + u]);
      }
    }
    for (int64_t u = 0; u < r; ++u) {
      const double d = hidden[i * r + u] <= 0 ? 0 : dhidden[u];
      db1[u] += d;
      for (int64_t l = 0; l < c; ++l) {
        dfc1[u * c + l] += d * pooled[i * c + l];
        dpooled[i * c + l] += d * widen(fc1[u * c + l]);
      }
    }
  }
  const int64_t sizes[] = {n * c, r * c, c * r, r, c};
  const Side side = random.side();
  // All five, or the one of `which`.
  const auto run = [&](int which) {
    std::vector<std::unique_ptr<Guarded<A>>> out;
    for (int i = 0; i < 5; ++i) {
      out.push_back(which < 0 || which == i ? std::make_unique<Guarded<A>>(sizes[i], side) : nullptr);
    }
    const auto to = [&](int i) { return out[i] ? out[i]->data() : nullptr; };
    SelectGradient<A> g{
        n, c, r, k, dscores.data(), scores.data(), index.data(), hidden.data(), pooled.data()};
    g.fc1 = {fc1.data(), kDType<W>};
    g.fc2 = {fc2.data(), kDType<W>};
    g.dpooled = to(0);
    g.dfc1 = to(1);
    g.dfc2 = to(2);
    g.db1 = to(3);
    g.db2 = to(4);
    select_backward(g);
    std::vector<A> all;
    for (const auto& one : out) {
      if (one) all.insert(all.end(), one->data(), one->data() + one->size());
    }
    return all;
  };
  const std::vector<A> all = on_threads<A>([&] { return run(-1); });
  const Values* expected[] = {&dpooled, &dfc1, &dfc2, &db1, &db2};
  const char* names[] = {"dpooled", "dfc1", "dfc2", "db1", "db2"};
  auto at = all.begin();
  for (int i = 0; i < 5; ++i) {
    const std::vector<A> one(at, at + sizes[i]);
    at += sizes[i];
    // Of the size of a term: sums may cancel.
    check_largest(names[i], to_double(one), *expected[i], 2 * kValuesTolerance<A>, 1);
    check_same(spell(names[i], " alone").c_str(), run(i), one);
  }
}

constexpr Shape kShapes[] = {{0, 3, 2, 2, 1},      {1, 1, 1, 1, 1},   {3, 7, 5, 7, 7},    {9, 33, 3, 1, 4},
                             {1, 64, 28, 28, 1},   {3, 70, 7, 7, 33}, {1, 160, 1, 49, 9}, {3, 256, 1, 1, 70},
                             {1, 300, 14, 14, 16}, {3, 2048, 1, 1, 8}};
constexpr int64_t kSelectors[][4] = {{0, 5, 2, 1},   {1, 1, 1, 1},      {1, 64, 8, 3},  {3, 70, 4, 9},
                                     {5, 97, 70, 8}, {13, 160, 21, 40}, {70, 33, 9, 5}, {4, 600, 64, 8}};

}  // namespace

void backward_cases(bool few) {
  Random random(6);
  for_each_dtype([&]<class T>() {
    for (const Shape& shape : kShapes) {
      if (few && shape.n * shape.c * shape.hw() > 12000) continue;
      for (bool last : {false, true}) {
        for (Position position : {Position::kFirst, Position::kLast, Position::kOriginal}) {
          fuse_backward_case<T>(shape, position, last, random);
          for (int i = 0; i < 6; ++i) input_gradient_case<T>(shape, position, last, random);
        }
      }
    }
  });
  for (const auto& [n, c, r, k] : kSelectors) {
    if (few && n * c * r > 20000) continue;
    select_backward_case<float, Half>(n, c, r, k, random);
    select_backward_case<float, BFloat16>(n, c, r, k, random);
    select_backward_case<float, float>(n, c, r, k, random);
    select_backward_case<double, float>(n, c, r, k, random);
    select_backward_case<double, double>(n, c, r, k, random);
  }
}

}  // namespace mod_kernels
