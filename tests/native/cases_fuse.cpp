#include "../../csrc/cpu/fuse.h"
#include "cases.h"
#include "support.h"

namespace mod_kernels {
namespace {

struct Shape {
  int64_t n, c, h, w, k;
};

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

template <class T>
Map<T> make_map(Random& random, const Shape& shape, int64_t channels, bool channels_last) {
  return {shape.n,
          channels,
          shape.h,
          shape.w,
          channels_last ? Layout::kChannelsLast : Layout::kNchw,
          random.coin() ? 3 : 0,
          random.side()};
}

std::string describe(const Shape& s) {
  return spell(" N=", s.n, " C=", s.c, " H=", s.h, " W=", s.w, " k=", s.k);
}

template <class T>
void gather_case(const Shape& shape, bool from_last, bool to_last, Random& random) {
  begin_case(spell("gather, ", kName<T>, describe(shape), from_last ? " from channels_last" : " from NCHW",
                   to_last ? " to channels_last" : " to NCHW"));
  const Map<T> x = make_map<T>(random, shape, shape.c, from_last);
  const Map<T> out = make_map<T>(random, shape, shape.k, to_last);
  const std::vector<T> values = map_values<T>(random, shape.n, shape.c, x.map.hw(), 5);
  x.assign(values);
  const Guarded<int64_t> index(random_index(random, shape, true), random.side());
  std::vector<T> expected;
  for (int64_t n = 0; n < shape.n; ++n) {
    gather_sample(x.map, n, index.data() + n * shape.k, out.map);
    for (int64_t j = 0; j < shape.k; ++j) {
      const auto plane = values.begin() + (n * shape.c + index[n * shape.k + j]) * x.map.hw();
      expected.insert(expected.end(), plane, plane + x.map.hw());
    }
  }
  check_same("out", out.values(), expected);
}

template <class T>
void fuse_case(const Shape& shape, Position position, bool y_last, bool z_last, Random& random) {
  const bool repeats = position == Position::kOriginal && random.coin();
  begin_case(spell("fuse, ", kName<T>, describe(shape), " position ", static_cast<int>(position),
                   y_last ? " channels_last" : " NCHW", z_last ? " z channels_last" : " z NCHW",
                   repeats ? " an index that repeats" : ""));
  const Map<T> x = make_map<T>(random, shape, shape.c, y_last),
               y = make_map<T>(random, shape, shape.c, y_last);
  const Map<T> z = make_map<T>(random, shape, shape.k, z_last);
  const int64_t hw = x.map.hw(), size = shape.c * hw;
  std::vector<T> values = map_values<T>(random, shape.n, shape.c, hw);
  const std::vector<T> added = map_values<T>(random, shape.n, shape.k, hw);
  z.assign(added);
  const Guarded<Accumulate<T>> scores(random_values<Accumulate<T>>(random, shape.n * shape.k), random.side());
  const Guarded<int64_t> index(random_index(random, shape, repeats), random.side());
  const bool original = position == Position::kOriginal;

  Values expected;
  std::vector<bool> touched(values.size());
  for (int64_t n = 0; n < shape.n; ++n) {
    const int64_t* own = index.data() + n * shape.k;
    const auto target = reference::targets(position, shape.c, {own, own + shape.k});
    for (int64_t channel : target) {
      std::fill_n(touched.begin() + n * size + channel * hw, hw, true);
    }
    // What passes through may be anything.
    for (int64_t i = n * size; i < (n + 1) * size; ++i) {
      if (!touched[i] && random.below(20) == 0) values[i] = special_value<T>(random);
    }
    Values sample = to_double(values.data() + n * size, size);
    reference::fuse(sample, hw, to_double(added.data() + n * shape.k * hw, shape.k * hw),
                    to_double(scores.data() + n * shape.k, shape.k), target);
    expected.insert(expected.end(), sample.begin(), sample.end());
  }
  x.assign(values);
  for (int64_t n = 0; n < shape.n; ++n) {
    copy_fuse_sample(x.map, y.map, z.map, n, scores.data() + n * shape.k,
                     original ? index.data() + n * shape.k : nullptr, position);
  }
  check_same("x", x.values(), values);
  for (int64_t n = 0; n < shape.n; ++n) {
    fuse_sample(x.map, z.map, n, scores.data() + n * shape.k, original ? index.data() + n * shape.k : nullptr,
                position);
  }
  const std::vector<T> got = y.values();
  check_same("in place", x.values(), got);
  Values changed, expected_changed;
  for (std::size_t i = 0; i < got.size(); ++i) {
    if (touched[i]) {
      changed.push_back(widen(got[i]));
      expected_changed.push_back(expected[i]);
    } else if (std::memcmp(&got[i], &values[i], sizeof(T)) != 0) {
      fail(spell("element ", i, " does not pass through"));
    }
  }
  check_values("y", changed, expected_changed, kValuesTolerance<T>);
}

constexpr Shape kShapes[] = {
    {1, 1, 1, 1, 1},    {3, 7, 5, 7, 7},    {9, 33, 3, 1, 4},     {1, 64, 28, 28, 1},  {3, 70, 7, 7, 33},
    {1, 160, 1, 49, 9}, {3, 256, 1, 1, 70}, {1, 300, 14, 14, 16}, {1, 600, 1, 3, 100}, {3, 2048, 1, 1, 8}};

}  // namespace

void fuse_cases(bool few) {
  Random random(4);
  for_each_dtype([&]<class T>() {
    for (const Shape& shape : kShapes) {
      if (few && shape.n * shape.c * shape.h * shape.w > 12000) continue;
      for (bool last : {false, true}) {
        for (bool other : {false, true}) {
          const bool fits_both = shape.k == 1 || shape.h * shape.w == 1;
          if (last == other || fits_both) gather_case<T>(shape, last, other, random);
          for (Position position : {Position::kFirst, Position::kLast, Position::kOriginal}) {
            fuse_case<T>(shape, position, last, other, random);
          }
        }
      }
    }
  });
}

}  // namespace mod_kernels
