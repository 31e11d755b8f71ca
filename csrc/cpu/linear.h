// The selector's two layers: small matrix products over a batch.
#pragma once

#include <cstdint>

#include "../common/dtype.h"

namespace mod_kernels {

// out[n, r] = sum_i in[n, i] * weight[r, i] + bias[r], then ReLU if asked, for rows begin <= r < end. in and
// out are dense (samples, inputs) and (samples, outputs); bias may be null. weight is float or a 16-bit
// format where A is float, float or double where A is double. Each product is summed in one order, whatever
// the number of samples, of rows and of threads.
template <class A>
struct Linear {
  const void* weight = nullptr;
  DType dtype = DType::kFloat;  // of weight
  const A* bias = nullptr;
  int64_t inputs = 0, outputs = 0;
  bool relu = false;
};
template <class A>
void linear(const Linear<A>& layer, const A* in, int64_t samples, int64_t begin, int64_t end, A* out);

}  // namespace mod_kernels
