#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include "../../csrc/cpu/conv_training.h"
#include "cases.h"
#include "host_runtime.h"
#include "support.h"

namespace mod_kernels {
namespace {

struct Layers {
  int64_t outputs;
  int taps;
};

struct Shape {
  int64_t n, k, h, w;
  std::vector<Layers> layers;
  bool batch_statistics, final_relu, affine;
};

template <class A>
struct Parameters {
  std::vector<std::unique_ptr<Guarded<A>>> weight, gamma, beta, mean, var;
};

// What the block must compute from the forward's own convolutions and statistics, so that both take the same
// side of each ReLU.
struct Expected {
  const Shape& s;
  int64_t hw = s.h * s.w, count = s.n * hw;
  std::vector<Values> weight, c, scale, mean, inverse, beta;  // by layer

  bool relu(int l) const { return s.final_relu || l + 1 < static_cast<int>(s.layers.size()); }

  double y(int l, int64_t at, int64_t o) const {
    const double v = scale[l][o] * (c[l][at] - mean[l][o]) + beta[l][o];
    return relu(l) ? reference::relu(v) : v;
  }

  // visit(output position, input position, weight position) of every product of layer l.
  template <class F>
  void products(int l, int64_t inputs, const F& visit) const {
    const int64_t outputs = s.layers[l].outputs, taps = s.layers[l].taps, side = taps == 9 ? 3 : 1;
    for (int64_t n = 0; n < s.n; ++n) {
      for (int64_t o = 0; o < outputs; ++o) {
        for (int64_t i = 0; i < inputs; ++i) {
          for (int64_t t = 0; t < taps; ++t) {
            for (int64_t p = 0; p < hw; ++p) {
              const int64_t row = p / s.w + t / side - side / 2, column = p % s.w + t % side - side / 2;
              if (row < 0 || row >= s.h || column < 0 || column >= s.w) continue;
              visit((n * outputs + o) * hw + p, (n * inputs + i) * hw + row * s.w + column,
                    (o * inputs + i) * taps + t);
            }
          }
        }
      }
    }
  }

  Values outputs(int l) const {
    Values all(c[l].size());
    for (std::size_t i = 0; i < all.size(); ++i) all[i] = y(l, i, i / hw % s.layers[l].outputs);
    return all;
  }

  Values convolved(int l, const Values& input, int64_t inputs) const {
    Values out(c[l].size());
    products(l, inputs, [&](int64_t o, int64_t i, int64_t w) { out[o] += input[i] * weight[l][w]; });
    return out;
  }

