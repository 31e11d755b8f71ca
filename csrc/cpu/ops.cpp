// The raw ops of mod_kernels_cpu (schemas: mod_kernels/_library.py): arguments unpacked, outputs allocated,
// work handed on. Shapes, dtypes and k have been checked in Python; an index's range is data and checked
// here.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <iterator>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <tuple>

#include "../common/check.h"
#include "block.h"
#include "fuse.h"
#include "outputs.h"
#include "parallel.h"
#include "pool.h"

namespace mod_kernels {
namespace {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Returned = StableIValue;  // a tensor's handle, given away

Returned give(Output& tensor) { return torch::stable::detail::from(tensor.release()); }

const float* read(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }
float* write(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }
const float* read(const OptionalTensor& t) { return t ? read(*t) : nullptr; }

FeatureMap feature_map(const Tensor& t, float* data) {
  const int64_t* size = t.sizes().data();
  const int64_t* stride = t.strides().data();
  const Layout layout = layout_of(size, stride);
  require(layout != Layout::kOther, "a feature map must be dense in NCHW or channels_last order");
  return {data, size[0], size[1], size[2], size[3], stride[0], layout};
}
// Never written through: a FeatureMap has one pointer type for inputs and outputs.
FeatureMap input_map(const Tensor& t) { return feature_map(t, const_cast<float*>(read(t))); }
FeatureMap output_map(const Tensor& t) { return feature_map(t, write(t)); }
// A fresh one: dense, in x's layout.
FeatureMap output_map(const Output& t, const FeatureMap& x, int64_t channels) {
  return {write(t), x.n, channels, x.h, x.w, channels * x.hw(), x.layout};
}

Position position_of(std::string_view name) {
  if (name == "first") return Position::kFirst;
  if (name == "last") return Position::kLast;
  require(name == "original", "position must be 'first', 'last' or 'original', got '", name, "'");
  return Position::kOriginal;
}

// Before anything is written: the kernels below index with these.
const int64_t* checked_index(const Tensor& index, int64_t channels) {
  const auto* data = static_cast<const int64_t*>(index.const_data_ptr());
  const int64_t count = index.numel();
  for (int64_t i = 0; i < count; ++i) {
    require(data[i] >= 0 && data[i] < channels, "index must be between 0 and C-1=", channels - 1, ", got ",
            data[i]);
  }
  return data;
}

template <class F>
void for_samples(const FeatureMap& x, int64_t elements, const F& work) {
  parallel(threads_for(elements), x.n, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) work(n);
  });
}

// The arguments of a selection from x; what it gives is scratch until its memory is filled in.
BlockArguments selection(const FeatureMap& x, const Tensor& fc1_weight, const Tensor& fc2_weight,
                         const OptionalTensor& fc1_bias, const OptionalTensor& fc2_bias,
                         const OptionalTensor& pooled, int64_t k) {
  BlockArguments a;
  a.x = x;
  const int64_t channels = x.c, reduced = fc1_weight.size(0);
  a.fc1 = {read(fc1_weight), read(fc1_bias), channels, reduced, true};
  a.fc2 = {read(fc2_weight), read(fc2_bias), reduced, channels, false};
  a.pooled_given = read(pooled);
  a.k = k;
  return a;
}

// What a form says: "bottleneck:8:relu:first" (mod_kernels/spec.py).
struct Form {
  std::string_view kind;
  int64_t mid_channels = 0;
  bool final_relu = false;
  Position position = Position::kFirst;
};

Form read_form(std::string_view form) {
  std::array<std::string_view, 4> parts;
  std::string_view rest = form;
  require(std::count(form.begin(), form.end(), ':') == std::ssize(parts) - 1,
          "form must be kind:mid_channels:relu or linear:position, got '", form, "'");
  for (std::string_view& part : parts) {
    part = rest.substr(0, rest.find(':'));
    rest.remove_prefix(std::min(part.size() + 1, rest.size()));
  }
  const auto [kind, mid_channels, ending, position] = parts;
  Form read{kind};
  const char* end = mid_channels.data() + mid_channels.size();
  const auto [stopped, error] = std::from_chars(mid_channels.data(), end, read.mid_channels);
  require(error == std::errc() && stopped == end && read.mid_channels >= 0,
          "mid_channels must be a whole number, got '", mid_channels, "' in form '", form, "'");
  read.final_relu = ending == "relu";
  require(read.final_relu || ending == "linear",
          "the last convolution must be followed by 'relu' or 'linear', got '", ending, "' in form '", form,
          "'");
  read.position = position_of(position);
  return read;
}

