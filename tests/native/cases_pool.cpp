#include "../../csrc/cpu/pool.h"
#include "cases.h"
#include "support.h"

namespace mod_kernels {
namespace {

const char* name_of(PassKind kind) {
  static const char* const names[] = {"read", "copy", "relu", "add", "add + relu"};
  return names[static_cast<int>(kind)];
}

template <class T>
struct Pass {
  PassKind kind;
  int64_t channels, hw;
  bool channels_last, in_place;
};

template <class T>
struct Pooled {
  std::vector<T> y;
  std::vector<Accumulate<T>> means;
};

// In parts of `step` channels, the last first: what a part does must not lean on the one before it.
template <class T>
Pooled<T> pool_in_parts(const Pass<T>& pass, const std::vector<T>& a, const std::vector<T>& b, int64_t step,
                        Side side) {
  const bool adds = pass.kind == PassKind::kAdd || pass.kind == PassKind::kAddRelu;
  const Guarded<T> in(a, side), second(adds ? b : std::vector<T>(), side);
  const Guarded<T> out(pass.kind == PassKind::kRead || pass.in_place ? 0 : std::ssize(a), side);
  const Guarded<Accumulate<T>> means(pass.channels, side);
  const PoolPass<T> call{pass.kind, in.data(), adds ? second.data() : nullptr,
                         pass.in_place ? in.data() : out.data()};
  for (int64_t begin = (pass.channels - 1) / step * step; begin >= 0; begin -= step) {
    pool_sample(call, pass.channels, pass.hw, pass.channels_last, begin,
                std::min(begin + step, pass.channels), means.data());
  }
  const bool in_a = pass.kind == PassKind::kRead || pass.in_place;
  if (!in_a) check_same("a", in.values(), a);
  return {(in_a ? in : out).values(), means.values()};
}

template <class T>
void pool_case(const Pass<T>& pass, int specials, Random& random) {
  begin_case(spell("pool, ", name_of(pass.kind), ", ", kName<T>, ", C=", pass.channels, " HW=", pass.hw,
                   pass.channels_last ? " channels_last" : "", pass.in_place ? " in place" : "",
                   specials ? " with special values" : ""));
  const std::vector<T> a = map_values<T>(random, 1, pass.channels, pass.hw, specials);
  const std::vector<T> b = map_values<T>(random, 1, pass.channels, pass.hw, specials);
  const Pooled<T> got = pool_in_parts(pass, a, b, pass.channels, random.side());
  for (int64_t step : {kPoolGroup, 2 * kPoolGroup}) {
    if (step >= pass.channels) continue;
    const Pooled<T> parts = pool_in_parts(pass, a, b, step, random.side());
    check_same("y in parts", one_nan(parts.y), one_nan(got.y));
    check_same("the means in parts", one_nan(parts.means), one_nan(got.means));
  }

  if (pass.kind == PassKind::kRead || pass.kind == PassKind::kCopy) {
    check_same("y", got.y, a);
  } else {
    const bool adds = pass.kind != PassKind::kRelu;
    Values y = to_double(a);
    for (std::size_t i = 0; i < y.size(); ++i) {
      if (adds) y[i] += widen(b[i]);
      if (pass.kind != PassKind::kAdd) y[i] = reference::relu(y[i]);
    }
    check_values("y", to_double(got.y), y, kValuesTolerance<T>);
  }
  // The mean of what was written; (channel, pixel) for the reference.
  Values y = to_double(got.y);
  if (pass.channels_last) {
    for (int64_t c = 0; c < pass.channels; ++c) {
      for (int64_t p = 0; p < pass.hw; ++p) y[c * pass.hw + p] = widen(got.y[p * pass.channels + c]);
    }
  }
  check_values("the means", to_double(got.means), reference::means(y, pass.channels),
               kValuesTolerance<Accumulate<T>>);
}

constexpr int64_t kSizes[][2] = {{1, 1},    {7, 3},     {33, 49}, {64, 784}, {70, 35},  {70, 1},   {160, 196},
                                 {256, 49}, {300, 196}, {600, 3}, {600, 70}, {2048, 1}, {2048, 20}};

}  // namespace

void pool_cases(bool few) {
  Random random(1);
  for_each_dtype([&]<class T>() {
    for (const auto& [channels, hw] : kSizes) {
      if (few && channels * hw > 10000) continue;
      for (PassKind kind :
           {PassKind::kRead, PassKind::kCopy, PassKind::kRelu, PassKind::kAdd, PassKind::kAddRelu}) {
        for (bool channels_last : {false, true}) {
          const bool either = kind != PassKind::kRead && kind != PassKind::kCopy;
          for (bool in_place : {false, true}) {
            if (in_place && !either) continue;
            pool_case<T>({kind, channels, hw, channels_last, in_place}, in_place == channels_last ? 1 : 0,
                         random);
          }
        }
      }
    }
  });
}

}  // namespace mod_kernels
