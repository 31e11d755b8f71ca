// Memory that nothing can overrun unseen: one byte past its guarded end is a crash, and what is read before
// it is written is NaN.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace mod_kernels {

// Which end lies at the inaccessible page itself. The other is up to a page away from one: there what was
// written is found when the memory is freed.
enum class Side { kBegin, kEnd };

class GuardedBytes {
 public:
  static constexpr unsigned char kPoison = 0xff;  // every float format's NaN, and no index

  GuardedBytes(int64_t bytes, Side side) : size_(bytes) {
    const int64_t page = sysconf(_SC_PAGESIZE);
    body_size_ = std::max<int64_t>(1, (bytes + page - 1) / page) * page;
    mapped_size_ = body_size_ + 2 * page;
    void* mapped = mmap(nullptr, mapped_size_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    mapped_ = static_cast<unsigned char*>(mapped);
    body_ = mapped_ + page;
    if (mapped == MAP_FAILED || mprotect(body_, body_size_, PROT_READ | PROT_WRITE) != 0) {
      std::perror("guarded memory");
      std::abort();
    }
    std::memset(body_, kPoison, body_size_);
    data_ = side == Side::kEnd ? body_ + body_size_ - bytes : body_;
  }
  ~GuardedBytes() {
    const auto poisoned = [](unsigned char byte) { return byte == kPoison; };
    if (!std::all_of(body_, data_, poisoned) || !std::all_of(data_ + size_, body_ + body_size_, poisoned)) {
      std::fputs("written beside guarded memory\n", stderr);
      std::abort();
    }
    munmap(mapped_, mapped_size_);
  }
  GuardedBytes(const GuardedBytes&) = delete;
  GuardedBytes& operator=(const GuardedBytes&) = delete;

  char* data() const { return reinterpret_cast<char*>(data_); }

 private:
  int64_t size_, body_size_, mapped_size_;
  unsigned char *mapped_, *body_, *data_;
};

template <class T>
class Guarded {
 public:
  Guarded(int64_t size, Side side) : bytes_(size * sizeof(T), side), size_(size) {}
  Guarded(const std::vector<T>& values, Side side) : Guarded(std::ssize(values), side) {
    std::copy(values.begin(), values.end(), data());
  }

  T* data() const { return reinterpret_cast<T*>(bytes_.data()); }
  int64_t size() const { return size_; }
  T& operator[](int64_t i) const { return data()[i]; }
  std::vector<T> values() const { return {data(), data() + size_}; }

 private:
  GuardedBytes bytes_;
  int64_t size_;
};

}  // namespace mod_kernels
