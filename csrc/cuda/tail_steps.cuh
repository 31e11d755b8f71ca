// The tail of a block: its conv block on the selected channels of a sample, scaled and added, as a list of
// steps.
//
// In place a selected channel may be one that is written: only the first step reads selected channels, and
// only the last writes to the map. Between two steps the caller puts a barrier over the team.
#pragma once

#include "convolutions.cuh"
#include "numeric.h"
#include "parameters.h"

namespace mod_kernels {

// One sample: what its steps read and write.
template <class T>
struct TailSample {
  const T* x;
  T* y;
  float *planes_a, *planes_b;
  const int* chosen;    // in shared memory
  const float* scores;  // in shared memory
};

template <class T>
__device__ TailSample<T> tail_sample(const BlockParameters& p, int64_t n, const int* chosen,
                                     const float* scores) {
  const int64_t hw = static_cast<int64_t>(p.h) * p.w;
  return {static_cast<const T*>(p.x) + n * p.stride_xn,
          static_cast<T*>(p.y) + n * p.stride_yn,
          p.planes_a + n * p.planes_a_count * hw,
          p.planes_b + n * p.planes_b_count * hw,
          chosen,
          scores};
}

// One step. In a launch of its own, of a long tail, a thread does kTile outputs of kTile pixels at a time,
// and one of one in the whole block's kernel, where tiles would leave threads without work, and be half of
// the code.
template <int kTileSide, class T>
__device__ void tail_step(const BlockParameters& p, const TailSample<T>& sample, const TailStep& step,
                          Team team) {
  const int hw = p.h * p.w;
  const int map_c = p.channels_last ? 1 : hw, map_p = p.channels_last ? p.c : 1;
  float* planes = step.to == Operand::kPlanesA   ? sample.planes_a
                  : step.to == Operand::kPlanesB ? sample.planes_b
                                                 : nullptr;
  const Sink<T> out{planes,
                    sample.x,
                    sample.y,
                    map_c,
                    map_p,
                    hw,
                    sample.scores,
                    p.position == Position::kOriginal ? sample.chosen : nullptr,
                    p.position == Position::kLast ? p.c - p.k : 0};
  const bool selected = step.from == Operand::kSelected;
  const Source<T> in{selected ? sample.x : nullptr,
                     step.from == Operand::kPlanesA ? sample.planes_a : sample.planes_b,
                     selected ? map_c : hw, selected ? map_p : 1, sample.chosen};
  // In channels_last the k channels of a pixel that are written lie side by side.
  const bool outputs_first = p.channels_last && planes == nullptr && p.position != Position::kOriginal;
  switch (step.kind) {
    case StepKind::kPointwise:
      convolve_dense<1, kTileSide>(step, p.conv, in, out, 1, hw, outputs_first, team);
      break;
    case StepKind::kDense:
      convolve_dense<3, kTileSide>(step, p.conv, in, out, p.h, p.w, outputs_first, team);
      break;
    case StepKind::kDepthwise:
      if (step.side == 7) {
        convolve_depthwise<7>(step, p.conv, in, out, p.h, p.w, team);
      } else {
        convolve_depthwise<3>(step, p.conv, in, out, p.h, p.w, team);
      }
      break;
    case StepKind::kNormalise:
      normalise_pixels(planes, step.inputs, hw, team);
      break;
    case StepKind::kPass:
      pass_planes(step, in, out, hw, team);
      break;
  }
}

}  // namespace mod_kernels
