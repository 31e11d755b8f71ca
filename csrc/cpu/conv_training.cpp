#include "conv_training.h"

#include <cmath>

#include "conv.h"
#include "conv_training_parts.h"
#include "runtime.h"

namespace mod_kernels {
namespace {

// Mean of one plane, and the sum of squares around it: never a difference of large sums.
template <class A>
struct PlaneMoments {
  A mean, squares;
};

template <class A>
PlaneMoments<A> moments(const A* plane, int64_t hw, A sum) {
  const A mean = sum / static_cast<A>(hw);
  LaneSums<A, 1> squares;
  each_vector<A>(hw, [&](int64_t i, auto lanes, auto which) {
    const Vec<A> d = lanes.keep(lanes.load(plane + i) - splat(mean));
    squares.lanes[0][which] += d * d;
  });
  return {mean, squares.total(0)};
}

template <class A>
struct Forward {
  const TrainedForward<A>& f;
  const TrainedBlock<A>& block = f.block;
  int64_t n = block.x.n, h = block.x.h, w = block.x.w, hw = block.x.hw();
  int64_t threads = threads_for(block.x.n * block.x.sample_size());

  // c[l] of samples begin to end - 1, with the moments of each of its planes.
  void convolve(int l, int64_t begin, int64_t end, A* memory, const A* zeros, PlaneMoments<A>* found) const {
    const TrainedLayer<A>& layer = block.layer[l];
    const PlaneShape<A> shape(h, w, layer.taps);
    const PlaneRow<A> in{memory, shape.stride}, out{in(layer.inputs), shape.stride};
    std::fill(memory, in(layer.inputs), A{0});
    for (int64_t i = begin; i < end; ++i) {
      A* c = block.c(l, i);
      const PlaneRow<A> source = layer_input(block, l, i, shape, in);
      if (layer.taps == 1) {
        conv<A, 1>({layer.inputs, layer.outputs, hw}, source, layer.weight, zeros,
                   [&](int64_t o, int64_t p, Vec<A> v) { store_within(c + o * hw, p, hw, v); });
      } else {
        conv<A, 9>({layer.inputs, layer.outputs, shape.length, shape.pitch}, source, layer.weight, zeros,
                   [&](int64_t o, int64_t p, Vec<A> v) { store(out(o) + p, v); });
      }
      for (int64_t o = 0; o < layer.outputs; ++o) {
        A* plane = c + o * hw;
        LaneSums<A, 1> sum;
        if (layer.taps == 1) {
          each_vector<A>(
              hw, [&](int64_t p, auto lanes, auto which) { sum.lanes[0][which] += lanes.load(plane + p); });
        } else {
          const A* from = out(o);
          shape.each([&](int64_t dense, int64_t at, auto lanes, auto which) {
            const Vec<A> v = lanes.load(from + at);
            lanes.store(plane + dense, v);
            sum.lanes[0][which] += v;
          });
        }
        if (block.batch_statistics) found[i * layer.outputs + o] = moments(plane, hw, sum.total(0));
      }
    }
  }

  // Of all planes of each channel, which count alike: samples in order, in double.
  void statistics(int l, const PlaneMoments<A>* found) const {
    const TrainedLayer<A>& layer = block.layer[l];
    A *means = block.statistics + layer.first_channel, *inverse = means + block.channels;
    A *running_mean = f.running_mean[l], *running_var = f.running_var[l];
    const double count = static_cast<double>(n * hw);
    for (int64_t o = 0; o < layer.outputs; ++o) {
      double mean = 0, squares = 0, var;
      if (block.batch_statistics) {
        for (int64_t i = 0; i < n; ++i) mean += found[i * layer.outputs + o].mean;
        mean /= static_cast<double>(n);
        for (int64_t i = 0; i < n; ++i) {
          const PlaneMoments<A>& one = found[i * layer.outputs + o];
          const double apart = one.mean - mean;
          squares += one.squares + static_cast<double>(hw) * apart * apart;
        }
        var = squares / count;
        if (running_mean) {
          const auto update = [&](A& running, double value) {
            running = static_cast<A>(f.momentum * value + (1 - f.momentum) * running);
          };
          update(running_mean[o], mean);
          update(running_var[o], squares / (count - 1));
        }
      } else {
        mean = running_mean[o];
        var = running_var[o];
      }
      means[o] = static_cast<A>(mean);
      inverse[o] = static_cast<A>(1 / std::sqrt(var + f.eps));
    }
  }

  void normalise(int64_t i) const {
    const int l = block.layers - 1;
    for (int64_t o = 0; o < block.layer[l].outputs; ++o) {
      const Normalised<A> y(block, l, o);
      const A* c = block.c(l, i) + o * hw;
      A* z = f.z.sample(i) + o * hw;
      each_vector<A>(hw, [&](int64_t p, auto lanes, auto) { lanes.store(z + p, y(lanes.load(c + p))); });
    }
  }

  void run() const {
    int64_t most = 0, of_thread = 0;
    for (int l = 0; l < block.layers; ++l) {
      const TrainedLayer<A>& layer = block.layer[l];
      most = std::max(most, layer.outputs);
      const int64_t planes = layer.inputs + (layer.taps == 9 ? layer.outputs : 0);
      of_thread = std::max(of_thread, planes * PlaneShape<A>(h, w, layer.taps).stride);
    }
    const Scratch scratch((most + 2 * n * most + threads * of_thread) * sizeof(A));
    A* zeros = reinterpret_cast<A*>(scratch.data());
    auto* found = reinterpret_cast<PlaneMoments<A>*>(zeros + most);
    A* of_threads = zeros + most + 2 * n * most;
    std::fill_n(zeros, most, A{0});
    for (int l = 0; l < block.layers; ++l) {
      parallel(threads, n, [&](int64_t begin, int64_t end) {
        convolve(l, begin, end, of_threads + own_index(threads, n) * of_thread, zeros, found);
      });
      statistics(l, found);
    }
    parallel(threads, n, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) normalise(i);
    });
  }
};

}  // namespace

template <class A>
void train_forward(const TrainedForward<A>& forward) {
  Forward<A>{forward}.run();
}

template void train_forward<float>(const TrainedForward<float>&);
template void train_forward<double>(const TrainedForward<double>&);

}  // namespace mod_kernels
