// The schedule of a whole block over a batch: pool, selector, top-k, tail.
#pragma once

#include "pool.h"
#include "selector.h"
#include "tail.h"

namespace mod_kernels {

struct BlockArguments {
  FeatureMap x;  // input
  FeatureMap y;  // output in x's layout: x itself in place; no data when only selecting
  const float* pooled_given = nullptr;  // (N, C); null: x is pooled
  Linear fc1, fc2;                      // C -> R with ReLU, R -> C
  int64_t k = 0;
  const ConvBlock* block = nullptr;  // null: select only

  float* pooled = nullptr;   // (N, C), what pooling writes; null: the logits' memory serves
  float* hidden = nullptr;   // (N, R); null: scratch
  float* logits = nullptr;   // (N, C); null: scratch
  float* scores = nullptr;   // (N, k); null: scratch
  int64_t* index = nullptr;  // (N, k); null: scratch
};

// The results do not depend on the number of threads, nor a sample's on the other samples of its batch.
// Scratch: the tail's; N * R and N * C floats where hidden and logits are null; where scores and index are, k
// of each, which every thread keeps between calls.
void run_block(const BlockArguments& arguments);

}  // namespace mod_kernels
