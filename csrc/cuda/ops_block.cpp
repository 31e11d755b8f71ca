// The raw ops of a selection and of a whole block of mod_kernels_cuda (schemas: mod_kernels/_library.py):
// arguments unpacked, outputs and workspace allocated, the launches of a plan. `counters` comes from the
// caller (mod_kernels/backends/_workspace.py): what is in no argument would race where two graphs are
// replayed at once.
#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>

#include "../common/conv_block.h"
#include "launch_block.h"
#include "torch_cuda.h"

namespace mod_kernels {
namespace {

// The tensors of a selector, as an op gets them.
struct Selector {
  const Tensor &fc1_weight, &fc2_weight;
  const OptionalTensor &fc1_bias, &fc2_bias, &pooled;
  int64_t k;
};

SelectorParameter parameter(const Tensor& t, DType of_x) {
  const DType dtype = dtype_of(t);
  require(dtype == DType::kFloat || dtype == of_x, "the selector's weights must be of x's dtype or float32");
  require(t.is_contiguous(), "the selector's weights must be contiguous");
  return {t.const_data_ptr(), dtype == DType::kFloat};
}
SelectorParameter parameter(const OptionalTensor& t, DType of_x) {
  return t ? parameter(*t, of_x) : SelectorParameter{};
}

float* floats(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

// A selection from x; what it gives is not wanted until its memory is filled in.
template <class T>
BlockCall selection(const Tensor& x, const Selector& s, const Tensor& counters) {
  const FeatureMap<T> map = input_map<T>(x);
  BlockCall call;
  call.dtype = dtype_of(x);
  call.x = map.data;
  call.stride_xn = map.stride_n;
  call.n = map.n;
  call.c = map.c;
  call.h = map.h;
  call.w = map.w;
  call.channels_last = map.channels_last();
  call.r = s.fc1_weight.size(0);
  call.k = s.k;
  call.fc1_weight = parameter(s.fc1_weight, call.dtype);
  call.fc2_weight = parameter(s.fc2_weight, call.dtype);
  call.fc1_bias = parameter(s.fc1_bias, call.dtype);
  call.fc2_bias = parameter(s.fc2_bias, call.dtype);
  if (s.pooled) call.pooled = matrix<float>(*s.pooled, "pooled", map.n, map.c);
  require(counters.scalar_type() == ScalarType::Int && counters.numel() >= map.n,
          "counters must be int32, one for each sample");
  call.counters = static_cast<int32_t*>(counters.mutable_data_ptr());
  return call;
}

// The block of a form, its result in y.
void set_block(BlockCall& call, void* y, int64_t stride_yn, const Tensor& conv_parameters,
               const std::string& form) {
  require(conv_parameters.scalar_type() == ScalarType::Float, "conv_parameters must be float32");
  const ConvBlock<float> block =
      conv_block(read<float>(conv_parameters), conv_parameters.numel(), form, call.k);
  call.y = y;
  call.stride_yn = stride_yn;
  call.conv = read<float>(conv_parameters);
  call.form = {block.kind, block.m, block.final_relu, block.position};
}

void run(const BlockCall& call, const Tensor& x, const OnDeviceOf& device) {
  const BlockPlan plan = plan_block(call, current_architecture());
  check_launch(plan.refused);
  const Tensor workspace = fresh<1>(x, {plan.workspace_bytes}, ScalarType::Byte);
  check_launch(launch_block(plan, workspace.mutable_data_ptr(), device.stream()));
}

std::tuple<Tensor, Tensor> select_channels(const Tensor& x, const Tensor& fc1_weight,
                                           const Tensor& fc2_weight, const OptionalTensor& fc1_bias,
                                           const OptionalTensor& fc2_bias, const OptionalTensor& pooled,
                                           int64_t k, const Tensor& counters) {
  return for_dtype(x, [&]<class T>() -> std::tuple<Tensor, Tensor> {
    const OnDeviceOf device(x);
    const Selector selector{fc1_weight, fc2_weight, fc1_bias, fc2_bias, pooled, k};
    BlockCall call = selection<T>(x, selector, counters);
    const Tensor scores = fresh<2>(x, {call.n, k}, ScalarType::Float);
    const Tensor index = fresh<2>(x, {call.n, k}, ScalarType::Long);
    call.scores = floats(scores);
    call.index = static_cast<int64_t*>(index.mutable_data_ptr());
    run(call, x, device);
    return {scores, index};
  });
}

using Saved = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Saved select_channels_saving(const Tensor& x, const Tensor& fc1_weight, const Tensor& fc2_weight,
                             const OptionalTensor& fc1_bias, const OptionalTensor& fc2_bias,
                             const OptionalTensor& pooled, int64_t k, const Tensor& counters) {
  return for_dtype(x, [&]<class T>() -> Saved {
    const OnDeviceOf device(x);
    const Selector selector{fc1_weight, fc2_weight, fc1_bias, fc2_bias, pooled, k};
    BlockCall call = selection<T>(x, selector, counters);
    const Tensor scores = fresh<2>(x, {call.n, k}, ScalarType::Float);
    const Tensor index = fresh<2>(x, {call.n, k}, ScalarType::Long);
    const Tensor logits = fresh<2>(x, {call.n, call.c}, ScalarType::Float);
    const Tensor hidden = fresh<2>(x, {call.n, call.r}, ScalarType::Float);
    const Tensor pooled_out = pooled ? nothing(x) : fresh<2>(x, {call.n, call.c}, ScalarType::Float);
    call.scores = floats(scores);
    call.index = static_cast<int64_t*>(index.mutable_data_ptr());
    call.logits = floats(logits);
    call.hidden = floats(hidden);
    if (!pooled) call.pooled_out = floats(pooled_out);
    run(call, x, device);
    return {scores, index, logits, hidden, pooled_out};
  });
}

std::tuple<Tensor, Tensor> mod_block(const Tensor& x, const Tensor& fc1_weight, const Tensor& fc2_weight,
                                     const OptionalTensor& fc1_bias, const OptionalTensor& fc2_bias,
                                     const OptionalTensor& pooled, int64_t k, const Tensor& conv_parameters,
                                     const std::string& form, const Tensor& counters) {
  return for_dtype(x, [&]<class T>() -> std::tuple<Tensor, Tensor> {
    const OnDeviceOf device(x);
    const Selector selector{fc1_weight, fc2_weight, fc1_bias, fc2_bias, pooled, k};
    BlockCall call = selection<T>(x, selector, counters);
    const Tensor y = fresh_map(x, input_map<T>(x), call.c);
    const Tensor logits = fresh<2>(x, {call.n, call.c}, ScalarType::Float);
    set_block(call, y.mutable_data_ptr(), call.c * call.h * call.w, conv_parameters, form);
    call.logits = floats(logits);
    run(call, x, device);
    return {y, logits};
  });
}

Tensor mod_block_(const Tensor& x, const Tensor& fc1_weight, const Tensor& fc2_weight,
                  const OptionalTensor& fc1_bias, const OptionalTensor& fc2_bias,
                  const OptionalTensor& pooled, int64_t k, const Tensor& conv_parameters,
                  const std::string& form, const Tensor& counters) {
  return for_dtype(x, [&]<class T>() {
    const OnDeviceOf device(x);
    const Selector selector{fc1_weight, fc2_weight, fc1_bias, fc2_bias, pooled, k};
    BlockCall call = selection<T>(x, selector, counters);
    const Tensor logits = fresh<2>(x, {call.n, call.c}, ScalarType::Float);
    set_block(call, x.mutable_data_ptr(), call.stride_xn, conv_parameters, form);
    call.logits = floats(logits);
    run(call, x, device);
    return logits;
  });
}

}  // namespace
}  // namespace mod_kernels

STABLE_TORCH_LIBRARY_IMPL(mod_kernels_cuda, CUDA, m) {
  m.impl("select_channels", TORCH_BOX(&mod_kernels::select_channels));
  m.impl("select_channels_saving", TORCH_BOX(&mod_kernels::select_channels_saving));
  m.impl("mod_block", TORCH_BOX(&mod_kernels::mod_block));
  m.impl("mod_block_", TORCH_BOX(&mod_kernels::mod_block_));
}
