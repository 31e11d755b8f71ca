// What the cases share: seeded values, feature maps in guarded memory, and judging what came out.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <sstream>
#include <string>
#include <type_traits>
#include <vector>

#include "../../csrc/common/dtype.h"
#include "../../csrc/common/layout.h"
#include "guarded.h"
#include "reference.h"

namespace mod_kernels {

using reference::Values;

template <class... Words>
std::string spell(const Words&... words) {
  std::ostringstream text;
  (text << ... << words);
  return text.str();
}

// The case that runs now: begin_case counts it and is what a failure, or a crash, is named after.
void begin_case(std::string name);
[[noreturn]] void fail(const std::string& what);

// splitmix64
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t bits() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
  }
  int64_t below(int64_t limit) { return static_cast<int64_t>(bits() % static_cast<uint64_t>(limit)); }
  bool coin() { return below(2) == 1; }
  Side side() { return coin() ? Side::kBegin : Side::kEnd; }
  double uniform() { return static_cast<double>(bits() >> 11) * 0x1p-52 - 1; }  // -1 to 1

 private:
  uint64_t state_;
};

template <class T>
using BitsOf =
    std::conditional_t<sizeof(T) == 8, uint64_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>>;
template <class T>
inline constexpr int kMantissa = std::is_same_v<T, Half>       ? 10
                                 : std::is_same_v<T, BFloat16> ? 7
                                 : std::is_same_v<T, float>    ? 23
                                                               : 52;
template <class T>
inline constexpr DType kDType = std::is_same_v<T, Half>       ? DType::kHalf
                                : std::is_same_v<T, BFloat16> ? DType::kBFloat16
                                : std::is_same_v<T, float>    ? DType::kFloat
                                                              : DType::kDouble;
template <class T>
inline constexpr const char* kName = std::is_same_v<T, Half>       ? "half"
                                     : std::is_same_v<T, BFloat16> ? "bfloat16"
                                     : std::is_same_v<T, float>    ? "float"
                                                                   : "double";

// mod_kernels/_tolerances.py, which gives the reasons; nothing here truncates on its way to bfloat16.
template <class T>
inline constexpr double kLogitsTolerance = std::is_same_v<T, double> ? 1e-11 : 2e-4;
template <class T>
inline constexpr double kValuesTolerance = std::is_same_v<T, Half>       ? 2e-3
                                           : std::is_same_v<T, BFloat16> ? 1e-2
                                           : std::is_same_v<T, float>    ? 1e-5
                                                                         : 1e-12;

template <class T>
T value_of(double v) {
  return narrow<T>(static_cast<Accumulate<T>>(v));
}

// A signalling NaN, a NaN with something in it, infinity, zero or a subnormal, of either sign.
template <class T>
T special_value(Random& random) {
  constexpr auto kExponent = static_cast<BitsOf<T>>(~BitsOf<T>{0} << (kMantissa<T> + 1)) >> 1;
  const BitsOf<T> quiet = BitsOf<T>{1} << (kMantissa<T> - 1);
  const uint64_t values[] = {kExponent | 1u, kExponent | quiet | 5u, kExponent, 0, 3};
  const auto sign = static_cast<BitsOf<T>>(BitsOf<T>{random.coin()} << (8 * sizeof(T) - 1));
  return std::bit_cast<T>(static_cast<BitsOf<T>>(values[random.below(5)] | sign));
}

// Each channel around a mean of its own, else pooling would leave nothing; `specials` of a hundred are
// special.
template <class T>
std::vector<T> map_values(Random& random, int64_t n, int64_t c, int64_t hw, int specials = 0) {
  std::vector<T> values;
  values.reserve(n * c * hw);
  for (int64_t i = 0; i < n * c; ++i) {
    const double mean = random.uniform() / 2;
    for (int64_t p = 0; p < hw; ++p) {
      const bool special = specials > 0 && random.below(100) < specials;
      values.push_back(special ? special_value<T>(random) : value_of<T>(mean + random.uniform()));
    }
  }
  return values;
}

template <class T>
std::vector<T> random_values(Random& random, int64_t count, double scale = 1) {
  std::vector<T> values(count);
  for (T& v : values) v = value_of<T>(scale * random.uniform());
  return values;
}

template <class T>
Values to_double(const T* values, int64_t count) {
  Values wide(count);
  for (int64_t i = 0; i < count; ++i) wide[i] = widen(values[i]);
  return wide;
}
template <class T>
Values to_double(const std::vector<T>& values) {
  return to_double(values.data(), std::ssize(values));
}

// A feature map in memory of its own, with `gap` elements between samples that nothing may touch.
template <class T>
class Map {
 public:
  Map(int64_t n, int64_t c, int64_t h, int64_t w, Layout layout, int64_t gap, Side side)
      : memory_(n == 0 ? 0 : n * (c * h * w + gap) - gap, side),
        map{memory_.data(), n, c, h, w, c * h * w + gap, layout},
        gap_(gap) {}
  ~Map() {
    const BitsOf<T> poison = static_cast<BitsOf<T>>(~BitsOf<T>{0});
    for (int64_t n = 1; n < map.n; ++n) {
      for (int64_t i = 1; i <= gap_; ++i) {
        if (std::bit_cast<BitsOf<T>>(map.sample(n)[-i]) != poison) fail("written between samples");
      }
    }
  }

  // (n, c, pixel)
  void assign(const std::vector<T>& values) const {
    int64_t i = 0;
    each([&](T& element) { element = values[i++]; });
  }
  std::vector<T> values() const {
    std::vector<T> values;
    values.reserve(map.n * map.sample_size());
    each([&](T& element) { values.push_back(element); });
    return values;
  }

 private:
  template <class F>
  void each(const F& visit) const {
    for (int64_t n = 0; n < map.n; ++n) {
      for (int64_t c = 0; c < map.c; ++c) {
        T* plane = map.sample(n) + c * map.stride_c();
        for (int64_t p = 0; p < map.hw(); ++p) visit(plane[p * map.stride_p()]);
      }
    }
  }

  Guarded<T> memory_;

 public:
  const FeatureMap<T> map;

 private:
  int64_t gap_;
};

// Every NaN the same: which of two NaNs a sum keeps is the compiler's choice.
template <class T>
std::vector<T> one_nan(std::vector<T> values) {
  for (T& v : values) {
    if (std::isnan(widen(v))) v = value_of<T>(std::numeric_limits<double>::quiet_NaN());
  }
  return values;
}

// Bit for bit.
template <class T>
void check_same(const char* what, const std::vector<T>& got, const std::vector<T>& expected) {
  if (got.size() != expected.size()) fail(spell(what, ": ", got.size(), " of ", expected.size()));
  if (got.empty() || std::memcmp(got.data(), expected.data(), got.size() * sizeof(T)) == 0) return;
  std::size_t i = 0;
  while (std::memcmp(&got[i], &expected[i], sizeof(T)) == 0) ++i;
  fail(spell(what, " differs at element ", i, " of ", got.size()));
}

// The difference is at most `tolerance` of the largest, or of `scale`; NaN and infinities are where they must
// be.
void check_largest(const char* what, const Values& got, const Values& expected, double tolerance,
                   double scale = 0);

// By norm, and each element for itself: `tolerance` of it and of the typical one.
void check_values(const char* what, const Values& got, const Values& expected, double tolerance);

template <class F>
void for_each_dtype(const F& call) {
  call.template operator()<Half>();
  call.template operator()<BFloat16>();
  call.template operator()<float>();
  call.template operator()<double>();
}

}  // namespace mod_kernels
