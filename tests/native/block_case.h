// One block: the kernel's results against the reference, and against each other however it is called.
#pragma once

#include <memory>

#include "../../csrc/cpu/block.h"
#include "../../csrc/cpu/runtime.h"
#include "host_runtime.h"
#include "support.h"

namespace mod_kernels {

struct BlockForm {
  int64_t n, c, h, w, k, m, r;  // m: channels between the convolutions, where those are not k
  BlockKind kind = BlockKind::kBottleneck;
  Position position = Position::kFirst;
  Layout layout = Layout::kNchw;
  bool final_relu = false, bias = false, float_weights = false;

  int64_t hw() const { return h * w; }
};

using reference::Then;

struct Layer {
  int64_t inputs, outputs, side;  // inputs of each output
  Then then;
};

// The convolutions of a form's kind, as csrc/cpu/tail.h has them.
inline std::vector<Layer> layers_of(const BlockForm& f) {
  const Then last = f.final_relu ? Then::kRelu : Then::kNothing;
  switch (f.kind) {
    case BlockKind::kBottleneck:
      return {{f.k, f.m, 1, Then::kRelu}, {f.m, f.m, 3, Then::kRelu}, {f.m, f.k, 1, last}};
    case BlockKind::kBasic:
      return {{f.k, f.k, 3, Then::kRelu}, {f.k, f.k, 3, last}};
    case BlockKind::kInvertedResidual:
      return {{f.k, f.m, 1, Then::kRelu6}, {1, f.m, 3, Then::kRelu6}, {f.m, f.k, 1, last}};
    case BlockKind::kConv:
      return {{f.k, f.k, 3, last}};
    case BlockKind::kConvNeXt:
      return {{1, f.k, 7, Then::kLayerNorm}, {f.k, f.m, 1, Then::kGelu}, {f.m, f.k, 1, last}};
  }
  return {};
}

template <class T>
class BlockCase {
  using A = Accumulate<T>;

 public:
  BlockCase(const BlockForm& form, uint64_t seed)
      : f(form),
        random(seed),
        x(map_values<T>(random, f.n, f.c, f.hw())),
        fc1_weight(selector_weight(f.r * f.c, 8 / std::sqrt(f.c))),
        fc2_weight(selector_weight(f.c * f.r, 1 / std::sqrt(f.r))),
        fc1_bias(bias_of(f.r)),
        fc2_bias(bias_of(f.c)) {
    for (const Layer& layer : layers) add_convolution(layer);
    block = {f.kind, f.final_relu, f.position, f.k, f.m};
    for (std::size_t i = 0; i < weights.size(); ++i) {
      block.weight[i] = weights[i]->data();
      block.bias[i] = biases[i]->data();
    }
  }

  void run() {
    const Result whole = call(x, 0, f.n, {.all = true});
    check(whole);
    for (int threads = 1; threads <= most_threads(); ++threads) {
      for (bool in_place : {false, true}) {
        const Result got = call(x, 0, f.n, {.threads = threads, .in_place = in_place});
        check_same("y, whatever the threads", got.y, whole.y);
        check_same("logits, whatever the threads", got.logits, whole.logits);
      }
      const Result selected = call(x, 0, f.n, {.threads = threads, .block = false});
      check_same("scores of a selection", selected.scores, whole.scores);
      check_same("index of a selection", selected.index, whole.index);
    }
    const Result selected = call(x, 0, f.n, {.threads = 2, .block = false, .all = true});
    check_same("pooled of a selection", selected.pooled, whole.pooled);
    check_same("hidden of a selection", selected.hidden, whole.hidden);
    check_same("logits of a selection", selected.logits, whole.logits);
    with_pooled_given(whole);
    if (f.n > 1) alone(whole, random.below(f.n));
  }

 private:
  struct Options {
    int threads = 1;
    bool in_place = false;
    bool block = true;                       // else only a selection
    bool all = false;                        // nothing a caller may have is left to scratch
    const std::vector<A>* pooled = nullptr;  // given
  };
  struct Result {
    std::vector<T> y;
    std::vector<A> pooled, hidden, logits, scores;
    std::vector<int64_t> index;
  };

