#include "block.h"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <optional>

#include "pool.h"
#include "runtime.h"
#include "top_k.h"

namespace mod_kernels {
namespace {

// Samples are taken in tiles, so that the selector's weights are read once per tile and the tail still finds
// the sample in the cache: about as much of x as fits a share of the last-level cache. Where the weights
// outweigh a sample, reading them again costs more than the little of x that the tail reads: then the tile is
// the batch, or as much of it as keeps the pooled vectors in the second-level cache.
constexpr int64_t kTileBytes = 4 << 20;
constexpr int64_t kTileSamples = 64;

// Scratch up to this size is the stack's: a small call's time is its allocations.
constexpr int64_t kStackBytes = 8192;

constexpr int64_t whole_lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }

template <class T>
class Schedule {
  using A = Accumulate<T>;

 public:
  explicit Schedule(const BlockArguments<T>& arguments) : a(arguments) {
    threads = threads_for(a.x.n * a.x.sample_size());
    const int64_t n = a.x.n;
    hidden_bytes = a.hidden ? 0 : whole_lines(n * a.fc1.outputs * sizeof(A));
    logits_bytes = a.logits ? 0 : whole_lines(n * a.x.c * sizeof(A));
    index_bytes = a.index ? 0 : whole_lines(a.k * sizeof(int64_t));
    scores_bytes = a.scores ? 0 : whole_lines(a.k * sizeof(A));
    const int64_t tail_bytes = a.block ? whole_lines(tail_scratch(a.y, *a.block) * sizeof(A)) : 0;
    thread_bytes = index_bytes + scores_bytes + tail_bytes;
  }

  int64_t scratch_bytes() const {
    return hidden_bytes + logits_bytes + std::min(threads, a.x.n) * thread_bytes;
  }

  void run(char* scratch) {
    hidden = a.hidden ? a.hidden : reinterpret_cast<A*>(scratch);
    logits = a.logits ? a.logits : reinterpret_cast<A*>(scratch + hidden_bytes);
    pooled = a.pooled ? a.pooled : logits;
    of_threads = scratch + hidden_bytes + logits_bytes;
    if (threads == 1 || a.x.n % threads == 0 || a.x.n >= 4 * threads) {
      by_samples();
    } else {
      by_stages();
    }
  }

 private:
  const BlockArguments<T>& a;
  int64_t threads, hidden_bytes, logits_bytes, index_bytes, scores_bytes, thread_bytes;
  A *hidden = nullptr, *logits = nullptr, *pooled = nullptr;
  char* of_threads = nullptr;
  bool copies = a.y.data != nullptr && a.y.data != a.x.data;

  // Channels begin to end of one sample: sums into pooled, and the copy to y where there is one.
  void pool(int64_t n, int64_t begin, int64_t end) const {
    const FeatureMap<T>& x = a.x;
    PoolPass<T> pass{copies ? PassKind::kCopy : PassKind::kRead, x.sample(n)};
    if (copies) pass.y = a.y.sample(n);
    pool_sample(pass, x.c, x.hw(), x.channels_last(), begin, end, pooled + n * x.c);
  }

  void copy(int64_t n) const { std::memcpy(a.y.sample(n), a.x.sample(n), a.x.sample_size() * sizeof(T)); }

  const A* selector_input(int64_t n) const { return (a.pooled_given ? a.pooled_given : pooled) + n * a.x.c; }

  void hidden_layer(int64_t n, int64_t samples, int64_t begin, int64_t end) const {
    linear(a.fc1, selector_input(n), samples, begin, end, hidden + n * a.fc1.outputs);
  }
  void logits_layer(int64_t n, int64_t samples, int64_t begin, int64_t end) const {
    linear(a.fc2, hidden + n * a.fc1.outputs, samples, begin, end, logits + n * a.x.c);
  }

  // Top-k and tail of samples begin to end - 1, on the calling thread and in its scratch.
  void finish(int64_t begin, int64_t end) const {
    // A thread has an index only where work was shared out.
    char* own = of_threads + (threads == 1 || a.x.n == 1 ? 0 : thread_index()) * thread_bytes;
    for (int64_t n = begin; n < end; ++n) {
      int64_t* index = a.index ? a.index + n * a.k : reinterpret_cast<int64_t*>(own);
      A* scores = a.scores ? a.scores + n * a.k : reinterpret_cast<A*>(own + index_bytes);
      top_k(logits + n * a.x.c, a.x.c, a.k, scores, index);
      A* tail = reinterpret_cast<A*>(own + index_bytes + scores_bytes);
      if (a.block) tail_sample(a.y, n, *a.block, scores, index, tail);
    }
  }

  int64_t tile() const {
    const int64_t sample = std::max<int64_t>(a.x.sample_size() * sizeof(T), 1);
    const int64_t weights = 2 * a.fc1.inputs * a.fc1.outputs * size_of(a.fc1.dtype);
    const int64_t samples = weights > sample ? kTileSamples : kTileBytes / sample;
    return std::clamp<int64_t>(samples, 1, kTileSamples);
  }

  // Each thread takes whole samples, tile by tile.
  void by_samples() const {
    const int64_t tile = this->tile();
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
        finish(n, n + samples);
      }
    });
  }

  // Fewer samples than keep the threads busy: each stage is split by itself.
  void by_stages() const {
    if (!a.pooled_given) {
      for_pool_groups(threads, a.x.n, a.x.c,
                      [&](int64_t n, int64_t begin, int64_t end) { pool(n, begin, end); });
    } else if (copies) {
      parallel(threads, a.x.n, [&](int64_t begin, int64_t end) {
        for (int64_t n = begin; n < end; ++n) copy(n);
      });
    }
    parallel_rows(a.fc1.outputs, [&](int64_t begin, int64_t end) { hidden_layer(0, a.x.n, begin, end); });
    parallel_rows(a.fc2.outputs, [&](int64_t begin, int64_t end) { logits_layer(0, a.x.n, begin, end); });
    parallel(threads, a.x.n, [&](int64_t begin, int64_t end) { finish(begin, end); });
  }

  // A selector of few weights is not worth waking threads for; rows go in eights, the selector's largest
  // tile.
  template <class F>
  void parallel_rows(int64_t rows, const F& work) const {
    const bool few = a.x.n * a.fc1.inputs * a.fc1.outputs < kSerialElements;
    parallel(few ? 1 : threads, (rows + 7) / 8,
             [&](int64_t begin, int64_t end) { work(begin * 8, std::min(end * 8, rows)); });
  }
};

}  // namespace

template <class T>
void run_block(const BlockArguments<T>& arguments) {
  if (arguments.x.n == 0) return;
  Schedule<T> schedule(arguments);
  const int64_t bytes = schedule.scratch_bytes();
  if (bytes <= kStackBytes) {
    alignas(64) char scratch[kStackBytes];
    return schedule.run(scratch);
  }
  schedule.run(Scratch(bytes).data());
}

#define MOD_KERNELS_BLOCK(T) template void run_block<T>(const BlockArguments<T>&);
MOD_KERNELS_FOR_EACH_DTYPE(MOD_KERNELS_BLOCK)

}  // namespace mod_kernels
