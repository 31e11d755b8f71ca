// The raw ops of mod_kernels_cpu (schemas: mod_kernels/_library.py): arguments unpacked, outputs allocated,
// work handed on. Shapes, dtypes and k have been checked in Python; an index's range is data and checked
// here.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "block.h"
#include "fuse.h"
#include "parallel.h"
#include "pool.h"

namespace mod_kernels {
namespace {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

const float* read(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }
float* write(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }
const float* read(const OptionalTensor& t) { return t ? read(*t) : nullptr; }

FeatureMap feature_map(const Tensor& t, float* data) {
  const int64_t* size = t.sizes().data();
  const int64_t* stride = t.strides().data();
  const Layout layout = layout_of(size, stride);
  STD_TORCH_CHECK(layout != Layout::kOther, "a feature map must be dense in NCHW or channels_last order");
  return {data, size[0], size[1], size[2], size[3], stride[0], layout};
}
// Never written through: a FeatureMap has one pointer type for inputs and outputs.
FeatureMap input_map(const Tensor& t) { return feature_map(t, const_cast<float*>(read(t))); }
FeatureMap output_map(const Tensor& t) { return feature_map(t, write(t)); }

// Fresh tensors come from the dispatcher, so that fill_uninitialized_memory can poison them.
Tensor new_tensor(const Tensor& like, std::initializer_list<int64_t> size, bool index = false) {
  int32_t dtype = index ? aoti_torch_dtype_int64() : aoti_torch_dtype_float32();
  int32_t layout = aoti_torch_layout_strided(), device = aoti_torch_device_type_cpu();
  AtenTensorHandle result;
  TORCH_ERROR_CODE_CHECK(aoti_torch_aten_new_empty(like.get(), size.begin(),
                                                   static_cast<int64_t>(size.size()), &dtype, &layout,
                                                   &device, 0, nullptr, &result));
  return Tensor(result);
}

// A dense feature map in x's layout with so many channels.
Tensor new_map(const Tensor& like, const FeatureMap& x, int64_t channels) {
  if (!x.channels_last()) return new_tensor(like, {x.n, channels, x.h, x.w});
  const std::array<int64_t, 4> size{x.n, channels, x.h, x.w};
  return torch::stable::empty({size.data(), size.size()}, torch::headeronly::ScalarType::Float,
                              torch::headeronly::Layout::Strided, std::nullopt, std::nullopt,
                              torch::headeronly::MemoryFormat::ChannelsLast);
}

Position position_of(const std::string& name) {
  if (name == "first") return Position::kFirst;
  if (name == "last") return Position::kLast;
  STD_TORCH_CHECK(name == "original", "position must be 'first', 'last' or 'original', got '", name, "'");
  return Position::kOriginal;
}

// Before anything is written: the kernels below index with these.
const int64_t* checked_index(const Tensor& index, int64_t channels) {
  const auto* data = static_cast<const int64_t*>(index.const_data_ptr());
  const int64_t count = index.numel();
  for (int64_t i = 0; i < count; ++i) {
    STD_TORCH_CHECK(data[i] >= 0 && data[i] < channels, "index must be between 0 and C-1=", channels - 1,
                    ", got ", data[i]);
  }
  return data;
}

template <class F>
void for_samples(const FeatureMap& x, int64_t elements, const F& work) {
  parallel(threads_for(elements), x.n, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) work(n);
  });
}

struct Selection {
  Tensor index, logits;
};

// Fills in the selector's part of the arguments, with fresh outputs.
Selection prepare_selection(BlockArguments& a, const Tensor& x, const Tensor& fc1_weight,
                            const Tensor& fc2_weight, const OptionalTensor& fc1_bias,
                            const OptionalTensor& fc2_bias, const OptionalTensor& pooled, int64_t k) {
  const int64_t n = a.x.n, channels = a.x.c, reduced = fc1_weight.size(0);
  a.fc1 = {read(fc1_weight), read(fc1_bias), channels, reduced, true};
  a.fc2 = {read(fc2_weight), read(fc2_bias), reduced, channels, false};
  a.pooled_given = read(pooled);
  a.k = k;
  Selection out{new_tensor(x, {n, k}, true), new_tensor(x, {n, channels})};
  a.index = static_cast<int64_t*>(out.index.mutable_data_ptr());
  a.logits = write(out.logits);
  return out;
}

