#include <limits>

#include "../../csrc/cpu/linear.h"
#include "../../csrc/cpu/top_k.h"
#include "cases.h"
#include "support.h"

namespace mod_kernels {
namespace {

template <class A>
std::vector<A> linear_rows(Linear<A> layer, const std::vector<A>& in, int64_t samples, int64_t step,
                           Side side) {
  const Guarded<A> from(in, side), out(samples * layer.outputs, side);
  for (int64_t begin = 0; begin < layer.outputs; begin += step) {
    linear(layer, from.data(), samples, begin, std::min(begin + step, layer.outputs), out.data());
  }
  return one_nan(out.values());
}

template <class A, class W>
void linear_case(int64_t inputs, int64_t outputs, int64_t samples, bool infinite, Random& random) {
  const bool with_bias = random.coin(), with_relu = random.coin();
  begin_case(spell("linear, ", kName<A>, " by ", kName<W>, ", ", inputs, " -> ", outputs, ", N=", samples,
                   with_bias ? " bias" : "", with_relu ? " relu" : "", infinite ? " with infinities" : ""));
  std::vector<A> in = random_values<A>(random, samples * inputs);
  std::vector<W> weights = random_values<W>(random, outputs * inputs);
  if (infinite) {
    constexpr double kInfinity = std::numeric_limits<double>::infinity();
    in[random.below(std::ssize(in))] = value_of<A>(kInfinity);
    weights[random.below(std::ssize(weights))] = value_of<W>(kInfinity);
  }
  const Guarded<W> weight(weights, random.side());
  const Guarded<A> bias(random_values<A>(random, with_bias ? outputs : 0), random.side());
  const Linear<A> layer{weight.data(), kDType<W>, with_bias ? bias.data() : nullptr,
                        inputs,        outputs,   with_relu};
  const std::vector<A> got = linear_rows(layer, in, samples, outputs, random.side());
  const Values expected = reference::linear(to_double(in), to_double(weight.values()),
                                            to_double(bias.values()), samples, with_relu);
  // Of the inputs' size: a sum of 2048 may cancel to nothing.
  check_largest("out", to_double(got), expected, kLogitsTolerance<A> / 100, static_cast<double>(inputs) / 4);

  check_same("out in parts", linear_rows(layer, in, samples, 1 + random.below(9), random.side()), got);
  for (int64_t n = 0; n < samples; ++n) {
    const std::vector<A> one(in.begin() + n * inputs, in.begin() + (n + 1) * inputs);
    const std::vector<A> in_batch(got.begin() + n * outputs, got.begin() + (n + 1) * outputs);
    check_same("a sample alone", linear_rows(layer, one, 1, outputs, random.side()), in_batch);
  }
}

template <class A>
std::vector<A> logits_of(int pattern, int64_t channels, Random& random) {
  constexpr A kInfinity = std::numeric_limits<A>::infinity(), kNan = std::numeric_limits<A>::quiet_NaN();
  const A ties[] = {kNan,
                    -kNan,
                    kInfinity,
                    -kInfinity,
                    A{0},
                    -A{0},
                    A{1},
                    A{-1},
                    std::numeric_limits<A>::max(),
                    std::numeric_limits<A>::denorm_min(),
                    -std::numeric_limits<A>::denorm_min()};
  std::vector<A> logits = random_values<A>(random, channels, 8);
  for (int64_t c = 0; c < channels; ++c) {
    switch (pattern) {
      case 0:  // all different
        break;
      case 1:  // hardly any
        logits[c] = ties[random.below(std::ssize(ties))];
        break;
      case 2:  // some
        if (random.below(10) == 0) logits[c] = ties[random.below(std::ssize(ties))];
        break;
      case 3:
        logits[c] = static_cast<A>(c);
        break;
      case 4:
        logits[c] = static_cast<A>(-c);
        break;
      case 5:
        logits[c] = random.coin() ? A{0} : -A{0};
        break;
      case 6:
        logits[c] = random.coin() ? kNan : -kNan;
        break;
      default:  // a long run of equals with few below: more reach any bound than a short list holds
        logits[c] = random.below(50) == 0 ? A{-1} : A{2};
    }
  }
  return logits;
}
constexpr int kPatterns = 8;

template <class A>
void top_k_case(int64_t channels, int64_t k, int pattern, Random& random) {
  begin_case(spell("top_k, ", kName<A>, ", C=", channels, " k=", k, " pattern ", pattern));
  const Guarded<A> logits(logits_of<A>(pattern, channels, random), random.side()), scores(k, random.side());
  const Guarded<int64_t> index(k, random.side());
  top_k(logits.data(), channels, k, scores.data(), index.data());
  std::vector<int64_t> expected = reference::ranking(logits.data(), channels);
  expected.resize(k);
  check_same("index", index.values(), expected);
  Values sigmoids;
  for (int64_t channel : expected) sigmoids.push_back(reference::sigmoid(logits[channel]));
  check_values("scores", to_double(scores.values()), sigmoids, kValuesTolerance<A>);
}

}  // namespace

void linear_cases(bool few) {
  Random random(2);
  for (int64_t inputs : {1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64, 70, 300, 2048}) {
    for (int64_t outputs : {1, 3, 4, 5, 8, 11, 16, 70}) {
      if (few && inputs * outputs > 1000) continue;
      for (int64_t samples : {1, 2, 3, 4, 5, 9}) {
        if (few && random.below(4) != 0) continue;
        const bool infinite = random.below(4) == 0;
        linear_case<float, Half>(inputs, outputs, samples, infinite, random);
        linear_case<float, BFloat16>(inputs, outputs, samples, infinite, random);
        linear_case<float, float>(inputs, outputs, samples, infinite, random);
        linear_case<double, float>(inputs, outputs, samples, infinite, random);
        linear_case<double, double>(inputs, outputs, samples, infinite, random);
      }
    }
  }
}

void top_k_cases(bool few) {
  Random random(3);
  for (int64_t channels : {1, 2, 7, 16, 33, 64, 70, 160, 256, 300, 600, 2048}) {
    if (few && channels > 600) continue;
    for (int64_t k : {1, 2, 4, 9, 31, 64, 65, 100, 300, 2048}) {
      if (k > channels) k = channels;
      for (int pattern = 0; pattern < kPatterns; ++pattern) {
        top_k_case<float>(channels, k, pattern, random);
        top_k_case<double>(channels, k, pattern, random);
      }
      if (k == channels) break;
    }
  }
}

}  // namespace mod_kernels
