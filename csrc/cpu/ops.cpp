// The raw ops of mod_kernels_cpu (schemas: mod_kernels/_library.py): arguments unpacked, outputs allocated,
// work handed on. Shapes, dtypes and k have been checked in Python; an index's range is data and checked
// here.
#include <torch/csrc/stable/library.h>

#include <string>
#include <string_view>
#include <tuple>

#include "arguments.h"
#include "block.h"
#include "pool.h"
#include "runtime.h"

namespace mod_kernels {
namespace {

template <class T, class F>
void for_samples(const FeatureMap<T>& x, int64_t elements, const F& work) {
  parallel(threads_for(elements), x.n, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) work(n);
  });
}

// The tensors of a selector, as an op gets them.
struct Selector {
  const Tensor &fc1_weight, &fc2_weight;
  const OptionalTensor &fc1_bias, &fc2_bias, &pooled;
  int64_t k;
};

// The arguments of a selection from x; what it gives is scratch until its memory is filled in.
template <class T>
BlockArguments<T> selection(const FeatureMap<T>& x, const Selector& s, Converted<Accumulate<T>>& converted) {
  using A = Accumulate<T>;
  BlockArguments<T> a;
  a.x = x;
  const int64_t channels = x.c, reduced = s.fc1_weight.size(0);
  const DType fc1 = weight_dtype<A>(s.fc1_weight), fc2 = weight_dtype<A>(s.fc2_weight);
  a.fc1 = {s.fc1_weight.const_data_ptr(), fc1, converted(s.fc1_bias), channels, reduced, true};
  a.fc2 = {s.fc2_weight.const_data_ptr(), fc2, converted(s.fc2_bias), reduced, channels, false};
  if (s.pooled)
    require(s.pooled->scalar_type() == scalar_type<A>, "pooled must be float32, float64 for float64");
  a.pooled_given = read<A>(s.pooled);
  a.k = s.k;
  return a;
}

template <class A>
ConvBlock<A> conv_block(const Tensor& parameters, std::string_view form, int64_t k, Converted<A>& converted) {
  return mod_kernels::conv_block(converted(parameters), parameters.numel(), form, k);
}

std::tuple<Returned, Returned> select_channels(const Tensor& x, const Tensor& fc1_weight,
                                               const Tensor& fc2_weight, const OptionalTensor& fc1_bias,
                                               const OptionalTensor& fc2_bias, const OptionalTensor& pooled,
                                               int64_t k) {
  return for_dtype(x, [&]<class T>() -> std::tuple<Returned, Returned> {
    using A = Accumulate<T>;
    Converted<A> converted;
    const Selector selector{fc1_weight, fc2_weight, fc1_bias, fc2_bias, pooled, k};
    BlockArguments<T> a = selection(input_map<T>(x), selector, converted);
    Outputs<T> outputs(x);
    Output scores = outputs.matrix(a.x.n, k), index = outputs.indices(a.x.n, k);
    a.scores = static_cast<A*>(write(scores));
    a.index = static_cast<int64_t*>(write(index));
    run_block(a);
    return {give(scores), give(index)};
  });
}

using Saved = std::tuple<Returned, Returned, Returned, Returned, Returned>;

Saved select_channels_saving(const Tensor& x, const Tensor& fc1_weight, const Tensor& fc2_weight,
                             const OptionalTensor& fc1_bias, const OptionalTensor& fc2_bias,
                             const OptionalTensor& pooled, int64_t k) {
  return for_dtype(x, [&]<class T>() -> Saved {
    using A = Accumulate<T>;
    Converted<A> converted;
    const Selector selector{fc1_weight, fc2_weight, fc1_bias, fc2_bias, pooled, k};
    BlockArguments<T> a = selection(input_map<T>(x), selector, converted);
    Outputs<T> outputs(x);
    Output scores = outputs.matrix(a.x.n, k), index = outputs.indices(a.x.n, k);
    Output logits = outputs.matrix(a.x.n, a.x.c), hidden = outputs.matrix(a.x.n, a.fc1.outputs);
    Output pooled_out = pooled ? outputs.empty() : outputs.matrix(a.x.n, a.x.c);
    a.scores = static_cast<A*>(write(scores));
    a.index = static_cast<int64_t*>(write(index));
    a.logits = static_cast<A*>(write(logits));
    a.hidden = static_cast<A*>(write(hidden));
    if (!pooled) a.pooled = static_cast<A*>(write(pooled_out));
    run_block(a);
    return {give(scores), give(index), give(logits), give(hidden), give(pooled_out)};
  });
}

Returned gather_channels(const Tensor& x, const Tensor& index) {
  return for_dtype(x, [&]<class T>() {
    const FeatureMap<T> from = input_map<T>(x);
    const int64_t* channels = checked_index(index, from.c);
    const int64_t k = index.size(1);
    Output out = Outputs<T>(x).map(from, k);
    const FeatureMap<T> to = output_map(out, from, k);
    for_samples(from, to.n * to.sample_size(),
                [&](int64_t n) { gather_sample(from, n, channels + n * k, to); });
    return give(out);
  });
}

// What is added to a map of T.
template <class T>
struct Addition {
  using A = Accumulate<T>;
  FeatureMap<T> z;
  Position position;
  const A* scores;
  const int64_t* index;  // read for position "original" alone, null else