// Where each convolution's weight and bias lie in the packed tensor; its size keeps the kernels inside.
ConvBlock conv_block(const Tensor& parameters, int64_t mid_channels, const std::string& kind, bool final_relu,
                     const std::string& position, int64_t k) {
  ConvBlock block{BlockKind::kBottleneck, final_relu, position_of(position), k, k};
  std::array<std::array<int64_t, 2>, 3> shapes{};  // outputs, and weights of each output
  const int64_t size = parameters.numel();
  if (kind == "basic") {
    block.kind = BlockKind::kBasic;
    shapes = {{{k, k * 9}, {k, k * 9}}};
  } else {
    STD_TORCH_CHECK(kind == "bottleneck", "kind must be 'bottleneck' or 'basic', got '", kind, "'");
    STD_TORCH_CHECK(mid_channels >= 1 && mid_channels <= size,
                    "mid_channels must be between 1 and the size of conv_parameters, got ", mid_channels);
    const int64_t m = block.m = mid_channels;
    shapes = {{{m, k}, {m, m * 9}, {k, m}}};
  }
  int64_t needed = 0;
  for (const auto [outputs, each] : shapes) needed += outputs * (each + 1);
  STD_TORCH_CHECK(size == needed, "conv_parameters of a ", kind, " with k=", k,
                  " and mid_channels=", mid_channels, " must be ", needed, " values, got ", size);
  const float* data = read(parameters);
  for (std::size_t i = 0; i < shapes.size(); ++i) {
    const auto [outputs, each] = shapes[i];
    block.weight[i] = data;
    block.bias[i] = data + outputs * each;
    data += outputs * (each + 1);
  }
  return block;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> select_channels(const Tensor& x, const Tensor& fc1_weight,
                                                                   const Tensor& fc2_weight,
                                                                   const OptionalTensor& fc1_bias,
                                                                   const OptionalTensor& fc2_bias,
                                                                   const OptionalTensor& pooled, int64_t k) {
  BlockArguments a;
  a.x = input_map(x);
  Selection out = prepare_selection(a, x, fc1_weight, fc2_weight, fc1_bias, fc2_bias, pooled, k);
  Tensor scores = new_tensor(x, {a.x.n, k}), hidden = new_tensor(x, {a.x.n, a.fc1.outputs});
  Tensor pooled_out = pooled ? new_tensor(x, {0}) : new_tensor(x, {a.x.n, a.x.c});
  a.scores = write(scores);
  a.hidden = write(hidden);
  if (!pooled) a.pooled = write(pooled_out);
  run_block(a);
  return {scores, out.index, out.logits, hidden, pooled_out};
}

Tensor gather_channels(const Tensor& x, const Tensor& index) {
  const FeatureMap from = input_map(x);
  const int64_t* channels = checked_index(index, from.c);
  const int64_t k = index.size(1);
  Tensor out = new_map(x, from, k);
  const FeatureMap to = output_map(out);
  for_samples(from, to.n * to.sample_size(),
              [&](int64_t n) { gather_sample(from, n, channels + n * k, to); });
  return out;
}

// The index is read for position "original" alone.
const int64_t* fuse_index(const OptionalTensor& index, Position position, int64_t channels) {
  if (position != Position::kOriginal) return nullptr;
  STD_TORCH_CHECK(index.has_value(), "position 'original' needs index");
  return checked_index(*index, channels);
}

Tensor fuse_channels(const Tensor& x, const Tensor& z, const Tensor& scores, const OptionalTensor& index,
                     const std::string& position) {
  const FeatureMap from = input_map(x), add = input_map(z);
  const Position where = position_of(position);
  const int64_t* channels = fuse_index(index, where, from.c);
  Tensor y = new_map(x, from, from.c);
  const FeatureMap to = output_map(y);
  for_samples(from, from.n * from.sample_size(), [&](int64_t n) {
    copy_fuse_sample(from, to, add, n, read(scores) + n * add.c, channels ? channels + n * add.c : nullptr,
                     where);
  });
  return y;
}

void fuse_channels_(const Tensor& x, const Tensor& z, const Tensor& scores, const OptionalTensor& index,
                    const std::string& position) {
  const FeatureMap to = output_map(x), add = input_map(z);
  const Position where = position_of(position);
  const int64_t* channels = fuse_index(index, where, to.c);
  for_samples(to, add.n * add.sample_size(), [&](int64_t n) {
    fuse_sample(to, add, n, read(scores) + n * add.c, channels ? channels + n * add.c : nullptr, where);
  });
}

Tensor pool_into(const Tensor& a, const FeatureMap& in, const FeatureMap& out, const OptionalTensor& b,
                 bool relu) {
  FeatureMap second;
  if (b) {
    second = input_map(*b);
    STD_TORCH_CHECK(second.layout == in.layout, "b must have a's layout");
  }
  const bool in_place = in.data == out.data;
  PassKind kind = in_place ? PassKind::kRead : PassKind::kCopy;
  if (b) {
    kind = relu ? PassKind::kAddRelu : PassKind::kAdd;
  } else if (relu) {
    kind = PassKind::kRelu;
  }
  Tensor pooled = new_tensor(a, {in.n, in.c});
  float* sums = write(pooled);
  const int64_t groups = (in.c + kPoolGroup - 1) / kPoolGroup;
  parallel(threads_for(in.n * in.sample_size()), in.n * groups, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / groups, c = i % groups * kPoolGroup;
      const PoolPass pass{kind, in.sample(n), b ? second.sample(n) : nullptr, out.sample(n)};
      pool_sample(pass, in.c, in.hw(), in.channels_last(), c, std::min(c + kPoolGroup, in.c),
                  sums + n * in.c);
    }
  });
  return pooled;
}