  const BlockForm f;
  const std::vector<Layer> layers = layers_of(f);
  Random random;
  const std::vector<T> x;
  struct Weights {
    std::unique_ptr<Guarded<T>> own;
    std::unique_ptr<Guarded<float>> wide;
    Values values;
  };
  const Weights fc1_weight, fc2_weight;
  const Guarded<A> fc1_bias, fc2_bias;
  std::vector<std::unique_ptr<Guarded<A>>> weights, biases;
  ConvBlock<A> block;

  Weights selector_weight(int64_t count, double scale) {
    Weights made;
    if (f.float_weights) {
      made.wide = std::make_unique<Guarded<float>>(random_values<float>(random, count, scale), random.side());
      made.values = to_double(made.wide->values());
    } else {
      made.own = std::make_unique<Guarded<T>>(random_values<T>(random, count, scale), random.side());
      made.values = to_double(made.own->values());
    }
    return made;
  }
  Guarded<A> bias_of(int64_t count) { return {random_values<A>(random, f.bias ? count : 0), random.side()}; }
  // Values near 1 after it; before a ReLU6 near 6, which must be seen.
  void add_convolution(const Layer& layer) {
    const int64_t taps = layer.inputs * layer.side * layer.side;
    const double scale = (layer.then == Then::kRelu6 ? 6 : 1) * std::sqrt(3.0 / static_cast<double>(taps));
    weights.push_back(
        std::make_unique<Guarded<A>>(random_values<A>(random, layer.outputs * taps, scale), random.side()));
    biases.push_back(std::make_unique<Guarded<A>>(random_values<A>(random, layer.outputs), random.side()));
  }

  Linear<A> layer(const Weights& weight, const Guarded<A>& bias, int64_t inputs, int64_t outputs,
                  bool relu) const {
    return {weight.wide ? static_cast<const void*>(weight.wide->data()) : weight.own->data(),
            weight.wide ? DType::kFloat : kDType<T>,
            f.bias ? bias.data() : nullptr,
            inputs,
            outputs,
            relu};
  }

  // A small call stays on its thread, however many there are.
  int most_threads() const { return f.n * f.c * f.hw() < kSerialElements ? 1 : 3; }

  // Samples begin to begin + n - 1 of `values`.
  Result call(const std::vector<T>& values, int64_t begin, int64_t n, const Options& options) {
    const int64_t size = f.c * f.hw();
    const std::vector<T> given(values.begin() + begin * size, values.begin() + (begin + n) * size);
    const Map<T> in = map(n), out = map(options.block && !options.in_place ? n : 0);
    in.assign(given);
    const auto memory = [&](bool wanted, int64_t count) { return wanted ? n * count : 0; };
    const Guarded<A> pooled(memory(options.all && !options.pooled, f.c), random.side());
    const Guarded<A> hidden(memory(options.all, f.r), random.side());
    const Guarded<A> logits(memory(options.all || options.block, f.c), random.side());
    const Guarded<A> scores(memory(options.all || !options.block, f.k), random.side());
    const Guarded<int64_t> index(memory(options.all || !options.block, f.k), random.side());
    const Guarded<A> pooled_given(options.pooled ? *options.pooled : std::vector<A>(), random.side());

    const auto given_or_null = []<class E>(const Guarded<E>& m) { return m.size() ? m.data() : nullptr; };
    BlockArguments<T> a;
    a.x = in.map;
    if (options.block) a.y = options.in_place ? in.map : out.map;
    if (options.block) a.block = &block;
    a.pooled_given = given_or_null(pooled_given);
    a.fc1 = layer(fc1_weight, fc1_bias, f.c, f.r, true);
    a.fc2 = layer(fc2_weight, fc2_bias, f.r, f.c, false);
    a.k = f.k;
    a.pooled = given_or_null(pooled);
    a.hidden = given_or_null(hidden);
    a.logits = given_or_null(logits);
    a.scores = given_or_null(scores);
    a.index = given_or_null(index);
    set_thread_count(options.threads);
    run_block(a);
    if (!options.in_place) check_same("x", in.values(), given);
    return {(options.in_place ? in : out).values(),
            pooled.values(),
            hidden.values(),
            logits.values(),
            scores.values(),
            index.values()};
  }
  Map<T> map(int64_t n) { return {n, f.c, f.h, f.w, f.layout, random.coin() ? 5 : 0, random.side()}; }

