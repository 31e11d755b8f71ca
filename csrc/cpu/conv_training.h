// A narrowed conv block in training: convolution, batch norm and ReLU, two or three times over.
//
// With y[-1] = x, layer l is
//   c[l] = weight[l] * y[l-1]                              1x1, or 3x3 within a border of zeros
//   y[l] = relu(scale[l] (c[l] - mean[l]) + beta[l])       scale = gamma / sqrt(var + eps)
// and z is the last y, without its ReLU unless final_relu. mean and var are those of c[l] over N, H, W, or
// with batch_statistics false the running ones. Kept for the backward are the c and (C)-sized statistics: y
// is computed again from c wherever it is read, in scratch of one sample.
#pragma once

#include <cstdint>

#include "../common/layout.h"

namespace mod_kernels {

inline constexpr int kMostLayers = 3;

// One convolution and its batch norm. gamma and beta may be null: 1 and 0.
template <class A>
struct TrainedLayer {
  int64_t inputs = 0, outputs = 0;
  int taps = 1;               // 1 or 9
  int64_t first_channel = 0;  // its first among the channels of all layers
  const A *weight = nullptr, *gamma = nullptr, *beta = nullptr;
  int64_t weights() const { return outputs * inputs * taps; }
};

template <class A>
struct TrainedBlock {
  int layers = 0;
  TrainedLayer<A> layer[kMostLayers];
  int64_t channels = 0;  // outputs of all layers together
  bool batch_statistics = true, final_relu = false;
  FeatureMap<A> x;          // (N, k, H, W), NCHW
  FeatureMap<A> convolved;  // (N, channels, H, W), NCHW: c of the layers one after the other
  A* statistics = nullptr;  // (2, channels): mean, then 1 / sqrt(var + eps)

  A* c(int l, int64_t n) const { return convolved.sample(n) + layer[l].first_channel * x.hw(); }
  bool relu(int l) const { return final_relu || l + 1 < layers; }
};

// What the forward alone needs. The running statistics may be null where batch_statistics is true; where they
// are not, they are updated as torch.nn.BatchNorm2d does: by momentum, the variance with N H W - 1.
template <class A>
struct TrainedForward {
  TrainedBlock<A> block;  // convolved and statistics are written
  FeatureMap<A> z;        // as x
  A *running_mean[kMostLayers] = {}, *running_var[kMostLayers] = {};
  double momentum = 0, eps = 0;
};

// With g[l] the gradient before the ReLU (dy[l], zero where y[l] <= 0), xhat = (c - mean) / sqrt(var + eps),
// M = N H W:
//   dbeta = sum g,  dgamma = sum g xhat
//   dc = scale (g - dbeta / M - xhat dgamma / M)      with running statistics: scale g
//   dweight[o, i, t] = sum over n and p of dc[o, p] y[l-1][i, p + t],  dy[l-1] = the transposed convolution
//   of dc
// A null output is left out, and so is what only it would need.
template <class A>
struct TrainedBackward {
  TrainedBlock<A> block;
  FeatureMap<A> dz;
  FeatureMap<A> dx;  // data may be null
  A *dweight[kMostLayers] = {}, *dgamma[kMostLayers] = {}, *dbeta[kMostLayers] = {};
};

// On as many threads as pay; every sum has one order, whatever their number.
template <class A>
void train_forward(const TrainedForward<A>& forward);
template <class A>
void train_backward(const TrainedBackward<A>& backward);

}  // namespace mod_kernels
