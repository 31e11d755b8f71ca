// runtime.h without torch: threads of the standard library, and scratch that is guarded and poisoned.
#include "host_runtime.h"

#include <algorithm>
#include <thread>
#include <vector>

#include "../../csrc/cpu/runtime.h"
#include "guarded.h"

namespace mod_kernels {
namespace {

int64_t threads = 1;
thread_local int64_t index_of_this = 0;

}  // namespace

void set_thread_count(int count) { threads = count; }

int64_t thread_count() { return threads; }

int64_t thread_index() { return index_of_this; }

// In as many even parts as torch's: a part's number is its thread's.
void run_parallel(int64_t count, void (*work)(void*, int64_t, int64_t), void* context) {
  const int64_t part = (count + threads - 1) / threads;
  std::vector<std::thread> others;
  for (int64_t i = 1; i * part < count; ++i) {
    others.emplace_back([=] {
      index_of_this = i;
      work(context, i * part, std::min(count, (i + 1) * part));
    });
  }
  work(context, 0, std::min(count, part));
  for (std::thread& other : others) other.join();
}

Scratch::Scratch(int64_t bytes) {
  auto* owner = new GuardedBytes((bytes + 63) / 64 * 64, Side::kEnd);
  owner_ = owner;
  data_ = owner->data();
}

Scratch::~Scratch() { delete static_cast<GuardedBytes*>(owner_); }

}  // namespace mod_kernels
