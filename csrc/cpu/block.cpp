#include "block.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "parallel.h"

namespace mod_kernels {
namespace {

// Samples are taken in tiles, so that the selector's weights are read once per tile and the tail still finds
// the sample in the cache: about as much of x as fits a share of the last-level cache, and no more samples
// than make reading the weights cheap.
constexpr int64_t kTileBytes = 4 << 20;
constexpr int64_t kTileSamples = 16;

// At least k of them, the calling thread's own; grows, never shrinks.
template <class T>
T* selection_scratch(int64_t k) {
  thread_local std::vector<T> buffer;
  if (static_cast<int64_t>(buffer.size()) < k) buffer.resize(k);
  return buffer.data();
}

struct Schedule {
  const BlockArguments& a;
  float *hidden, *logits;
  float* pooled = a.pooled ? a.pooled : logits;
  bool copies = a.y.data != nullptr && a.y.data != a.x.data;

  // Channels begin to end of one sample: sums into pooled, and the copy to y where there is one.
  void pool(int64_t n, int64_t begin, int64_t end) const {
    const FeatureMap& x = a.x;
    PoolPass pass{copies ? PassKind::kCopy : PassKind::kRead, x.sample(n)};
    if (copies) pass.y = a.y.sample(n);
    pool_sample(pass, x.c, x.hw(), x.channels_last(), begin, end, pooled + n * x.c);
  }

  void copy(int64_t n) const { std::memcpy(a.y.sample(n), a.x.sample(n), a.x.sample_size() * sizeof(float)); }

  const float* selector_input(int64_t n) const {
    return (a.pooled_given ? a.pooled_given : pooled) + n * a.x.c;
  }

  void hidden_layer(int64_t n, int64_t samples, int64_t begin, int64_t end) const {
    linear(a.fc1, selector_input(n), samples, begin, end, hidden + n * a.fc1.outputs);
  }
  void logits_layer(int64_t n, int64_t samples, int64_t begin, int64_t end) const {
    linear(a.fc2, hidden + n * a.fc1.outputs, samples, begin, end, logits + n * a.x.c);
  }

  void finish(int64_t n) const {
    float* scores = a.scores ? a.scores + n * a.k : selection_scratch<float>(a.k);
    int64_t* index = a.index ? a.index + n * a.k : selection_scratch<int64_t>(a.k);
    top_k(logits + n * a.x.c, a.x.c, a.k, scores, index);
    if (a.block) tail_sample(a.y, n, *a.block, scores, index);
  }

  // Each thread takes whole samples, tile by tile.
  void by_samples(int64_t threads) const {
    const int64_t bytes = std::max<int64_t>(a.x.sample_size() * sizeof(float), 1);
    const int64_t tile = std::clamp<int64_t>(kTileBytes / bytes, 1, kTileSamples);
    parallel(threads, a.x.n, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; n += tile) {
        const int64_t samples = std::min(tile, end - n);
        for (int64_t i = n; i < n + samples; ++i) {
          if (!a.pooled_given) {
            pool(i, 0, a.x.c);
          } else if (copies) {
            copy(i);
          }
        }
        hidden_layer(n, samples, 0, a.fc1.outputs);
        logits_layer(n, samples, 0, a.fc2.outputs);
        for (int64_t i = n; i < n + samples; ++i) finish(i);
      }
    });
  }

  // Fewer samples than keep the threads busy: each stage is split by itself.
  void by_stages(int64_t threads) const {
    const int64_t channels = a.x.c;
    if (!a.pooled_given) {
      const int64_t groups = (channels + kPoolGroup - 1) / kPoolGroup;
      parallel(threads, a.x.n * groups, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end;) {
          const int64_t n = i / groups, group = i % groups;
          const int64_t count = std::min(groups - group, end - i);
          pool(n, group * kPoolGroup, std::min((group + count) * kPoolGroup, channels));
          i += count;
        }
      });
    } else if (copies) {
      parallel(threads, a.x.n, [&](int64_t begin, int64_t end) {
        for (int64_t n = begin; n < end; ++n) copy(n);
      });
    }
    parallel_rows(threads, a.fc1.outputs,
                  [&](int64_t begin, int64_t end) { hidden_layer(0, a.x.n, begin, end); });
    parallel_rows(threads, a.fc2.outputs,
                  [&](int64_t begin, int64_t end) { logits_layer(0, a.x.n, begin, end); });
    parallel(threads, a.x.n, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) finish(n);
    });
  }

  // A selector of few weights is not worth waking threads for; rows go in eights, the selector's largest
  // tile.
  template <class F>
  void parallel_rows(int64_t threads, int64_t rows, const F& work) const {
    if (a.x.n * a.fc1.inputs * a.fc1.outputs < kSerialElements) threads = 1;
    parallel(threads, (rows + 7) / 8,
             [&](int64_t begin, int64_t end) { work(begin * 8, std::min(end * 8, rows)); });
  }
};

}  // namespace

void run_block(const BlockArguments& arguments) {
  const int64_t n = arguments.x.n;
  if (n == 0) return;
  const int64_t hidden_size = arguments.hidden ? 0 : n * arguments.fc1.outputs;
  const int64_t logits_size = arguments.logits ? 0 : n * arguments.x.c;
  const auto scratch = std::make_unique_for_overwrite<float[]>(hidden_size + logits_size);
  const Schedule schedule{arguments, arguments.hidden ? arguments.hidden : scratch.get(),
                          arguments.logits ? arguments.logits : scratch.get() + hidden_size};
  const int64_t threads = threads_for(n * arguments.x.sample_size());
  if (threads == 1 || n % threads == 0 || n >= 4 * threads) {
    schedule.by_samples(threads);
  } else {
    schedule.by_stages(threads);
  }
}

}  // namespace mod_kernels