  Addition(const Tensor& z_, const Tensor& scores_, const OptionalTensor& index_, std::string_view where,
           int64_t channels)
      : z(input_map<T>(z_)), position(position_of(where)), scores(read<A>(scores_)), index(nullptr) {
    require(scores_.scalar_type() == scalar_type<A>, "scores must be float32, float64 for float64");
    if (position != Position::kOriginal) return;
    require(index_.has_value(), "position 'original' needs index");
    index = checked_index(*index_, channels);
  }
  const A* scores_of(int64_t n) const { return scores + n * z.c; }
  const int64_t* index_of(int64_t n) const { return index ? index + n * z.c : nullptr; }
};

Returned fuse_channels(const Tensor& x, const Tensor& z, const Tensor& scores, const OptionalTensor& index,
                       const std::string& position) {
  return for_dtype(x, [&]<class T>() {
    const FeatureMap<T> from = input_map<T>(x);
    const Addition<T> add(z, scores, index, position, from.c);
    Output y = Outputs<T>(x).map(from, from.c);
    const FeatureMap<T> to = output_map(y, from, from.c);
    for_samples(from, from.n * from.sample_size(), [&](int64_t n) {
      copy_fuse_sample(from, to, add.z, n, add.scores_of(n), add.index_of(n), add.position);
    });
    return give(y);
  });
}

void fuse_channels_(const Tensor& x, const Tensor& z, const Tensor& scores, const OptionalTensor& index,
                    const std::string& position) {
  for_dtype(x, [&]<class T>() {
    const FeatureMap<T> to = output_map<T>(x);
    const Addition<T> add(z, scores, index, position, to.c);
    for_samples(to, add.z.n * add.z.sample_size(), [&](int64_t n) {
      fuse_sample(to, add.z, n, add.scores_of(n), add.index_of(n), add.position);
    });
  });
}

// sums, (N, C), receives the means.
template <class T>
void pool_into(const FeatureMap<T>& in, const FeatureMap<T>& out, const OptionalTensor& b, bool relu,
               void* sums) {
  FeatureMap<T> second;
  if (b) {
    second = input_map<T>(*b);
    require(second.layout == in.layout, "b must have a's layout");
  }
  const bool in_place = in.data == out.data;
  PassKind kind = in_place ? PassKind::kRead : PassKind::kCopy;
  if (b) {
    kind = relu ? PassKind::kAddRelu : PassKind::kAdd;
  } else if (relu) {
    kind = PassKind::kRelu;
  }
  const auto pool = [&](int64_t n, int64_t begin, int64_t end) {
    const PoolPass<T> pass{kind, in.sample(n), b ? second.sample(n) : nullptr, out.sample(n)};
    pool_sample(pass, in.c, in.hw(), in.channels_last(), begin, end,
                static_cast<Accumulate<T>*>(sums) + n * in.c);
  };
  for_pool_groups(threads_for(in.n * in.sample_size()), in.n, in.c, pool);
}

std::tuple<Returned, Returned> add_relu_pool(const Tensor& a, const OptionalTensor& b, bool relu) {
  return for_dtype(a, [&]<class T>() -> std::tuple<Returned, Returned> {
    const FeatureMap<T> in = input_map<T>(a);
    Outputs<T> outputs(a);
    Output pooled = outputs.matrix(in.n, in.c), y = outputs.map(in, in.c);
    pool_into(in, output_map(y, in, in.c), b, relu, write(pooled));
    return {give(y), give(pooled)};
  });
}

Returned add_relu_pool_(const Tensor& a, const OptionalTensor& b, bool relu) {
  return for_dtype(a, [&]<class T>() {
    const FeatureMap<T> map = output_map<T>(a);
    Output pooled = Outputs<T>(a).matrix(map.n, map.c);
    pool_into(map, map, b, relu, write(pooled));
    return give(pooled);
  });
}

std::tuple<Returned, Returned> mod_block(const Tensor& x, const Tensor& fc1_weight, const Tensor& fc2_weight,
                                         const OptionalTensor& fc1_bias, const OptionalTensor& fc2_bias,
                                         const OptionalTensor& pooled, int64_t k,
                                         const Tensor& conv_parameters, const std::string& form) {
  return for_dtype(x, [&]<class T>() -> std::tuple<Returned, Returned> {
    using A = Accumulate<T>;
    Converted<A> converted;
    const Selector selector{fc1_weight, fc2_weight, fc1_bias, fc2_bias, pooled, k};
    BlockArguments<T> a = selection(input_map<T>(x), selector, converted);
    const ConvBlock<A> block = conv_block(conv_parameters, form, k, converted);
    a.block = &block;
    Outputs<T> outputs(x);
    Output logits = outputs.matrix(a.x.n, a.x.c), y = outputs.map(a.x, a.x.c);
    a.logits = static_cast<A*>(write(logits));
    a.y = output_map(y, a.x, a.x.c);
    run_block(a);
    return {give(y), give(logits)};
  });
}

Returned mod_block_(const Tensor& x, const Tensor& fc1_weight, const Tensor& fc2_weight,
                    const OptionalTensor& fc1_bias, const OptionalTensor& fc2_bias,
                    const OptionalTensor& pooled, int64_t k, const Tensor& conv_parameters,
                    const std::string& form) {
  return for_dtype(x, [&]<class T>() {
    using A = Accumulate<T>;
    Converted<A> converted;
    const FeatureMap<T> map = output_map<T>(x);
    const Selector selector{fc1_weight, fc2_weight, fc1_bias, fc2_bias, pooled, k};
    BlockArguments<T> a = selection(map, selector, converted);
    const ConvBlock<A> block = conv_block(conv_parameters, form, k, converted);
    a.block = &block;
    a.y = map;
    Output logits = Outputs<T>(x).matrix(map.n, map.c);
    a.logits = static_cast<A*>(write(logits));
    run_block(a);
    return give(logits);
  });
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
