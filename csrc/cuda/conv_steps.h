// The conv block of each kind (CONV_KINDS of mod_kernels/spec.py) as the steps of a tail.
#pragma once

#include <cstdint>

#include "block_call.h"
#include "parameters.h"

namespace mod_kernels {

struct ConvSteps {
  TailStep steps[kMaxSteps];
  int count = 0;
  int64_t planes_a = 0, planes_b = 0;  // float planes of the workspace, a sample
  int64_t packed_size = 0;             // values of weights and biases, one convolution after the other

  // side * side kernels from `inputs` planes to `outputs`, weights OIHW.
  void convolve(StepKind kind, Then then, Operand from, Operand to, int64_t inputs, int64_t outputs,
                int side) {
    TailStep& step = steps[count++];
    step.kind = kind;
    step.then = then;
    step.from = from;
    step.to = to;
    step.inputs = static_cast<int32_t>(inputs);
    step.outputs = static_cast<int32_t>(outputs);
    step.side = side;
    step.weight = packed_size;
    packed_size += outputs * (kind == StepKind::kDepthwise ? 1 : inputs) * side * side;
    step.bias = packed_size;
    packed_size += outputs;
  }
  // Of planes A.
  void other(StepKind kind, Operand to, int64_t planes) {
    TailStep& step = steps[count++];
    step.kind = kind;
    step.from = Operand::kPlanesA;
    step.to = to;
    step.inputs = step.outputs = static_cast<int32_t>(planes);
  }
};

// k channels, m inside.
inline ConvSteps conv_steps(const ConvForm& form, int64_t k) {
  using enum StepKind;
  using enum Operand;
  const int64_t m = form.mid_channels;
  const Then last = form.final_relu ? Then::kRelu : Then::kNothing;
  ConvSteps steps;
  switch (form.kind) {
    case BlockKind::kBottleneck:
      steps.convolve(kPointwise, Then::kRelu, kSelected, kPlanesA, k, m, 1);
      steps.convolve(kDense, Then::kRelu, kPlanesA, kPlanesB, m, m, 3);
      steps.convolve(kPointwise, last, kPlanesB, kResult, m, k, 1);
      steps.planes_a = steps.planes_b = m;
      break;
    case BlockKind::kBasic:
      steps.convolve(kDense, Then::kRelu, kSelected, kPlanesA, k, k, 3);
      steps.convolve(kDense, last, kPlanesA, kResult, k, k, 3);
      steps.planes_a = k;
      break;
    case BlockKind::kInvertedResidual:
      steps.convolve(kPointwise, Then::kRelu6, kSelected, kPlanesA, k, m, 1);
      steps.convolve(kDepthwise, Then::kRelu6, kPlanesA, kPlanesB, m, m, 3);
      steps.convolve(kPointwise, last, kPlanesB, kResult, m, k, 1);
      steps.planes_a = steps.planes_b = m;
      break;
    case BlockKind::kConv:
      // To planes first: in place, a channel that is written may be another output's input.
      steps.convolve(kDense, last, kSelected, kPlanesA, k, k, 3);
      steps.other(kPass, kResult, k);
      steps.planes_a = k;
      break;
    case BlockKind::kConvNeXt:
      steps.convolve(kDepthwise, Then::kNothing, kSelected, kPlanesA, k, k, 7);
      steps.other(kNormalise, kPlanesA, k);
      steps.convolve(kPointwise, Then::kGelu, kPlanesA, kPlanesB, k, m, 1);
      steps.convolve(kPointwise, last, kPlanesB, kResult, m, k, 1);
      steps.planes_a = k;
      steps.planes_b = m;
      break;
  }
  return steps;
}

// Multiplications of a step for one pixel.
inline int64_t products_of(const TailStep& step) {
  const bool sums = step.kind == StepKind::kPointwise || step.kind == StepKind::kDense;
  return static_cast<int64_t>(step.outputs) * (sums ? step.inputs : 1) * step.side * step.side;
}

}  // namespace mod_kernels
