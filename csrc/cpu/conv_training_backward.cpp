#include <algorithm>
#include <utility>

#include "conv.h"
#include "conv_training_parts.h"
#include "weight_gradient.h"

namespace mod_kernels {
namespace {

// A weight's gradient is summed in at most so many groups of neighbouring samples, and those in order: the
// same sums whatever the number of threads, and no more memory for a large batch.
constexpr int64_t kGroups = 16;
// Samples that are taken together have so many pixels, or there is but one: lanes are added up once for all
// of them, which at 7x7 would otherwise be a quarter of the work.
constexpr int64_t kPixelsTogether = 384;

// Over one plane: sum of g, and of g * (c - mean).
template <class A>
struct PlaneSums {
  A g, g_c;
};

template <class A>
struct Backward {
  const TrainedBackward<A>& b;
  const TrainedBlock<A>& block = b.block;
  int64_t n = block.x.n, h = block.x.h, w = block.x.w, hw = block.x.hw();
  int64_t threads = threads_for(block.x.n * block.x.sample_size());
  int64_t together = std::min(n, (kPixelsTogether + hw - 1) / hw);
  int64_t groups = std::min((n + together - 1) / together, kGroups);
  int last = block.layers - 1;
  // Scratch, laid out by run().
  PlaneSums<A>* sums = nullptr;                             // (N, outputs of a layer)
  A *scale = nullptr, *slope = nullptr, *offset = nullptr;  // dc = scale g + slope (c - mean) + offset
  A* zeros = nullptr;
  A* transposed = nullptr;  // (inputs, outputs, taps), the taps reversed
  A* partial = nullptr;     // (groups, outputs, inputs, taps)
  A* inner = nullptr;       // (N, widest, H W): g of the layer below the one at work
  int64_t widest = 0;

  bool parameters_needed(int l) const { return b.dweight[l] || b.dgamma[l] || b.dbeta[l]; }
  // Whether anything is needed of the layers below l: their y is what layer l takes.
  bool input_needed(int l) const {
    if (l == 0) return b.dx.data != nullptr;
    return parameters_needed(l - 1) || input_needed(l - 1);
  }
  bool needed(int l) const { return parameters_needed(l) || input_needed(l); }

  A* g_inner(int64_t i) const { return inner + i * widest * hw; }

  // The last layer's sums, from dz.
  void begin_at(int64_t i) const {
    for (int64_t o = 0; o < block.layer[last].outputs; ++o) {
      const Normalised<A> y(block, last, o);
      const A *c = block.c(last, i) + o * hw, *dz = b.dz.sample(i) + o * hw;
      LaneSums<A, 2> found;
      each_vector<A>(hw, [&](int64_t p, auto lanes, auto which) {
        const Vec<A> at = lanes.load(c + p), g = y.through_relu(at, lanes.load(dz + p));
        found.lanes[0][which] += g;
        found.lanes[1][which] += g * (at - y.mean);
      });
      sums[i * block.layer[last].outputs + o] = {found.total(0), found.total(1)};
    }
  }

  // dgamma and dbeta, and what dc is made with; samples in order, in double.
  void finish(int l) const {
    const TrainedLayer<A>& layer = block.layer[l];
    const A* inverse = block.statistics + block.channels + layer.first_channel;
    const double count = static_cast<double>(n * hw);
    for (int64_t o = 0; o < layer.outputs; ++o) {
      double g = 0, g_c = 0;
      for (int64_t i = 0; i < n; ++i) {
        g += sums[i * layer.outputs + o].g;
        g_c += sums[i * layer.outputs + o].g_c;
      }
      const double to_unit = inverse[o], by = to_unit * (layer.gamma ? layer.gamma[o] : A{1});
      if (b.dbeta[l]) b.dbeta[l][o] = static_cast<A>(g);
      if (b.dgamma[l]) b.dgamma[l][o] = static_cast<A>(g_c * to_unit);
      scale[o] = static_cast<A>(by);
      slope[o] = block.batch_statistics ? static_cast<A>(-by * to_unit * to_unit * g_c / count) : A{0};
      offset[o] = block.batch_statistics ? static_cast<A>(-by * g / count) : A{0};
    }
  }

