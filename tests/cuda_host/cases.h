// Cases of kernels' ops: read from a pipe, run in one order after the other in guarded memory, answered.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "common/dtype.h"
#include "cuda_host.h"

namespace cases {

// How a tensor's memory is before a launch, and what is asked of it after.
enum class Role {
  kIn,        // as given; not to be written
  kInOut,     // as given; written back
  kOut,       // NaN; written back
  kScratch,   // NaN before the first launch, as the first left it before the second
  kCounters,  // zeros, before and after
};

// Exactly as many bytes as the tensor has, from `lead` bytes behind a multiple of 256 on.
struct Tensor {
  std::string name;
  Role role = Role::kIn;
  size_t lead = 0, bytes = 0;
  std::vector<char> given;  // before any launch
  std::unique_ptr<char, void (*)(void*)> memory{nullptr, nullptr};

  char* data() const { return memory.get() + lead; }
  // Memory of its own, in which it is as before a launch.
  void allocate();
  void fill();
};

struct Case {
  std::string op;
  std::map<std::string, int64_t> numbers;
  std::vector<Tensor> tensors;
  // What launch() is told beside what the kernel's plan says.
  cuda_host::Order order = cuda_host::Order::kForward;
  uint64_t seed = 0;
  mutable std::map<std::string, Tensor> scratch_of_order;

  int64_t number(const std::string& name) const;
  // Null where the case has none of that name.
  const Tensor* tensor(const std::string& name) const;
  // Memory that the case does not bring, as kScratch. The same at every launch of an order.
  void* scratch(const std::string& name, size_t bytes) const;
  template <class T = void>
  T* data(const std::string& name) const {
    const Tensor* found = tensor(name);
    return found ? reinterpret_cast<T*>(found->data()) : nullptr;
  }
};

// What runs a case once, in its order; it throws, or gives words, where it can't.
using Op = std::string (*)(const Case&);

// At namespace scope, in the file of an op: makes it known.
struct Known {
  Known(const char* name, Op op);
};

// call<T>() for the case's dtype: null, or what is wrong. MOD_KERNELS_FLOAT_ONLY leaves the others out, which
// makes a program sooner.
template <class F>
std::string for_dtype(const Case& one, const F& call) {
  const char* wrong = "not built for this dtype";
  switch (static_cast<mod_kernels::DType>(one.number("dtype"))) {
    case mod_kernels::DType::kFloat:
      wrong = call.template operator()<float>();
      break;
#if !defined(MOD_KERNELS_FLOAT_ONLY)
    case mod_kernels::DType::kHalf:
      wrong = call.template operator()<mod_kernels::Half>();
      break;
    case mod_kernels::DType::kBFloat16:
      wrong = call.template operator()<mod_kernels::BFloat16>();
      break;
#endif
    default:
      break;
  }
  return wrong ? wrong : "";
}

}  // namespace cases