  // Gradients of layer l: of its parameters, and dy becomes that of its input.
  void back(int l, const Values& input, int64_t inputs, Values& dy, Values& dweight, Values& dgamma,
            Values& dbeta) const {
    const int64_t outputs = s.layers[l].outputs;
    dgamma.assign(outputs, 0);
    dbeta.assign(outputs, 0);
    for (std::size_t i = 0; i < dy.size(); ++i) {
      const int64_t o = i / hw % outputs;
      if (relu(l) && y(l, i, o) <= 0) dy[i] = 0;
      dbeta[o] += dy[i];
      dgamma[o] += dy[i] * (c[l][i] - mean[l][o]) * inverse[l][o];
    }
    for (std::size_t i = 0; i < dy.size(); ++i) {
      const int64_t o = i / hw % outputs;
      const double xhat = (c[l][i] - mean[l][o]) * inverse[l][o];
      const double over_batch = s.batch_statistics ? (dbeta[o] + xhat * dgamma[o]) / count : 0;
      dy[i] = scale[l][o] * (dy[i] - over_batch);
    }
    Values below(s.n * inputs * hw);
    dweight.assign(weight[l].size(), 0);
    products(l, inputs, [&](int64_t o, int64_t i, int64_t w) {
      dweight[w] += dy[o] * input[i];
      below[i] += dy[o] * weight[l][w];
    });
    dy = below;
  }
};

// Channels first to first + count - 1 of every sample.
template <class A>
Values channels_of(const std::vector<A>& map, int64_t n, int64_t channels, int64_t first, int64_t count,
                   int64_t hw) {
  Values out;
  for (int64_t i = 0; i < n; ++i) {
    const auto from = map.begin() + (i * channels + first) * hw;
    out.insert(out.end(), from, from + count * hw);
  }
  return out;
}

template <class A>
void training_case(const Shape& s, Random& random) {
  begin_case(spell("training, ", kName<A>, " N=", s.n, " k=", s.k, " H=", s.h, " W=", s.w, " layers ",
                   s.layers.size(), s.batch_statistics ? " of the batch" : " running",
                   s.final_relu ? " relu" : "", s.affine ? " affine" : ""));
  const int layers = static_cast<int>(s.layers.size());
  const int64_t hw = s.h * s.w;
  const Layout nchw = Layout::kNchw;
  const Map<A> x(s.n, s.k, s.h, s.w, nchw, random.coin() ? 3 : 0, random.side());
  x.assign(random_values<A>(random, s.n * s.k * hw));
  Parameters<A> parameters;
  const auto guarded = [&](int64_t count, double scale, double shift) {
    std::vector<A> values = random_values<A>(random, count, scale);
    for (A& value : values) value += static_cast<A>(shift);
    return std::make_unique<Guarded<A>>(values, random.side());
  };
  TrainedBlock<A> block;
  block.layers = layers;
  block.batch_statistics = s.batch_statistics;
  block.final_relu = s.final_relu;
  block.x = x.map;
  int64_t inputs = s.k;
  for (int l = 0; l < layers; ++l) {
    const auto [outputs, taps] = s.layers[l];
    parameters.weight.push_back(guarded(outputs * inputs * taps, 0.5, 0));
    parameters.gamma.push_back(guarded(outputs, 0.5, 1));
    parameters.beta.push_back(guarded(outputs, 0.5, 0));
    block.layer[l] = {inputs, outputs, taps, block.channels, parameters.weight[l]->data()};
    if (s.affine) {
      block.layer[l].gamma = parameters.gamma[l]->data();
      block.layer[l].beta = parameters.beta[l]->data();
    }
    block.channels += outputs;
    inputs = outputs;
  }
  const int64_t k_out = inputs, total = block.channels;
  const Map<A> convolved(s.n, total, s.h, s.w, nchw, 0, random.side()),
      z(s.n, k_out, s.h, s.w, nchw, 0, random.side());
  const Guarded<A> statistics(2 * total, random.side());
  block.convolved = convolved.map;
  block.statistics = statistics.data();

  std::vector<A> running;
  const auto forward = [&](int threads) {
    set_thread_count(threads);
    TrainedForward<A> f{block, z.map};
    f.momentum = 0.3;
    f.eps = 1e-3;
    std::vector<std::unique_ptr<Guarded<A>>> kept;
    for (int l = 0; l < layers; ++l) {
      const int64_t outputs = s.layers[l].outputs;
      kept.push_back(std::make_unique<Guarded<A>>(std::vector<A>(outputs, A(0.25)), Side::kEnd));
      f.running_mean[l] = kept.back()->data();
      kept.push_back(std::make_unique<Guarded<A>>(std::vector<A>(outputs, A(0.75)), Side::kEnd));
      f.running_var[l] = kept.back()->data();
    }
    train_forward(f);
    std::vector<A> all = z.values(), more = convolved.values(), stats = statistics.values();
    all.insert(all.end(), more.begin(), more.end());
    all.insert(all.end(), stats.begin(), stats.end());
    running.clear();
    for (const auto& one : kept) running.insert(running.end(), one->data(), one->data() + one->size());
    all.insert(all.end(), running.begin(), running.end());
    return all;
  };
  const std::vector<A> on_three = forward(3);
  check_same("forward on three threads", on_three, forward(1));

  Expected e{s};
  std::vector<Values> input{to_double(x.values())};
  const double tolerance = kValuesTolerance<A>;
  int64_t at = 0;
  for (int l = 0; l < layers; ++l) {
    const int64_t outputs = s.layers[l].outputs, first = block.layer[l].first_channel;
    e.weight.push_back(to_double(parameters.weight[l]->values()));
    e.c.push_back(channels_of(convolved.values(), s.n, total, first, outputs, hw));
    Values mean, inverse, scale, beta;
    for (int64_t o = 0; o < outputs; ++o) {
      mean.push_back(statistics[first + o]);
      inverse.push_back(statistics[total + first + o]);
      scale.push_back(inverse[o] * (s.affine ? (*parameters.gamma[l])[o] : A(1)));
      beta.push_back(s.affine ? (*parameters.beta[l])[o] : A(0));
    }
    Values exact_mean(outputs), exact_var(outputs), exact_running;
    for (std::size_t i = 0; i < e.c[l].size(); ++i) exact_mean[i / hw % outputs] += e.c[l][i] / e.count;
    for (std::size_t i = 0; i < e.c[l].size(); ++i) {
      const double apart = e.c[l][i] - exact_mean[i / hw % outputs];
      exact_var[i / hw % outputs] += apart * apart / e.count;
    }
    Values running_mean, running_var, exact_inverse;
    for (int64_t o = 0; o < outputs; ++o) {
      const bool batch = s.batch_statistics;
      const double unbiased = exact_var[o] * e.count / (e.count - 1);
      running_mean.push_back(batch ? 0.3 * exact_mean[o] + 0.7 * 0.25 : 0.25);
      running_var.push_back(batch ? 0.3 * unbiased + 0.7 * 0.75 : 0.75);
      if (!batch) exact_mean[o] = 0.25, exact_var[o] = 0.75;
      exact_inverse.push_back(1 / std::sqrt(exact_var[o] + 1e-3));
    }
    check_largest("mean", mean, exact_mean, tolerance, 1);
    check_values("1 / sqrt(var + eps)", inverse, exact_inverse, tolerance);
    check_largest("running mean", to_double(running.data() + at, outputs), running_mean, tolerance, 1);
    check_values("running var", to_double(running.data() + at + outputs, outputs), running_var, tolerance);
    at += 2 * outputs;
    e.mean.push_back(mean), e.inverse.push_back(inverse), e.scale.push_back(scale), e.beta.push_back(beta);
    check_values("convolved", e.c[l], e.convolved(l, input[l], l ? s.layers[l - 1].outputs : s.k), tolerance);
    input.push_back(e.outputs(l));
  }
  check_values("z", to_double(z.values()), input[layers], tolerance);

  const Map<A> dz(s.n, k_out, s.h, s.w, nchw, random.coin() ? 5 : 0, random.side());
  dz.assign(random_values<A>(random, s.n * k_out * hw));
  // All gradients, or that of `which` alone: of x, then weight, gamma, beta of each layer.
  const auto backward = [&](int which, int threads) {
    set_thread_count(threads);
    const Map<A> dx(s.n, s.k, s.h, s.w, nchw, 0, random.side());
    TrainedBackward<A> b{block, dz.map};
    const auto wanted = [&](int number) { return which < 0 || which == number; };
    if (wanted(0)) b.dx = dx.map;
    std::vector<std::vector<A>> out(1 + 3 * layers);
    std::vector<std::unique_ptr<Guarded<A>>> memory;
    const auto to = [&](int number, int64_t count) -> A* {
      if (!wanted(number)) return nullptr;
      memory.push_back(std::make_unique<Guarded<A>>(count, random.side()));
      return memory.back()->data();
    };
    for (int l = 0; l < layers; ++l) {
      b.dweight[l] = to(1 + 3 * l, block.layer[l].weights());
      b.dgamma[l] = to(2 + 3 * l, block.layer[l].outputs);
      b.dbeta[l] = to(3 + 3 * l, block.layer[l].outputs);
    }
    train_backward(b);
    if (wanted(0)) out[0] = dx.values();
    auto next = memory.begin();
    for (int number = 1; number <= 3 * layers; ++number) {
      if (wanted(number)) out[number] = (*next++)->values();
    }
    return out;
  };
  const auto found = backward(-1, 1), shared = backward(-1, 3);
  std::vector<Values> expected(1 + 3 * layers);
  Values dy = to_double(dz.values());
  for (int l = layers - 1; l >= 0; --l) {
    e.back(l, input[l], l ? s.layers[l - 1].outputs : s.k, dy, expected[1 + 3 * l], expected[2 + 3 * l],
           expected[3 + 3 * l]);
  }
  expected[0] = dy;
  for (int number = 0; number <= 3 * layers; ++number) {
    const std::string name = spell("gradient ", number);
    // Sums over all samples of terms about as large as 1, through two or three norms.
    check_largest(name.c_str(), to_double(found[number]), expected[number], 20 * tolerance, 1);
    check_same((name + " on three threads").c_str(), shared[number], found[number]);
    check_same((name + " alone").c_str(), backward(number, 1)[number], found[number]);
  }
}

}  // namespace

void training_cases(bool few) {
  Random random(7);
  const auto bottleneck = [](int64_t k, int64_t m) { return std::vector<Layers>{{m, 1}, {m, 9}, {k, 1}}; };
  const auto basic = [](int64_t k) { return std::vector<Layers>{{k, 9}, {k, 9}}; };
  const struct {
    int64_t n, k, h, w;
    std::vector<Layers> layers;
  } shapes[] = {{2, 1, 1, 1, bottleneck(1, 1)},   {3, 4, 5, 7, bottleneck(4, 1)},
                {37, 9, 7, 7, bottleneck(9, 2)},  {2, 33, 4, 4, bottleneck(33, 8)},
                {1, 8, 28, 28, bottleneck(8, 2)}, {2, 1, 16, 16, basic(1)},
                {5, 3, 1, 49, basic(3)},          {18, 7, 3, 1, basic(7)},
                {3, 9, 14, 14, basic(9)},         {2, 5, 6, 6, {{7, 1}}}};
  for (const auto& [n, k, h, w, layers] : shapes) {
    if (few && n * k * h * w > 2000) continue;
    for (int setting = 0; setting < 4; ++setting) {
      const Shape shape{n, k, h, w, layers, setting != 3, setting == 1, setting != 2};
      training_case<float>(shape, random);
      training_case<double>(shape, random);
    }
  }
}

}  // namespace mod_kernels