std::tuple<Tensor, Tensor> add_relu_pool(const Tensor& a, const OptionalTensor& b, bool relu) {
  const FeatureMap in = input_map(a);
  Tensor y = new_map(a, in, in.c);
  Tensor pooled = pool_into(a, in, output_map(y), b, relu);
  return {y, pooled};
}

Tensor add_relu_pool_(const Tensor& a, const OptionalTensor& b, bool relu) {
  const FeatureMap map = output_map(a);
  return pool_into(a, map, map, b, relu);
}

std::tuple<Tensor, Tensor, Tensor> mod_block(const Tensor& x, const Tensor& fc1_weight,
                                             const Tensor& fc2_weight, const OptionalTensor& fc1_bias,
                                             const OptionalTensor& fc2_bias, const OptionalTensor& pooled,
                                             int64_t k, const Tensor& conv_parameters, int64_t mid_channels,
                                             const std::string& kind, bool final_relu,
                                             const std::string& position) {
  BlockArguments a;
  a.x = input_map(x);
  const ConvBlock block = conv_block(conv_parameters, mid_channels, kind, final_relu, position, k);
  a.block = &block;
  Tensor y = new_map(x, a.x, a.x.c);
  a.y = output_map(y);
  const Selection out = prepare_selection(a, x, fc1_weight, fc2_weight, fc1_bias, fc2_bias, pooled, k);
  run_block(a);
  return {y, out.index, out.logits};
}

std::tuple<Tensor, Tensor> mod_block_(const Tensor& x, const Tensor& fc1_weight, const Tensor& fc2_weight,
                                      const OptionalTensor& fc1_bias, const OptionalTensor& fc2_bias,
                                      const OptionalTensor& pooled, int64_t k, const Tensor& conv_parameters,
                                      int64_t mid_channels, const std::string& kind, bool final_relu,
                                      const std::string& position) {
  BlockArguments a;
  a.x = a.y = output_map(x);
  const ConvBlock block = conv_block(conv_parameters, mid_channels, kind, final_relu, position, k);
  a.block = &block;
  const Selection out = prepare_selection(a, x, fc1_weight, fc2_weight, fc1_bias, fc2_bias, pooled, k);
  run_block(a);
  return {out.index, out.logits};
}

}  // namespace
}  // namespace mod_kernels

STABLE_TORCH_LIBRARY_IMPL(mod_kernels_cpu, CPU, m) {
  m.impl("select_channels", TORCH_BOX(&mod_kernels::select_channels));
  m.impl("gather_channels", TORCH_BOX(&mod_kernels::gather_channels));
  m.impl("fuse_channels", TORCH_BOX(&mod_kernels::fuse_channels));
  m.impl("fuse_channels_", TORCH_BOX(&mod_kernels::fuse_channels_));
  m.impl("add_relu_pool", TORCH_BOX(&mod_kernels::add_relu_pool));
  m.impl("add_relu_pool_", TORCH_BOX(&mod_kernels::add_relu_pool_));
  m.impl("mod_block", TORCH_BOX(&mod_kernels::mod_block));
  m.impl("mod_block_", TORCH_BOX(&mod_kernels::mod_block_));
}