  // dc[l] of sample i into planes whose other values are zero.
  void normalise_back(int l, int64_t i, const PlaneShape<A>& shape, PlaneRow<A> dc) const {
    for (int64_t o = 0; o < block.layer[l].outputs; ++o) {
      const Normalised<A> y(block, l, o);
      const A* c = block.c(l, i) + o * hw;
      const A* g = (l == last ? b.dz.sample(i) : g_inner(i)) + o * hw;
      A* to = dc(o) + shape.begin;
      const Vec<A> by = splat(scale[o]), slope_o = splat(slope[o]), offset_o = splat(offset[o]);
      const bool masked = l == last && y.relu;  // inner ones have been through their ReLU
      shape.each([&](int64_t dense, int64_t at, auto lanes, auto) {
        const Vec<A> here = lanes.load(c + dense);
        Vec<A> v = lanes.load(g + dense);
        if (masked) v = y.through_relu(here, v);
        lanes.store(to + at, by * v + (slope_o * (here - y.mean) + offset_o));
      });
    }
  }

  // dy[l-1] of sample i, a convolution's output: dx, or g of the layer below with its sums.
  void give_input(int l, int64_t i, const PlaneShape<A>& shape, PlaneRow<A> out) const {
    for (int64_t j = 0; j < block.layer[l].inputs; ++j) {
      const A* from = out(j);
      if (l == 0) {
        A* to = b.dx.sample(i) + j * hw;
        shape.each([&](int64_t dense, int64_t at, auto lanes, auto) {
          lanes.store(to + dense, lanes.load(from + at));
        });
        continue;
      }
      const Normalised<A> y(block, l - 1, j);
      const A* c = block.c(l - 1, i) + j * hw;
      A* to = g_inner(i) + j * hw;
      LaneSums<A, 2> found;
      shape.each([&](int64_t dense, int64_t at, auto lanes, auto which) {
        const Vec<A> here = lanes.load(c + dense), g = y.through_relu(here, lanes.load(from + at));
        lanes.store(to + dense, g);
        found.lanes[0][which] += g;
        found.lanes[1][which] += g * (here - y.mean);
      });
      sums[i * block.layer[l].inputs + j] = {found.total(0), found.total(1)};
    }
  }

  template <int kTaps>
  void through(int l, int64_t begin, int64_t end, A* memory) const {
    const TrainedLayer<A>& layer = block.layer[l];
    const PlaneShape<A> shape(h, w, layer.taps);
    const int64_t dc_next = layer.outputs * shape.stride, in_next = layer.inputs * shape.stride;
    const PlaneRow<A> dc{memory, shape.stride}, in{memory + together * dc_next, shape.stride};
    const PlaneRow<A> out{in.data + together * in_next, shape.stride};
    std::fill(memory, out.data, A{0});
    for (int64_t group = begin; group < end; ++group) {
      A* dweight = b.dweight[l] ? partial + group * layer.weights() : nullptr;
      if (dweight) std::fill_n(dweight, layer.weights(), A{0});
      const int64_t stop = (group + 1) * n / groups;
      for (int64_t i = group * n / groups; i < stop; i += together) {
        const int64_t samples = std::min(together, stop - i);
        for (int64_t s = 0; s < samples; ++s) {
          normalise_back(l, i + s, shape, {dc.data + s * dc_next, shape.stride});
        }
        if (dweight) {
          SamplePlanes<A> input{in, in_next};
          for (int64_t s = 0; s < samples; ++s) {
            const PlaneRow<A> into{in.data + s * in_next, shape.stride};
            const PlaneRow<A> found = layer_input(block, l, i + s, shape, into);
            if (s == 0 && found.data != into.data) input = {found, block.x.stride_n};
          }
          weight_gradient<A, kTaps>({{{dc.data + shape.begin, shape.stride}, dc_next},
                                     input,
                                     samples,
                                     layer.outputs,
                                     layer.inputs,
                                     shape.length,
                                     shape.pitch,
                                     dweight});
        }
        if (!input_needed(l)) continue;
        for (int64_t s = 0; s < samples; ++s) {
          conv<A, kTaps>({layer.outputs, layer.inputs, shape.length, shape.pitch},
                         PlaneRow<A>{dc.data + s * dc_next, shape.stride}, transposed, zeros,
                         [&](int64_t j, int64_t p, Vec<A> v) { store(out(j) + p, v); });
          give_input(l, i + s, shape, out);
        }
      }
    }
  }

