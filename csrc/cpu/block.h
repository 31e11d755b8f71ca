// The schedule of a whole block over a batch: pool, selector, top-k, tail.
#pragma once

#include "linear.h"
#include "tail.h"

namespace mod_kernels {

template <class T>
struct BlockArguments {
  using A = Accumulate<T>;
  FeatureMap<T> x;                  // input
  FeatureMap<T> y;                  // output in x's layout: x itself in place; no data when only selecting
  const A* pooled_given = nullptr;  // (N, C); null: x is pooled
  Linear<A> fc1, fc2;               // C -> R with ReLU, R -> C
  int64_t k = 0;
  const ConvBlock<A>* block = nullptr;  // null: select only

  A* pooled = nullptr;       // (N, C), what pooling writes; null: the logits' memory serves
  A* hidden = nullptr;       // (N, R); null: scratch
  A* logits = nullptr;       // (N, C); null: scratch
  A* scores = nullptr;       // (N, k); null: scratch
  int64_t* index = nullptr;  // (N, k); null: scratch
};

// The results do not depend on the number of threads, nor a sample's on the other samples of its batch.
// Scratch: the tail's, scores and index for each thread; N * R and N * C elements where hidden and logits are
// null.
template <class T>
void run_block(const BlockArguments<T>& arguments);

}  // namespace mod_kernels