  // In three stages: the logits; the selection from the kernel's own logits; the rest from its own selection.
  void check(const Result& whole) const {
    const int64_t hw = f.hw(), size = f.c * hw;
    Values pooled, sigmoids, changed, expected_changed;
    for (int64_t n = 0; n < f.n; ++n) {
      const Values sample = to_double(x.data() + n * size, size);
      const Values means = reference::means(sample, f.c);
      pooled.insert(pooled.end(), means.begin(), means.end());
      std::vector<int64_t> index = reference::ranking(whole.logits.data() + n * f.c, f.c);
      index.resize(f.k);
      check_same("index", {whole.index.begin() + n * f.k, whole.index.begin() + (n + 1) * f.k}, index);
      for (int64_t c : index) sigmoids.push_back(reference::sigmoid(whole.logits[n * f.c + c]));

      Values expected = sample;
      const auto target = reference::targets(f.position, f.c, index);
      reference::fuse(expected, hw, convolved(reference::gather(sample, hw, index)),
                      to_double(whole.scores.data() + n * f.k, f.k), target);
      std::vector<T> untouched = {whole.y.begin() + n * size, whole.y.begin() + (n + 1) * size};
      for (int64_t channel : target) {
        for (int64_t i = channel * hw; i < (channel + 1) * hw; ++i) {
          changed.push_back(widen(untouched[i]));
          expected_changed.push_back(expected[i]);
          untouched[i] = x[n * size + i];
        }
      }
      check_same("what passes through", untouched, {x.begin() + n * size, x.begin() + (n + 1) * size});
    }
    check_values("pooled", to_double(whole.pooled), pooled, kValuesTolerance<A>);
    const Values hidden =
        reference::linear(pooled, fc1_weight.values, to_double(fc1_bias.values()), f.n, true);
    check_largest("hidden", to_double(whole.hidden), hidden, kLogitsTolerance<T>);
    check_largest("logits", to_double(whole.logits),
                  reference::linear(hidden, fc2_weight.values, to_double(fc2_bias.values()), f.n, false),
                  kLogitsTolerance<T>);
    check_values("scores", to_double(whole.scores), sigmoids, kValuesTolerance<A>);
    check_values("y", changed, expected_changed, kValuesTolerance<T>);
  }

  Values convolved(Values z) const {
    for (std::size_t i = 0; i < weights.size(); ++i) {
      z = reference::conv(z, to_double(weights[i]->values()), to_double(biases[i]->values()), f.h, f.w,
                          layers[i].side);
      reference::follow(layers[i].then, z, f.hw());
    }
    return z;
  }

  // Then nothing but the selected channels and the targets is computed with, and the others may hold
  // anything.
  void with_pooled_given(const Result& whole) {
    const int64_t hw = f.hw();
    std::vector<T> odd = x, expected = whole.y;
    for (int64_t n = 0; n < f.n; ++n) {
      const std::vector<int64_t> index(whole.index.begin() + n * f.k, whole.index.begin() + (n + 1) * f.k);
      std::vector<int64_t> used = reference::targets(f.position, f.c, index);
      used.insert(used.end(), index.begin(), index.end());
      std::vector<bool> free(f.c, true);
      for (int64_t c : used) free[c] = false;
      for (int64_t c = 0; c < f.c; ++c) {
        if (!free[c]) continue;
        for (int64_t i = (n * f.c + c) * hw; i < (n * f.c + c + 1) * hw; ++i) {
          odd[i] = expected[i] = special_value<T>(random);
        }
      }
    }
    for (int threads = 1; threads <= most_threads(); threads += 2) {
      for (bool in_place : {false, true}) {
        const Options options{.threads = threads, .in_place = in_place, .pooled = &whole.pooled};
        const Result got = call(odd, 0, f.n, options);
        check_same("y, pooled given", got.y, expected);
        check_same("logits, pooled given", got.logits, whole.logits);
      }
    }
  }

  void alone(const Result& whole, int64_t n) {
    const Result got = call(x, n, 1, {.in_place = random.coin()});
    const auto part = [&](const auto& all, int64_t size) {
      return std::decay_t<decltype(all)>(all.begin() + n * size, all.begin() + (n + 1) * size);
    };
    check_same("y of a sample alone", got.y, part(whole.y, f.c * f.hw()));
    check_same("logits of a sample alone", got.logits, part(whole.logits, f.c));
  }
};

}  // namespace mod_kernels