  void transpose(const TrainedLayer<A>& layer) const {
    const int64_t taps = layer.taps;
    for (int64_t o = 0; o < layer.outputs; ++o) {
      for (int64_t j = 0; j < layer.inputs; ++j) {
        const A* from = layer.weight + (o * layer.inputs + j) * taps;
        A* to = transposed + (j * layer.outputs + o) * taps;
        for (int64_t t = 0; t < taps; ++t) to[t] = from[taps - 1 - t];
      }
    }
  }

  void add_groups(int l) const {
    const int64_t weights = block.layer[l].weights();
    if (!b.dweight[l]) return;
    std::fill_n(b.dweight[l], weights, A{0});
    for (int64_t group = 0; group < groups; ++group) {
      for (int64_t i = 0; i < weights; ++i) b.dweight[l][i] += partial[group * weights + i];
    }
  }

  void run() {
    int64_t most = 0, weights = 0, of_thread = 0;
    for (int l = 0; l < block.layers; ++l) {
      const TrainedLayer<A>& layer = block.layer[l];
      most = std::max({most, layer.inputs, layer.outputs});
      weights = std::max(weights, layer.weights());
      if (l < last) widest = std::max(widest, layer.outputs);
      const int64_t planes = together * (layer.outputs + layer.inputs) + layer.inputs;
      of_thread = std::max(of_thread, planes * PlaneShape<A>(h, w, layer.taps).stride);
    }
    const int64_t sizes[] = {
        2 * n * most,       most, most, most, most, weights, groups * weights, n * widest * hw,
        threads * of_thread};
    int64_t total = 0;
    for (int64_t size : sizes) total += size;
    const Scratch scratch(total * sizeof(A));
    A* next = reinterpret_cast<A*>(scratch.data());
    int at = 0;
    const auto take = [&] { return std::exchange(next, next + sizes[at++]); };
    sums = reinterpret_cast<PlaneSums<A>*>(take());
    scale = take(), slope = take(), offset = take(), zeros = take();
    transposed = take(), partial = take(), inner = take();
    A* of_threads = take();
    std::fill_n(zeros, most, A{0});

    parallel(threads, n, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) begin_at(i);
    });
    for (int l = last; l >= 0 && needed(l); --l) {
      finish(l);
      if (!b.dweight[l] && !input_needed(l)) break;
      if (input_needed(l)) transpose(block.layer[l]);
      parallel(threads, groups, [&](int64_t begin, int64_t end) {
        A* memory = of_threads + own_index(threads, groups) * of_thread;
        if (block.layer[l].taps == 1) {
          through<1>(l, begin, end, memory);
        } else {
          through<9>(l, begin, end, memory);
        }
      });
      add_groups(l);
    }
  }
};

}  // namespace

template <class A>
void train_backward(const TrainedBackward<A>& backward) {
  Backward<A>{backward}.run();
}

template void train_backward<float>(const TrainedBackward<float>&);
template void train_backward<double>(const TrainedBackward<double>&);

}  // namespace mod_kernels
