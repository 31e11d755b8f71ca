// The raw ops of a conv block in training (schemas: mod_kernels/_library.py). The kernels go by shapes alone,
// so all of them are checked here.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "arguments.h"
#include "conv_training.h"

namespace mod_kernels {
namespace {

using Tensors = std::vector<Tensor>;

// One value a channel, of A, dense; null from a list that has none.
template <class A>
void check_vector(const Tensor& t, const char* name, int64_t channels) {
  require(t.scalar_type() == scalar_type<A>, name, " must be of x's dtype");
  require(t.dim() == 1 && t.size(0) == channels && t.is_contiguous(), name, " must have shape (", channels,
          ",) and be contiguous");
}
template <class A>
const A* values_of(const Tensors& list, int l, const char* name, int64_t channels) {
  if (list.empty()) return nullptr;
  check_vector<A>(list[l], name, channels);
  return read<A>(list[l]);
}
template <class A>
A* running_of(const Tensors& list, int l, const char* name, int64_t channels) {
  if (list.empty()) return nullptr;
  check_vector<A>(list[l], name, channels);
  return static_cast<A*>(list[l].mutable_data_ptr());
}

void check_list(const Tensors& list, const char* name, size_t layers) {
  require(list.empty() || list.size() == layers, name, " must have one tensor for each of ", layers,
          " layers, or none");
}

template <class A>
FeatureMap<A> nchw_map(const Tensor& t, const char* name) {
  require(t.dim() == 4, name, " must have 4 dimensions");
  FeatureMap<A> map = input_map<A>(t);
  require(!map.channels_last(), name, " must be NCHW");
  return map;
}

// (N, channels, H, W) beside x.
template <class A>
FeatureMap<A> map_of(const Tensor& t, const char* name, const FeatureMap<A>& x, int64_t channels) {
  const FeatureMap<A> map = nchw_map<A>(t, name);
  require(map.n == x.n && map.h == x.h && map.w == x.w && map.c == channels, name, " must have shape (", x.n,
          ", ", channels, ", ", x.h, ", ", x.w, ")");
  return map;
}

template <class A>
TrainedBlock<A> block_of(const Tensor& x, const Tensors& weights, const Tensors& norm_weights,
                         const Tensors& norm_biases, bool batch_statistics, bool final_relu) {
  TrainedBlock<A> block;
  block.x = nchw_map<A>(x, "x");
  require(block.x.n * block.x.sample_size() > 0, "x must not be empty");
  require(!batch_statistics || block.x.n * block.x.hw() > 1,
          "batch statistics need more than 1 value per channel");
  require(!weights.empty() && weights.size() <= kMostLayers, "there must be 1 to ", kMostLayers, " weights");
  check_list(norm_weights, "norm_weights", weights.size());
  check_list(norm_biases, "norm_biases", weights.size());
  block.batch_statistics = batch_statistics;
  block.final_relu = final_relu;
  block.layers = static_cast<int>(weights.size());
  int64_t inputs = block.x.c;
  for (int l = 0; l < block.layers; ++l) {
    const Tensor& weight = weights[l];
    TrainedLayer<A>& layer = block.layer[l];
    require(weight.scalar_type() == scalar_type<A>, "weights must be of x's dtype");
    require(weight.dim() == 4 && weight.size(0) >= 1 && weight.size(1) == inputs && weight.is_contiguous(),
            "weights must be contiguous and take the channels of the layer before");
    const int64_t side = weight.size(2);
    require(weight.size(3) == side && (side == 1 || side == 3), "weights must be 1x1 or 3x3");
    layer.inputs = inputs;
    layer.outputs = inputs = weight.size(0);
    layer.taps = static_cast<int>(side * side);
    layer.first_channel = block.channels;
    layer.weight = read<A>(weight);
    layer.gamma = values_of<A>(norm_weights, l, "norm_weights", layer.outputs);
    layer.beta = values_of<A>(norm_biases, l, "norm_biases", layer.outputs);
    block.channels += layer.outputs;
  }
  return block;
}

using Three = std::tuple<Returned, Returned, Returned>;

template <class A>
Three conv_block_saving_of(const Tensor& x, const Tensors& weights, const Tensors& norm_weights,
                           const Tensors& norm_biases, const Tensors& running_means,
                           const Tensors& running_vars, bool batch_statistics, double momentum, double eps,
                           bool final_relu) {
  TrainedForward<A> f;
  f.block = block_of<A>(x, weights, norm_weights, norm_biases, batch_statistics, final_relu);
  TrainedBlock<A>& block = f.block;
  check_list(running_means, "running_means", weights.size());
  check_list(running_vars, "running_vars", weights.size());
  require(running_means.size() == running_vars.size(), "running_means and running_vars go together");
  require(batch_statistics || !running_means.empty(), "without batch statistics there must be running ones");
  f.momentum = momentum;
  f.eps = eps;
  for (int l = 0; l < block.layers; ++l) {
    f.running_mean[l] = running_of<A>(running_means, l, "running_means", block.layer[l].outputs);
    f.running_var[l] = running_of<A>(running_vars, l, "running_vars", block.layer[l].outputs);
  }
  Outputs<A> outputs(x);
  Output z = outputs.map(block.x, block.layer[block.layers - 1].outputs);
  Output convolved = outputs.map(block.x, block.channels), statistics = outputs.matrix(2, block.channels);
  f.z = output_map(z, block.x, block.layer[block.layers - 1].outputs);
  block.convolved = output_map(convolved, block.x, block.channels);
  block.statistics = static_cast<A*>(write(statistics));
  train_forward(f);
  return {give(z), give(convolved), give(statistics)};
}

Three conv_block_saving(const Tensor& x, const Tensors& weights, const Tensors& norm_weights,
                        const Tensors& norm_biases, const Tensors& running_means, const Tensors& running_vars,
                        bool batch_statistics, double momentum, double eps, bool final_relu) {
  const auto run = [&]<class A>() {
    return conv_block_saving_of<A>(x, weights, norm_weights, norm_biases, running_means, running_vars,
                                   batch_statistics, momentum, eps, final_relu);
  };
  return x.scalar_type() == ScalarType::Double ? run.template operator()<double>()
                                               : run.template operator()<float>();
}

using Gradients = std::tuple<Returned, std::vector<Returned>>;

template <class A>
Gradients conv_block_backward_of(const Tensor& dz, const Tensor& x, const Tensor& convolved,
                                 const Tensor& statistics, const Tensors& weights,
                                 const Tensors& norm_weights, const Tensors& norm_biases,
                                 bool batch_statistics, bool final_relu, const std::vector<bool>& needed) {
  TrainedBackward<A> b;
  b.block = block_of<A>(x, weights, norm_weights, norm_biases, batch_statistics, final_relu);
  TrainedBlock<A>& block = b.block;
  const int layers = block.layers;
  block.convolved = map_of(convolved, "convolved", block.x, block.channels);
  require(statistics.scalar_type() == scalar_type<A> && statistics.dim() == 2 && statistics.size(0) == 2 &&
              statistics.size(1) == block.channels && statistics.is_contiguous(),
          "statistics must be of x's dtype, have shape (2, ", block.channels, ") and be contiguous");
  block.statistics = const_cast<A*>(read<A>(statistics));  // read alone here
  b.dz = map_of(dz, "dz", block.x, block.layer[layers - 1].outputs);
  require(static_cast<int>(needed.size()) == 1 + 3 * layers,
          "needed must say of x and of three parameters a layer");

  Outputs<A> outputs(x);
  Output dx = needed[0] ? outputs.map(block.x, block.x.c) : outputs.no_map();
  if (needed[0]) b.dx = output_map(dx, block.x, block.x.c);
  std::vector<Output> parameters;
  const auto keep = [&](bool is_needed, const auto& make) {
    parameters.push_back(is_needed ? make() : outputs.empty());
    return is_needed ? static_cast<A*>(write(parameters.back())) : nullptr;
  };
  for (int l = 0; l < layers; ++l) {
    const TrainedLayer<A>& layer = block.layer[l];
    const int64_t side = layer.taps == 9 ? 3 : 1;
    const FeatureMap<A> like{nullptr, layer.outputs, layer.inputs, side,
                             side};  // a weight is laid out as a map
    b.dweight[l] = keep(needed[l + 1], [&] { return outputs.map(like, layer.inputs); });
  }
  const auto vector_of = [&](int l) {
    return [&outputs, count = block.layer[l].outputs] { return outputs.vector(count); };
  };
  for (int l = 0; l < layers; ++l) b.dgamma[l] = keep(needed[1 + layers + l], vector_of(l));
  for (int l = 0; l < layers; ++l) b.dbeta[l] = keep(needed[1 + 2 * layers + l], vector_of(l));
  train_backward(b);
  std::vector<Returned> given;
  for (Output& one : parameters) given.push_back(give(one));
  return {give(dx), given};
}

Gradients conv_block_backward(const Tensor& dz, const Tensor& x, const Tensor& convolved,
                              const Tensor& statistics, const Tensors& weights, const Tensors& norm_weights,
                              const Tensors& norm_biases, bool batch_statistics, bool final_relu,
                              const std::vector<bool>& needed) {
  const auto run = [&]<class A>() {
    return conv_block_backward_of<A>(dz, x, convolved, statistics, weights, norm_weights, norm_biases,
                                     batch_statistics, final_relu, needed);
  };
  return x.scalar_type() == ScalarType::Double ? run.template operator()<double>()
                                               : run.template operator()<float>();
}

}  // namespace
}  // namespace mod_kernels

STABLE_TORCH_LIBRARY_IMPL(mod_kernels_cpu, CPU, m) {
  m.impl("conv_block_saving", TORCH_BOX(&mod_kernels::conv_block_saving));
  m.impl("conv_block_backward", TORCH_BOX(&mod_kernels::conv_block_backward));
}
