// The channel selector after pooling: two small matrix products, then the k largest logits of each sample.
#pragma once

#include <cstdint>

namespace mod_kernels {

// out[n, r] = sum_i in[n, i] * weight[r, i] + bias[r], then ReLU if asked, for rows begin <= r < end. in and
// out are dense (samples, inputs) and (samples, outputs); bias may be null. Each product is summed in one
// order, whatever the number of samples, of rows and of threads.
struct Linear {
  const float* weight = nullptr;
  const float* bias = nullptr;
  int64_t inputs = 0, outputs = 0;
  bool relu = false;
};
void linear(const Linear& layer, const float* in, int64_t samples, int64_t begin, int64_t end, float* out);

// The k largest of one sample's logits in descending order: index[j], and scores[j] =
// sigmoid(logits[index[j]]). Ties go to the lower channel, -0.0 ties with +0.0, and every NaN comes first,
// whatever its sign bit.
void top_k(const float* logits, int64_t channels, int64_t k, float* scores, int64_t* index);

}  // namespace mod_kernels
