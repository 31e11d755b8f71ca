// What an op's arguments are to the kernels: pointers of the right type, feature maps, a checked index.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string_view>
#include <vector>

#include "../common/check.h"
#include "../common/layout.h"
#include "fuse.h"
#include "outputs.h"
#include "tensor_dtype.h"

namespace mod_kernels {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Returned = StableIValue;  // a tensor's handle, given away

inline Returned give(Output& tensor) { return torch::stable::detail::from(tensor.release()); }

template <class T>
const T* read(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T>
const T* read(const OptionalTensor& t) {
  return t ? read<T>(*t) : nullptr;
}

inline DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Half:
      return DType::kHalf;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Float:
      return DType::kFloat;
    default:
      require(t.scalar_type() == ScalarType::Double,
              "a tensor must be of float16, bfloat16, float32 or float64");
      return DType::kDouble;
  }
}

// call<T>() for the dtype T of a feature map.
template <class F>
auto for_dtype(const Tensor& x, const F& call) {
  switch (dtype_of(x)) {
    case DType::kHalf:
      return call.template operator()<Half>();
    case DType::kBFloat16:
      return call.template operator()<BFloat16>();
    case DType::kFloat:
      return call.template operator()<float>();
    default:
      return call.template operator()<double>();
  }
}

template <class T>
FeatureMap<T> feature_map(const Tensor& t, T* data) {
  const int64_t* size = t.sizes().data();
  const int64_t* stride = t.strides().data();
  const Layout layout = layout_of(size, stride);
  require(layout != Layout::kOther, "a feature map must be dense in NCHW or channels_last order");
  return {data, size[0], size[1], size[2], size[3], stride[0], layout};
}
// Never written through: a FeatureMap has one pointer type for inputs and outputs.
template <class T>
FeatureMap<T> input_map(const Tensor& t) {
  require(t.scalar_type() == scalar_type<T>, "the feature maps of a call must be of one dtype");
  return feature_map(t, const_cast<T*>(read<T>(t)));
}
template <class T>
FeatureMap<T> output_map(const Tensor& t) {
  return feature_map(t, static_cast<T*>(t.mutable_data_ptr()));
}
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

inline Position position_of(std::string_view name) {
  if (name == "first") return Position::kFirst;
  if (name == "last") return Position::kLast;
  require(name == "original", "position must be 'first', 'last' or 'original', got '", name, "'");
  return Position::kOriginal;
}

// A weight that sums of A may meet.
template <class A>
DType weight_dtype(const Tensor& weight) {
  const DType dtype = dtype_of(weight);
  require(dtype == DType::kFloat || (dtype == DType::kDouble) == std::is_same_v<A, double>,
          "the selector's weights must be of x's dtype or float32");
  return dtype;
}

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
