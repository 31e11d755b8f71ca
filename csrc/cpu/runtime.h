// What the engine asks of its host: threads and memory. runtime.cpp answers with torch's pool and allocator;
// the programs that link the kernels without torch (tests/native, benchmarks/native) bring answers of their
// own.
#pragma once

#include <cstdint>

namespace mod_kernels {

int64_t thread_count();
// Of the calling thread inside run_parallel, below thread_count() and below run_parallel's count.
int64_t thread_index();
// work(context, begin, end) over parts of 0 to count - 1 that cover it, on up to thread_count() threads.
void run_parallel(int64_t count, void (*work)(void* context, int64_t begin, int64_t end), void* context);

// Uninitialized memory, aligned to a cache line; freed with the object.
class Scratch {
 public:
  explicit Scratch(int64_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  char* data() const { return data_; }

 private:
  void* owner_;
  char* data_;
};

// Below this many elements of x a call stays on its thread: waking another costs as much as the work.
inline constexpr int64_t kSerialElements = 32768;

inline int64_t threads_for(int64_t elements) { return elements < kSerialElements ? 1 : thread_count(); }

template <class F>
inline void parallel(int64_t threads, int64_t count, const F& work) {
  if (threads == 1 || count <= 1) {
    if (count > 0) work(int64_t{0}, count);
    return;
  }
  const auto call = [](void* context, int64_t begin, int64_t end) {
    (*static_cast<const F*>(context))(begin, end);
  };
  run_parallel(count, call, const_cast<void*>(static_cast<const void*>(&work)));
}

}  // namespace mod_kernels
