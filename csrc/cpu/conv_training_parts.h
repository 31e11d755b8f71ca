// What the forward and the backward of a trained conv block share.
#pragma once

#include <cstdint>

#include "conv_training.h"
#include "plane_loops.h"
#include "runtime.h"

namespace mod_kernels {

// y of one channel from its c. The backward asks the same arithmetic where y was above zero.
template <class A>
struct Normalised {
  Vec<A> mean, scale, beta;
  bool relu;

  Normalised(const TrainedBlock<A>& block, int l, int64_t o) : relu(block.relu(l)) {
    const TrainedLayer<A>& layer = block.layer[l];
    const A* means = block.statistics + layer.first_channel;
    mean = splat(means[o]);
    scale = splat(means[block.channels + o] * (layer.gamma ? layer.gamma[o] : A{1}));
    beta = splat(layer.beta ? layer.beta[o] : A{0});
  }
  Vec<A> before_relu(Vec<A> c) const { return scale * (c - mean) + beta; }
  Vec<A> operator()(Vec<A> c) const {
    const Vec<A> v = before_relu(c);
    return relu ? mod_kernels::relu<A>(v) : v;
  }
  // g, zero where y is not above zero; as in torch a NaN of y lets it pass.
  Vec<A> through_relu(Vec<A> c, Vec<A> g) const { return relu ? (before_relu(c) <= 0 ? Vec<A>{} : g) : g; }
};

// y[l-1] of sample i, the planes that layer l convolves: put into `into`, or x itself where it can be read as
// it lies. Only the rows are written: zeros around them, once there, stay.
template <class A>
PlaneRow<A> layer_input(const TrainedBlock<A>& block, int l, int64_t i, const PlaneShape<A>& shape,
                        PlaneRow<A> into) {
  const TrainedLayer<A>& layer = block.layer[l];
  const int64_t hw = block.x.hw();
  if (l == 0 && layer.taps == 1 && hw % kLanes<A> == 0) return {block.x.sample(i), hw};
  for (int64_t j = 0; j < layer.inputs; ++j) {
    A* to = into(j) + shape.begin;
    if (l == 0) {
      const A* from = block.x.sample(i) + j * hw;
      shape.each([&](int64_t dense, int64_t at, auto lanes, auto) {
        lanes.store(to + at, lanes.load(from + dense));
      });
    } else {
      const A* from = block.c(l - 1, i) + j * hw;
      const Normalised<A> y(block, l - 1, j);
      shape.each([&](int64_t dense, int64_t at, auto lanes, auto) {
        lanes.store(to + at, y(lanes.load(from + dense)));
      });
    }
  }
  return into;
}

// A vector at position p of a plane of hw values, which it may reach beyond.
template <class A>
inline void store_within(A* plane, int64_t p, int64_t hw, Vec<A> v) {
  if (hw - p >= kLanes<A>) {
    store(plane + p, v);
  } else if (hw > p) {
    store_first(plane + p, v, hw - p);
  }
}

// Which scratch the calling thread has inside parallel(threads, count, ...): a thread has an index only where
// work was shared out.
inline int64_t own_index(int64_t threads, int64_t count) {
  return threads == 1 || count <= 1 ? 0 : thread_index();
}

}  // namespace mod_kernels
