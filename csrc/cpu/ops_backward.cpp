// The raw ops of the backward (schemas: mod_kernels/_library.py). Shapes and layouts are checked here too:
// gradients come from autograd in whatever form its nodes left them, and the kernels go by shapes alone.
#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>

#include "arguments.h"
#include "fuse_backward.h"
#include "input_gradient.h"
#include "select_backward.h"

namespace mod_kernels {
namespace {

const int64_t* index_matrix(const Tensor& t, int64_t rows, int64_t columns, int64_t channels) {
  check_matrix(t, "index", rows, columns);
  return checked_index(t, channels);
}

using Two = std::tuple<Returned, Returned>;

Two fuse_channels_backward(const Tensor& dy, const Tensor& z, const Tensor& scores,
                           const OptionalTensor& index, const std::string& position, bool z_needed,
                           bool scores_needed) {
  return for_dtype(dy, [&]<class T>() -> Two {
    using A = Accumulate<T>;
    FuseGradient<T> g;
    g.dy = gradient_map<T>(dy);
    g.z = narrow_map(z, "z", g.dy);
    const int64_t n = g.dy.n, k = g.z.c;
    g.scores = matrix<A>(scores, "scores", n, k);
    g.position = position_of(position);
    if (g.position == Position::kOriginal) {
      require(index.has_value(), "position 'original' needs index");
      g.index = index_matrix(*index, n, k, g.dy.c);
    }
    Outputs<T> outputs(z);
    // z's own layout, as the fake implementation says; where it fits both that is no difference in memory.
    const FeatureMap<T> like = input_map<T>(z);
    Output dz = z_needed ? outputs.map(like, k) : outputs.no_map();
    Output dscores = scores_needed ? outputs.matrix(n, k) : outputs.empty();
    if (z_needed) g.dz = output_map(dz, g.z, k);
    if (scores_needed) g.dscores = static_cast<A*>(write(dscores));
    fuse_backward(g);
    return {give(dz), give(dscores)};
  });
}

using Five = std::tuple<Returned, Returned, Returned, Returned, Returned>;

// Everything is in the accumulation dtype, but for the weights.
template <class A>
Five select_backward_of(const Tensor& dscores, const Tensor& scores, const Tensor& index,
                        const Tensor& hidden, const Tensor& pooled, const Tensor& fc1_weight,
                        const Tensor& fc2_weight, bool pooled_needed, bool fc1_needed, bool fc2_needed,
                        bool fc1_bias_needed, bool fc2_bias_needed) {
  require(scores.dim() == 2 && fc1_weight.dim() == 2, "scores and fc1_weight must have 2 dimensions");
  SelectGradient<A> g;
  const int64_t n = g.samples = scores.size(0), k = g.k = scores.size(1);
  const int64_t units = g.units = fc1_weight.size(0), channels = g.channels = fc1_weight.size(1);
  g.scores = matrix<A>(scores, "scores", n, k);
  g.dscores = matrix<A>(dscores, "dscores", n, k);
  g.index = index_matrix(index, n, k, channels);
  g.hidden = matrix<A>(hidden, "hidden", n, units);
  g.pooled = matrix<A>(pooled, "pooled", n, channels);
  check_matrix(fc1_weight, "fc1_weight", units, channels);
  check_matrix(fc2_weight, "fc2_weight", channels, units);
  g.fc1 = {fc1_weight.const_data_ptr(), weight_dtype<A>(fc1_weight)};
  g.fc2 = {fc2_weight.const_data_ptr(), weight_dtype<A>(fc2_weight)};

  Outputs<A> outputs(scores);
  Output dpooled = pooled_needed ? outputs.matrix(n, channels) : outputs.empty();
  Output dfc1 = fc1_needed ? outputs.matrix(units, channels) : outputs.empty();
  Output dfc2 = fc2_needed ? outputs.matrix(channels, units) : outputs.empty();
  Output db1 = fc1_bias_needed ? outputs.vector(units) : outputs.empty();
  Output db2 = fc2_bias_needed ? outputs.vector(channels) : outputs.empty();
  const auto to = [](bool needed, const Output& t) { return needed ? static_cast<A*>(write(t)) : nullptr; };
  g.dpooled = to(pooled_needed, dpooled);
  g.dfc1 = to(fc1_needed, dfc1);
  g.dfc2 = to(fc2_needed, dfc2);
  g.db1 = to(fc1_bias_needed, db1);
  g.db2 = to(fc2_bias_needed, db2);
  select_backward(g);
  return {give(dpooled), give(dfc1), give(dfc2), give(db1), give(db2)};
}

Five select_channels_backward(const Tensor& dscores, const Tensor& scores, const Tensor& index,
                              const Tensor& hidden, const Tensor& pooled, const Tensor& fc1_weight,
                              const Tensor& fc2_weight, bool pooled_needed, bool fc1_needed, bool fc2_needed,
                              bool fc1_bias_needed, bool fc2_bias_needed) {
  const auto run = [&]<class A>() {
    return select_backward_of<A>(dscores, scores, index, hidden, pooled, fc1_weight, fc2_weight,
                                 pooled_needed, fc1_needed, fc2_needed, fc1_bias_needed, fc2_bias_needed);
  };
  return scores.scalar_type() == ScalarType::Double ? run.template operator()<double>()
                                                    : run.template operator()<float>();
}

Returned input_gradient_op(const Tensor& dy, const OptionalTensor& dpooled, const OptionalTensor& dgathered,
                           const OptionalTensor& index, const OptionalTensor& y,
                           const OptionalTensor& overwritten, const std::string& position) {
  return for_dtype(dy, [&]<class T>() {
    InputGradient<T> g;
    g.dy = gradient_map<T>(dy);
    g.position = position_of(position);
    if (dpooled) g.dpooled = matrix<Accumulate<T>>(*dpooled, "dpooled", g.dy.n, g.dy.c);
    if (dgathered) g.dgathered = narrow_map(*dgathered, "dgathered", g.dy);
    if (y) {
      g.y = map_beside(*y, "y", g.dy);
      require(g.y.c == g.dy.c, "y must have dy's channels");
    }
    if (overwritten) {
      require(y.has_value(), "overwritten needs y");
      g.overwritten = narrow_map(*overwritten, "overwritten", g.dy);
    }
    const bool original = overwritten && g.position == Position::kOriginal;
    if (dgathered || original) {
      require(index.has_value(), dgathered ? "dgathered needs index" : "position 'original' needs index");
      const int64_t k = dgathered ? g.dgathered.c : g.overwritten.c;
      require(!original || g.overwritten.c == k, "overwritten must have as many channels as dgathered");
      g.index = index_matrix(*index, g.dy.n, k, g.dy.c);
    }
    Output dx = Outputs<T>(dy).map(g.dy, g.dy.c);
    g.dx = output_map(dx, g.dy, g.dy.c);
    input_gradient(g);
    return give(dx);
  });
}

}  // namespace
}  // namespace mod_kernels

STABLE_TORCH_LIBRARY_IMPL(mod_kernels_cpu, CPU, m) {
  m.impl("fuse_channels_backward", TORCH_BOX(&mod_kernels::fuse_channels_backward));
  m.impl("select_channels_backward", TORCH_BOX(&mod_kernels::select_channels_backward));
  m.impl("input_gradient", TORCH_BOX(&mod_kernels::input_gradient_op));
}