// Where each convolution's weight and bias lie in the packed tensor; its size keeps the kernels inside.
ConvBlock conv_block(const Tensor& parameters, std::string_view form, int64_t k) {
  const auto [kind, mid_channels, final_relu, position] = read_form(form);
  ConvBlock block{BlockKind::kBottleneck, final_relu, position, k, k};
  std::array<std::array<int64_t, 2>, 3> shapes{};  // outputs, and weights of each output
  const int64_t size = parameters.numel();
  if (kind == "basic") {
    block.kind = BlockKind::kBasic;
    shapes = {{{k, k * 9}, {k, k * 9}}};
  } else {
    require(kind == "bottleneck", "kind must be 'bottleneck' or 'basic', got '", kind, "'");
    require(mid_channels >= 1 && mid_channels <= size,
            "mid_channels must be between 1 and the size of conv_parameters, got ", mid_channels);
    const int64_t m = block.m = mid_channels;
    shapes = {{{m, k}, {m, m * 9}, {k, m}}};
  }
  int64_t needed = 0;
  for (const auto [outputs, each] : shapes) needed += outputs * (each + 1);
  require(size == needed, "conv_parameters of a ", kind, " with k=", k, " and mid_channels=", mid_channels,
          " must be ", needed, " values, got ", size);
  const float* data = read(parameters);
  for (std::size_t i = 0; i < shapes.size(); ++i) {
    const auto [outputs, each] = shapes[i];
    block.weight[i] = data;
    block.bias[i] = data + outputs * each;
    data += outputs * (each + 1);
  }
  return block;
}

std::tuple<Returned, Returned> select_channels(const Tensor& x, const Tensor& fc1_weight,
                                               const Tensor& fc2_weight, const OptionalTensor& fc1_bias,
                                               const OptionalTensor& fc2_bias, const OptionalTensor& pooled,
                                               int64_t k) {
  BlockArguments a = selection(input_map(x), fc1_weight, fc2_weight, fc1_bias, fc2_bias, pooled, k);
  Outputs outputs(x);
  Output scores = outputs.floats(a.x.n, k), index = outputs.indices(a.x.n, k);
  a.scores = write(scores);
  a.index = write_index(index);
  run_block(a);
  return {give(scores), give(index)};
}

std::tuple<Returned, Returned, Returned, Returned, Returned> select_channels_saving(
    const Tensor& x, const Tensor& fc1_weight, const Tensor& fc2_weight, const OptionalTensor& fc1_bias,
    const OptionalTensor& fc2_bias, const OptionalTensor& pooled, int64_t k) {
  BlockArguments a = selection(input_map(x), fc1_weight, fc2_weight, fc1_bias, fc2_bias, pooled, k);
  Outputs outputs(x);
  Output scores = outputs.floats(a.x.n, k), index = outputs.indices(a.x.n, k);
  Output logits = outputs.floats(a.x.n, a.x.c), hidden = outputs.floats(a.x.n, a.fc1.outputs);
  Output pooled_out = pooled ? outputs.empty() : outputs.floats(a.x.n, a.x.c);
  a.scores = write(scores);
  a.index = write_index(index);
  a.logits = write(logits);
  a.hidden = write(hidden);
  if (!pooled) a.pooled = write(pooled_out);
  run_block(a);
  return {give(scores), give(index), give(logits), give(hidden), give(pooled_out)};
}

Returned gather_channels(const Tensor& x, const Tensor& index) {
  const FeatureMap from = input_map(x);
  const int64_t* channels = checked_index(index, from.c);
  const int64_t k = index.size(1);
  Output out = Outputs(x).map(from, k);
  const FeatureMap to = output_map(out, from, k);
  for_samples(from, to.n * to.sample_size(),
              [&](int64_t n) { gather_sample(from, n, channels + n * k, to); });
  return give(out);
}

// The index is read for position "original" alone.
const int64_t* fuse_index(const OptionalTensor& index, Position position, int64_t channels) {
  if (position != Position::kOriginal) return nullptr;
  require(index.has_value(), "position 'original' needs index");
  return checked_index(*index, channels);
}

