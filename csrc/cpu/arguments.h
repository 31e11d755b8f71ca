// What is the CPU's own of an op's arguments: conversions, a checked index, and what an op gives back.
#pragma once

#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "../common/arguments.h"
#include "outputs.h"

namespace mod_kernels {

using Returned = StableIValue;  // a tensor's handle, given away

inline Returned give(Output& tensor) { return torch::stable::detail::from(tensor.release()); }

// A fresh one: dense, in x's layout.
template <class T>
FeatureMap<T> output_map(const Output& t, const FeatureMap<T>& x, int64_t channels) {
  return {static_cast<T*>(write(t)), x.n, channels, x.h, x.w, channels * x.hw(), x.layout};
}

// Values of a float type as A: where they lie if they are of A, else copied here. Few: biases, narrow
// weights.
template <class A>
class Converted {
 public:
  const A* operator()(const Tensor& t) {
    if (t.scalar_type() == scalar_type<A>) return read<A>(t);
    return for_dtype(t, [&]<class W>() {
      const int64_t count = t.numel();
      A* copy = copies_.emplace_back(std::make_unique_for_overwrite<A[]>(count)).get();
      const W* values = read<W>(t);
      for (int64_t i = 0; i < count; ++i) copy[i] = static_cast<A>(widen(values[i]));
      return static_cast<const A*>(copy);
    });
  }
  const A* operator()(const OptionalTensor& t) { return t ? (*this)(*t) : nullptr; }

 private:
  std::vector<std::unique_ptr<A[]>> copies_;
};

// Before anything is written: the kernels below index with these.
inline const int64_t* checked_index(const Tensor& index, int64_t channels) {
  require(index.scalar_type() == ScalarType::Long, "index must be int64");
  const auto* data = static_cast<const int64_t*>(index.const_data_ptr());
  const int64_t count = index.numel();
  for (int64_t i = 0; i < count; ++i) {
    require(data[i] >= 0 && data[i] < channels, "index must be between 0 and C-1=", channels - 1, ", got ",
            data[i]);
  }
  return data;
}

}  // namespace mod_kernels
