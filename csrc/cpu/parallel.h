// torch's thread pool, through the stable ABI.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>

namespace mod_kernels {

// Below this many elements of x a call stays on its thread: waking another costs as much as the work.
inline constexpr int64_t kSerialElements = 32768;

inline int64_t threads_for(int64_t elements) {
  return elements < kSerialElements ? 1 : torch::stable::get_num_threads();
}

template <class F>
inline void parallel(int64_t threads, int64_t count, const F& work) {
  if (threads == 1 || count <= 1) {
    if (count > 0) work(int64_t{0}, count);
  } else {
    torch::stable::parallel_for(0, count, 1, work);
  }
}

}  // namespace mod_kernels