Returned fuse_channels(const Tensor& x, const Tensor& z, const Tensor& scores, const OptionalTensor& index,
                       const std::string& position) {
  const FeatureMap from = input_map(x), add = input_map(z);
  const Position where = position_of(position);
  const int64_t* channels = fuse_index(index, where, from.c);
  Output y = Outputs(x).map(from, from.c);
  const FeatureMap to = output_map(y, from, from.c);
  for_samples(from, from.n * from.sample_size(), [&](int64_t n) {
    copy_fuse_sample(from, to, add, n, read(scores) + n * add.c, channels ? channels + n * add.c : nullptr,
                     where);
  });
  return give(y);
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

// sums, (N, C), receives the means.
void pool_into(const FeatureMap& in, const FeatureMap& out, const OptionalTensor& b, bool relu, float* sums) {
  FeatureMap second;
  if (b) {
    second = input_map(*b);
    require(second.layout == in.layout, "b must have a's layout");
  }
  const bool in_place = in.data == out.data;
  PassKind kind = in_place ? PassKind::kRead : PassKind::kCopy;
  if (b) {
    kind = relu ? PassKind::kAddRelu : PassKind::kAdd;
  } else if (relu) {
    kind = PassKind::kRelu;
  }
  const int64_t groups = (in.c + kPoolGroup - 1) / kPoolGroup;
  parallel(threads_for(in.n * in.sample_size()), in.n * groups, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / groups, c = i % groups * kPoolGroup;
      const PoolPass pass{kind, in.sample(n), b ? second.sample(n) : nullptr, out.sample(n)};
      pool_sample(pass, in.c, in.hw(), in.channels_last(), c, std::min(c + kPoolGroup, in.c),
                  sums + n * in.c);
    }
  });
}

std::tuple<Returned, Returned> add_relu_pool(const Tensor& a, const OptionalTensor& b, bool relu) {
  const FeatureMap in = input_map(a);
  Outputs outputs(a);
  Output pooled = outputs.floats(in.n, in.c), y = outputs.map(in, in.c);
  pool_into(in, output_map(y, in, in.c), b, relu, write(pooled));
  return {give(y), give(pooled)};
}

Returned add_relu_pool_(const Tensor& a, const OptionalTensor& b, bool relu) {
  const FeatureMap map = output_map(a);
  Output pooled = Outputs(a).floats(map.n, map.c);
  pool_into(map, map, b, relu, write(pooled));
  return give(pooled);
}

std::tuple<Returned, Returned> mod_block(const Tensor& x, const Tensor& fc1_weight, const Tensor& fc2_weight,
                                         const OptionalTensor& fc1_bias, const OptionalTensor& fc2_bias,
                                         const OptionalTensor& pooled, int64_t k,
                                         const Tensor& conv_parameters, const std::string& form) {
  BlockArguments a = selection(input_map(x), fc1_weight, fc2_weight, fc1_bias, fc2_bias, pooled, k);
  const ConvBlock block = conv_block(conv_parameters, form, k);
  a.block = &block;
  Outputs outputs(x);
  Output logits = outputs.floats(a.x.n, a.x.c), y = outputs.map(a.x, a.x.c);
  a.logits = write(logits);
  a.y = output_map(y, a.x, a.x.c);
  run_block(a);
  return {give(y), give(logits)};
}

Returned mod_block_(const Tensor& x, const Tensor& fc1_weight, const Tensor& fc2_weight,
                    const OptionalTensor& fc1_bias, const OptionalTensor& fc2_bias,
                    const OptionalTensor& pooled, int64_t k, const Tensor& conv_parameters,
                    const std::string& form) {
  const FeatureMap map = output_map(x);
  BlockArguments a = selection(map, fc1_weight, fc2_weight, fc1_bias, fc2_bias, pooled, k);
  const ConvBlock block = conv_block(conv_parameters, form, k);
  a.block = &block;
  a.y = map;
  Output logits = Outputs(x).floats(map.n, map.c);
  a.logits = write(logits);
  run_block(a);
  return give(logits);
}

}  // namespace
}  // namespace mod_kernels

STABLE_TORCH_LIBRARY_IMPL(mod_kernels_cpu, CPU, m) {
  m.impl("select_channels", TORCH_BOX(&mod_kernels::select_channels));
  m.impl("select_channels_saving", TORCH_BOX(&mod_kernels::select_channels_saving));
  m.impl("gather_channels", TORCH_BOX(&mod_kernels::gather_channels));
  m.impl("fuse_channels", TORCH_BOX(&mod_kernels::fuse_channels));
  m.impl("fuse_channels_", TORCH_BOX(&mod_kernels::fuse_channels_));
  m.impl("add_relu_pool", TORCH_BOX(&mod_kernels::add_relu_pool));
  m.impl("add_relu_pool_", TORCH_BOX(&mod_kernels::add_relu_pool_));
  m.impl("mod_block", TORCH_BOX(&mod_kernels::mod_block));
  m.impl("mod_block_", TORCH_BOX(&mod_kernels::mod_block_));
}
