// What each stage of a block costs by itself, kernels linked without torch; benchmarks/cpu_stages.py builds
// and runs it for each ISA level and keeps what it prints. One thread. Every line is a JSON object.
//
// A stage runs over the whole batch before it is timed again, so that what it reads is as far away as it is
// in a network: x comes from memory where it is larger than the caches.
#include <algorithm>
#include <array>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "../../csrc/cpu/block.h"
#include "../../csrc/cpu/pool.h"
#include "../../csrc/cpu/runtime.h"
#include "../../csrc/cpu/storage.h"
#include "../../csrc/cpu/top_k.h"

namespace mod_kernels {

int64_t thread_count() { return 1; }
int64_t thread_index() { return 0; }
void run_parallel(int64_t count, void (*work)(void*, int64_t, int64_t), void* context) {
  work(context, 0, count);
}
Scratch::Scratch(int64_t bytes) {
  owner_ = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
  data_ = static_cast<char*>(owner_);
}
Scratch::~Scratch() { std::free(owner_); }

namespace {

constexpr int kRounds = 15;
constexpr double kSampleSeconds = 2e-3;  // a measurement lasts at least this long

double seconds(const std::function<void()>& work, int64_t repeats) {
  const auto start = std::chrono::steady_clock::now();
  for (int64_t i = 0; i < repeats; ++i) work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() / repeats;
}

// The median of kRounds.
double median(const std::function<void()>& work) {
  work();
  const int64_t repeats = std::max<int64_t>(1, static_cast<int64_t>(kSampleSeconds / seconds(work, 1)));
  std::vector<double> times;
  for (int i = 0; i < kRounds; ++i) times.push_back(seconds(work, repeats));
  std::nth_element(times.begin(), times.begin() + kRounds / 2, times.end());
  return times[kRounds / 2];
}

template <class A>
struct Buffer {
  explicit Buffer(int64_t size)
      : scratch(size * sizeof(A) + 64), data(reinterpret_cast<A*>(scratch.data())) {}
  Scratch scratch;
  A* data;
};

// Small numbers of both signs, without a library's generator in the way.
template <class T>
void fill(T* data, int64_t count, Accumulate<T> scale) {
  uint64_t state = 88172645463325252u;
  for (int64_t i = 0; i < count; ++i) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    data[i] = narrow<T>(scale * (static_cast<Accumulate<T>>(state >> 40) / Accumulate<T>(1 << 23) - 1));
  }
}

struct Kind {
  const char* name;
  BlockKind kind;
  int64_t channels_of_each;  // C / k, the paper's c
};
constexpr Kind kBottleneck{"bottleneck", BlockKind::kBottleneck, 64};
constexpr Kind kBasic{"basic", BlockKind::kBasic, 64};
constexpr Kind kInvertedResidual{"inverted_residual", BlockKind::kInvertedResidual, 16};
constexpr Kind kConv{"conv", BlockKind::kConv, 64};
constexpr Kind kConvNeXt{"convnext", BlockKind::kConvNeXt, 96};

struct Shape {
  Kind kind;
  int64_t c, side, n;
  int64_t k() const { return std::max<int64_t>(1, c / kind.channels_of_each); }
  int64_t m() const {
    switch (kind.kind) {
      case BlockKind::kBottleneck:
        return std::max<int64_t>(1, k() / 4);
      case BlockKind::kInvertedResidual:
        return 6 * k();
      case BlockKind::kConvNeXt:
        return 4 * k();
      default:
        return k();
    }
  }
  int64_t r() const { return std::max<int64_t>(1, c / 16); }
  // Weights of each convolution, which is also its multiply-adds for each pixel.
  std::array<int64_t, 3> weights() const {
    const int64_t k = this->k(), m = this->m();
    switch (kind.kind) {
      case BlockKind::kBottleneck:
        return {k * m, 9 * m * m, m * k};
      case BlockKind::kBasic:
        return {9 * k * k, 9 * k * k, 0};
      case BlockKind::kInvertedResidual:
        return {k * m, 9 * m, m * k};
      case BlockKind::kConv:
        return {9 * k * k, 0, 0};
      case BlockKind::kConvNeXt:
        return {49 * k, k * m, m * k};
    }
    return {};
  }
};

template <class T>
constexpr const char* name_of() {
  if (std::is_same_v<T, Half>) return "float16";
  if (std::is_same_v<T, BFloat16>) return "bfloat16";
  return std::is_same_v<T, double> ? "float64" : "float32";
}

template <class T>
constexpr DType tag_of() {
  if (std::is_same_v<T, Half>) return DType::kHalf;
  if (std::is_same_v<T, BFloat16>) return DType::kBFloat16;
  return std::is_same_v<T, double> ? DType::kDouble : DType::kFloat;
}

template <class T>
void measure(const Shape& s, bool channels_last) {
  using A = Accumulate<T>;
  const int64_t hw = s.side * s.side, sample = s.c * hw, k = s.k(), m = s.m(), r = s.r();
  const auto [first, second, third] = s.weights();
  const int64_t macs = first + second + third;
  Buffer<T> x(s.n * sample), weights(2 * s.c * r);
  Buffer<A> pooled(s.n * s.c), hidden(s.n * r), logits(s.n * s.c), scores(s.n * k), conv(macs), bias(k + m);
  Buffer<int64_t> index(s.n * k);
  fill(x.data, s.n * sample, 1);
  fill(weights.data, 2 * s.c * r, 1);
  fill(conv.data, macs, A(0.01));
  fill(bias.data, k + m, A(0.01));
  const FeatureMap<T> map{
      x.data, s.n, s.c, s.side, s.side, sample, channels_last ? Layout::kChannelsLast : Layout::kNchw};
  ConvBlock<A> block{s.kind.kind, false, Position::kFirst, k, m};
  block.weight[0] = conv.data;
  block.weight[1] = conv.data + first;
  block.weight[2] = conv.data + first + second;
  for (const A*& b : block.bias) b = bias.data;
  const Linear<A> fc1{weights.data, tag_of<T>(), nullptr, s.c, r, true};
  const Linear<A> fc2{weights.data + s.c * r, tag_of<T>(), nullptr, r, s.c, false};
  Buffer<A> scratch(tail_scratch(map, block));

  const auto report = [&](const char* stage, int64_t bytes, int64_t operations,
                          const std::function<void()>& f) {
    const double t = median(f);
    std::printf(
        "{\"block\": \"%ldx%ldx%ld\", \"kind\": \"%s\", \"n\": %ld, \"dtype\": \"%s\", \"layout\": \"%s\", "
        "\"stage\": \"%s\", \"us\": %.4g, \"bytes\": %ld, \"flop\": %ld, \"gb_s\": %.4g, \"gflop_s\": "
        "%.4g}\n",
        s.c, s.side, s.side, s.kind.name, s.n, name_of<T>(), channels_last ? "channels_last" : "nchw", stage,
        t * 1e6, bytes, operations, bytes / t / 1e9, operations / t / 1e9);
    std::fflush(stdout);
  };
  const int64_t element = sizeof(T), wide = sizeof(A);
  report("pool", s.n * sample * element, s.n * sample, [&] {
    for (int64_t n = 0; n < s.n; ++n) {
      const PoolPass<T> pass{PassKind::kRead, map.sample(n)};
      pool_sample(pass, s.c, hw, channels_last, 0, s.c, pooled.data + n * s.c);
    }
  });
  report("selector", 2 * s.c * r * element + s.n * 2 * (s.c + r) * wide, s.n * 4 * s.c * r, [&] {
    linear(fc1, pooled.data, s.n, 0, r, hidden.data);
    linear(fc2, hidden.data, s.n, 0, s.c, logits.data);
  });
  // What the batch saves: the same with the weights read again for every sample.
  report("selector_each", 2 * s.c * r * element + s.n * 2 * (s.c + r) * wide, s.n * 4 * s.c * r, [&] {
    for (int64_t n = 0; n < s.n; ++n) {
      linear(fc1, pooled.data + n * s.c, 1, 0, r, hidden.data + n * r);
      linear(fc2, hidden.data + n * r, 1, 0, s.c, logits.data + n * s.c);
    }
  });
  report("top_k", s.n * s.c * wide, 0, [&] {
    for (int64_t n = 0; n < s.n; ++n) {
      top_k(logits.data + n * s.c, s.c, k, scores.data + n * k, index.data + n * k);
    }
  });
  report("tail", 3 * s.n * k * hw * element, s.n * 2 * macs * hw, [&] {
    for (int64_t n = 0; n < s.n; ++n) {
      tail_sample(map, n, block, scores.data + n * k, index.data + n * k, scratch.data);
    }
  });
  BlockArguments<T> all;
  all.x = all.y = map;
  all.fc1 = fc1;
  all.fc2 = fc2;
  all.k = k;
  all.block = &block;
  all.logits = logits.data;
  report("block", s.n * (sample + 3 * k * hw) * element + 2 * s.c * r * element,
         s.n * (sample + 4 * s.c * r + 2 * macs * hw), [&] { run_block(all); });
}

// Bytes a second of summing a buffer of `bytes`, the fastest of several: memory where it is large, a cache
// where it is small.
double read_rate(int64_t bytes) {
  Buffer<float> data(bytes / 4);
  std::fill_n(data.data, bytes / 4, 1.0f);
  volatile float sink;
  const auto read = [&] {
    Vec<float> sum[4] = {};
    for (int64_t i = 0; i + 4 * kLanes<float> <= bytes / 4; i += 4 * kLanes<float>) {
      for (int j = 0; j < 4; ++j) sum[j] += load(data.data + i + j * kLanes<float>);
    }
    sink = (sum[0] + sum[1] + sum[2] + sum[3])[0];
  };
  double best = 1e9;
  const int64_t repeats = std::max<int64_t>(1, (64 << 20) / bytes);
  for (int i = 0; i < 10; ++i) best = std::min(best, seconds(read, repeats));
  (void)sink;
  return bytes / best;
}

// Float multiply-adds in registers, operations a second.
double peak_rate() {
  constexpr int kSums = kRegisters / 2;
  constexpr int64_t kSteps = 1 << 20;
  volatile float factor = 1e-9f, sink;
  const auto multiply = [&] {
    Vec<float> sum[kSums];
    for (Vec<float>& s : sum) s = splat<float>(factor);  // read each time: equal sums would be computed once
    const Vec<float> a = splat<float>(factor);
    for (int64_t i = 0; i < kSteps; ++i) {
#pragma GCC unroll 16
      for (int j = 0; j < kSums; ++j) sum[j] += a * sum[j];
    }
    for (const Vec<float>& s : sum) sink = s[0];
  };
  double best = 1e9;
  for (int i = 0; i < 5; ++i) best = std::min(best, seconds(multiply, 1));
  (void)sink;
  return 2.0 * kSteps * kSums * kLanes<float> / best;
}

template <class T>
void measure_all(const std::string& blocks, int64_t only_n) {
  for (const int64_t n : {1, 8, 32}) {
    if (only_n && n != only_n) continue;
    for (const bool last : {false, true}) {
      for (const Shape& s : {Shape{kBottleneck, 256, 56, n},
                             {kBottleneck, 512, 28, n},
                             {kBottleneck, 1024, 14, n},
                             {kBottleneck, 2048, 7, n},
                             {kBasic, 64, 56, n},
                             {kBasic, 128, 28, n},
                             {kBasic, 256, 14, n},
                             {kBasic, 512, 7, n},
                             {kInvertedResidual, 24, 56, n},
                             {kInvertedResidual, 32, 28, n},
                             {kInvertedResidual, 64, 14, n},
                             {kInvertedResidual, 96, 14, n},
                             {kInvertedResidual, 160, 7, n},
                             {kConv, 64, 32, n},
                             {kConv, 128, 16, n},
                             {kConv, 256, 8, n},
                             {kConv, 512, 4, n},
                             {kConv, 512, 2, n},
                             {kConv, 64, 224, n},
                             {kConv, 128, 112, n},
                             {kConv, 256, 56, n},
                             {kConv, 512, 28, n},
                             {kConvNeXt, 96, 56, n},
                             {kConvNeXt, 192, 28, n},
                             {kConvNeXt, 384, 14, n},
                             {kConvNeXt, 768, 7, n}}) {
        if (blocks == "all" || blocks == s.kind.name) measure<T>(s, last);
      }
    }
  }
}

}  // namespace
}  // namespace mod_kernels

// Arguments: dtype; "all" or a kind; a batch size or 0 for all.
int main(int count, char** arguments) {
  using namespace mod_kernels;
  const std::string dtype = count > 1 ? arguments[1] : "float32", blocks = count > 2 ? arguments[2] : "all";
  const int64_t n = count > 3 ? std::atol(arguments[3]) : 0;
  std::printf("{\"vector_bytes\": %d, \"memory_gb_s\": %.4g, \"l2_gb_s\": %.4g, \"peak_gflop_s\": %.4g}\n",
              kVectorBytes, read_rate(256 << 20) / 1e9, read_rate(256 << 10) / 1e9, peak_rate() / 1e9);
  if (dtype == "float32") measure_all<float>(blocks, n);
  if (dtype == "float64") measure_all<double>(blocks, n);
  if (dtype == "float16") measure_all<Half>(blocks, n);
  if (dtype == "bfloat16") measure_all<BFloat16>(blocks, n);
}
