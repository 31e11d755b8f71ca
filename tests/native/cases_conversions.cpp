#include <array>
#include <bit>
#include <limits>

#include "../../csrc/cpu/storage.h"
#include "cases.h"
#include "support.h"

namespace mod_kernels {
namespace {

template <class T>
struct Format {
  static constexpr int kBias = std::is_same_v<T, Half> ? 15 : 127;
  static constexpr int kLowest = 1 - kBias;  // exponent of the smallest normal number, and of the subnormals
};

// The value of a bit pattern, from its fields.
template <class T>
double value_by_fields(uint16_t bits) {
  constexpr int kAll = (1 << (15 - kMantissa<T>)) - 1;  // ones in every bit of an exponent
  const int exponent = bits >> kMantissa<T> & kAll, mantissa = bits & ((1 << kMantissa<T>)-1);
  const double sign = bits >> 15 ? -1 : 1;
  if (exponent == kAll) {
    return mantissa ? std::numeric_limits<double>::quiet_NaN()
                    : sign * std::numeric_limits<double>::infinity();
  }
  const int whole = exponent ? mantissa + (1 << kMantissa<T>) : mantissa;
  return sign * std::ldexp(whole, std::max(exponent, 1) - Format<T>::kBias - kMantissa<T>);
}

// The nearest value of T's, ties to even, by rounding to a whole number of its last places in double.
template <class T>
double nearest(float value) {
  if (!std::isfinite(value) || value == 0) return value;
  const int exponent = std::max(std::ilogb(static_cast<double>(value)), Format<T>::kLowest);
  const double place = std::ldexp(1.0, exponent - kMantissa<T>);
  const double rounded = std::nearbyint(value / place) * place;
  const double limit = std::ldexp(1.0, Format<T>::kBias + 1);
  return std::abs(rounded) >= limit ? std::copysign(std::numeric_limits<double>::infinity(), value) : rounded;
}

bool same_number(double a, double b) {
  return std::isnan(b) ? std::isnan(a) : a == b && std::signbit(a) == std::signbit(b);
}

// Through the vectors of this ISA level, one after the other.
template <class T>
class Narrowing {
 public:
  void add(float value) {
    values_[count_++] = value;
    if (count_ == kLanes<float>) flush();
  }
  void flush() {
    if (count_ == 0) return;
    T vector[kLanes<float>];
    store(vector, load(values_.data()));
    for (int l = 0; l < count_; ++l) {
      const double expected = nearest<T>(values_[l]);
      const T scalar = narrow<T>(values_[l]);
      if (!same_number(value_by_fields<T>(scalar.bits), expected) ||
          !same_number(value_by_fields<T>(vector[l].bits), expected)) {
        fail(spell(values_[l], " became ", value_by_fields<T>(scalar.bits), " or, in a vector, ",
                   value_by_fields<T>(vector[l].bits), " and not ", expected));
      }
    }
    count_ = 0;
  }

 private:
  std::array<float, kLanes<float>> values_{};
  int count_ = 0;
};

template <class T>
void every_pattern_widens() {
  begin_case(spell(kName<T>, ": every bit pattern widened"));
  constexpr int kCount = kLanes<float>;
  for (int first = 0; first < 0x10000; first += kCount) {
    T patterns[kCount];
    float vector[kCount];
    for (int l = 0; l < kCount; ++l) patterns[l] = {static_cast<uint16_t>(first + l)};
    store(vector, load(patterns));
    for (int l = 0; l < kCount; ++l) {
      const double expected = value_by_fields<T>(patterns[l].bits);
      if (!same_number(widen(patterns[l]), expected) || !same_number(vector[l], expected)) {
        fail(spell("pattern ", patterns[l].bits, " became ", widen(patterns[l]), " or, in a vector, ",
                   vector[l], " and not ", expected));
      }
    }
  }
}

template <class T>
void floats_narrow(bool few) {
  begin_case(spell(kName<T>, ": floats narrowed"));
  Narrowing<T> narrowing;
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const auto add_around = [&](double value) {
    const float middle = static_cast<float>(value);
    for (float v : {std::nextafter(middle, -kInfinity), middle, std::nextafter(middle, kInfinity)}) {
      narrowing.add(v);
      narrowing.add(-v);
    }
  };
  // Each value of T's and the tie above it, the one to infinity among them.
  constexpr uint16_t kInfinite = static_cast<uint16_t>(0x7fff >> kMantissa<T> << kMantissa<T>);
  for (uint16_t bits = 0; bits < kInfinite; ++bits) {
    const double value = value_by_fields<T>(bits), above = value_by_fields<T>(bits + 1);
    add_around(value);
    add_around(std::isinf(above) ? value + (value - value_by_fields<T>(bits - 1)) / 2 : (value + above) / 2);
  }
  // An odd step comes by every exponent and low bit: NaN, infinities and subnormals of float are among them.
  const uint32_t step = few ? 65521 : 4099;
  for (uint64_t bits = 0; bits <= 0xffffffff; bits += step) {
    narrowing.add(std::bit_cast<float>(static_cast<uint32_t>(bits)));
  }
  for (uint32_t bits : {0x7f800000u, 0xff800000u, 0x7f800001u, 0xff800001u, 0x7fffffffu, 0xffffffffu}) {
    narrowing.add(std::bit_cast<float>(bits));
  }
  narrowing.flush();
}

// load_raw_first and store_raw_first: `count` elements and no byte more.
template <class T>
void first_elements() {
  constexpr int kCount = kLanes<Accumulate<T>>;
  for (int count = 1; count < kCount; ++count) {
    for (Side side : {Side::kBegin, Side::kEnd}) {
      begin_case(spell(kName<T>, ": the first ", count, " elements"));
      const Guarded<T> from(count, side), to(count, side);
      const T one = value_of<T>(1);
      std::fill_n(from.data(), count, one);
      T whole[kCount];
      store_raw(whole, load_raw_first(from.data(), count));
      for (int l = 0; l < kCount; ++l) {
        if (widen(whole[l]) != (l < count ? 1 : 0)) fail(spell("element ", l, " is ", widen(whole[l])));
      }
      store_raw_first(to.data(), load_raw_first(from.data(), count), count);
      check_same("what was stored", to.values(), from.values());
    }
  }
}

}  // namespace

void conversion_cases(bool few) {
  every_pattern_widens<Half>();
  every_pattern_widens<BFloat16>();
  floats_narrow<Half>(few);
  floats_narrow<BFloat16>(few);
  for_each_dtype([]<class T>() { first_elements<T>(); });
}

}  // namespace mod_kernels
