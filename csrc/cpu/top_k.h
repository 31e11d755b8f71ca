// The k largest logits of a sample, by partial selection.
#pragma once

#include <cstdint>

namespace mod_kernels {

// The k largest of one sample's logits in descending order: index[j], and scores[j] =
// sigmoid(logits[index[j]]). Ties go to the lower channel, -0.0 ties with +0.0, and every NaN comes first,
// whatever its sign bit. A is float or double.
template <class A>
void top_k(const A* logits, int64_t channels, int64_t k, A* scores, int64_t* index);

}  // namespace mod_kernels
