// What an op's arguments are to an engine: pointers of the right type, feature maps, and what they must be.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

#include "check.h"
#include "layout.h"
#include "tensor_dtype.h"

namespace mod_kernels {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

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

// A weight that sums of A may meet.
template <class A>
DType weight_dtype(const Tensor& weight) {
  const DType dtype = dtype_of(weight);
  require(dtype == DType::kFloat || (dtype == DType::kDouble) == std::is_same_v<A, double>,
          "the selector's weights must be of x's dtype or float32");
  return dtype;
}

// ---- what comes from autograd, in whatever form its nodes left it

// (rows, columns), dense; the values of A, or of an index.
inline void check_matrix(const Tensor& t, const char* name, int64_t rows, int64_t columns) {
  require(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns, name, " must have shape (", rows, ", ",
          columns, ")");
  require(t.is_contiguous(), name, " must be contiguous");
}
template <class A>
const A* matrix(const Tensor& t, const char* name, int64_t rows, int64_t columns) {
  check_matrix(t, name, rows, columns);
  require(t.scalar_type() == scalar_type<A>, name, " must be float32, float64 for float64");
  return read<A>(t);
}

// A map to go beside x: of its N, H, W and layout, which a map of one channel or one pixel fits whatever it
// is.
template <class T>
FeatureMap<T> map_beside(const Tensor& t, const char* name, const FeatureMap<T>& x) {
  require(t.dim() == 4, name, " must have 4 dimensions");
  FeatureMap<T> map = input_map<T>(t);
  require(map.n == x.n && map.h == x.h && map.w == x.w, name, " must have dy's N, H and W");
  if (map.c == 1 || map.hw() == 1) map.layout = x.layout;
  require(map.layout == x.layout, name, " must have dy's layout");
  return map;
}
// The k gathered channels.
template <class T>
FeatureMap<T> narrow_map(const Tensor& t, const char* name, const FeatureMap<T>& x) {
  const FeatureMap<T> map = map_beside(t, name, x);
  require(map.c >= 1 && map.c <= x.c, name, " must have between 1 and C=", x.c, " channels, got ", map.c);
  return map;
}

template <class T>
FeatureMap<T> gradient_map(const Tensor& dy) {
  require(dy.dim() == 4, "dy must have 4 dimensions");
  return input_map<T>(dy);
}

}  // namespace mod_kernels
