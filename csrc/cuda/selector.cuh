// The selector's two layers: hidden = relu(fc1 . pooled + b1), logits = fc2 . hidden + b2, in float32.
#pragma once

#include "numeric.h"
#include "parameters.h"
#include "pooling.cuh"

namespace mod_kernels {

// Value i of a bias, zero without one.
template <class T>
__device__ __forceinline__ float bias_at(const Parameter& bias, int i) {
  if (bias.data == nullptr) return 0.0f;
  return bias.is_float ? static_cast<const float*>(bias.data)[i] : widen(static_cast<const T*>(bias.data)[i]);
}

// A thread's part of sum_j row[j] * vector[j]: pieces part, part + lanes ... of 16 bytes or one value.
template <class W, bool kWide>
__device__ __forceinline__ float part_of_product(const W* row, const float* vector, int length, int part,
                                                 int lanes) {
  float sum = 0.0f;
  if constexpr (kWide) {
#pragma unroll 4
    for (int i = part; i < length / kLanes<W>; i += lanes) {
      const uint4 bits = load_16_bytes(row + i * kLanes<W>);
#pragma unroll
      for (int e = 0; e < kLanes<W>; e += 4) {
        const float4 factors = *reinterpret_cast<const float4*>(vector + i * kLanes<W> + e);
        sum += lane<W>(bits, e) * factors.x + lane<W>(bits, e + 1) * factors.y;
        sum += lane<W>(bits, e + 2) * factors.z + lane<W>(bits, e + 3) * factors.w;
      }
    }
  } else {
#pragma unroll 1
    for (int i = part; i < length; i += lanes) sum += widen(row[i]) * vector[i];
  }
  return sum;
}

// A row of weights, as an offset, what it is multiplied with, and what is added: loaded first, it keeps
// nobody waiting.
struct RowProduct {
  int64_t offset;
  const float* vector;
  int length;
  float addend;
};

// store(i, product) for rows i below count: `lanes` lanes a row, by all threads of the block.
template <class W, bool kWide, class Row, class Store>
__device__ __forceinline__ void multiply_rows(const W* weight, int count, int lanes, const Row& row_of,
                                              const Store& store) {
  const int first = quotient(static_cast<int>(threadIdx.x), lanes);
  const int part = static_cast<int>(threadIdx.x) - first * lanes;
  const int rows = quotient(kBlockThreads, lanes);
#pragma unroll 1
  for (int base = 0; base < count; base += rows) {
    const int i = base + first;
    float sum = 0.0f;
    if (i < count) {
      const RowProduct row = row_of(i);
      sum = part == 0 ? row.addend : 0.0f;
      sum += part_of_product<W, kWide>(weight + row.offset, row.vector, row.length, part, lanes);
    }
    sum = sum_of_lanes(sum, lanes);
    if (i < count && part == 0) store(i, sum);
  }
}

template <class T, class Row, class Store>
__device__ __forceinline__ void multiply(const Parameter& weight, int count, int lanes, const Row& row_of,
                                         const Store& store) {
  if (!std::is_same_v<T, float> && weight.is_float) {
    const float* data = static_cast<const float*>(weight.data);
    if (weight.wide) {
      multiply_rows<float, true>(data, count, lanes, row_of, store);
    } else {
      multiply_rows<float, false>(data, count, lanes, row_of, store);
    }
  } else {
    const T* data = static_cast<const T*>(weight.data);
    if (weight.wide) {
      multiply_rows<T, true>(data, count, lanes, row_of, store);
    } else {
      multiply_rows<T, false>(data, count, lanes, row_of, store);
    }
  }
}

// slots[group, unit] = sum over the group's channels of fc1[unit, channel] * pooled[channel], of the block's
// groups. So a block reads its own columns of the weights and no other: a sample reads each weight once.
template <class T>
__device__ __forceinline__ void first_layer_sums(const BlockParameters& p, int first_group, int groups,
                                                 const float* pooled, float* slots) {
  multiply<T>(
      p.fc1_weight, groups * p.r, p.fc1_lanes,
      [&](int i) {
        const int group = quotient(i, p.r), unit = i - group * p.r,
                  channel = (first_group + group) * p.group_channels;
        return RowProduct{static_cast<int64_t>(unit) * p.c + channel, pooled + group * p.group_channels,
                          min_of(p.group_channels, p.c - channel), 0.0f};
      },
      [&](int i, float sum) { slots[i] = sum; });
}

// hidden[unit] = relu(the slots of all groups + b1). slot(group) is its first unit's place. hidden_lanes
// lanes a unit, each with every so many groups: slots are far, in another block's memory or in the second
// cache.
template <class T, class Slot>
__device__ __forceinline__ void hidden_layer(const BlockParameters& p, const Slot& slot, float* hidden) {
  const int lanes = p.hidden_lanes, first = quotient(static_cast<int>(threadIdx.x), lanes);
  const int part = static_cast<int>(threadIdx.x) - first * lanes, units = quotient(kBlockThreads, lanes);
#pragma unroll 1
  for (int base = 0; base < p.r; base += units) {
    const int unit = base + first;
    float sum = 0.0f;
    if (unit < p.r) {
      sum = part == 0 ? bias_at<T>(p.fc1_bias, unit) : 0.0f;
#pragma unroll 8
      for (int group = part; group < p.groups; group += lanes) sum += slot(group)[unit];
    }
    sum = sum_of_lanes(sum, lanes);
    if (unit < p.r && part == 0) hidden[unit] = relu(sum);
  }
}

// store(channel, logit) for channels first to end - 1.
template <class T, class Store>
__device__ __forceinline__ void second_layer(const BlockParameters& p, int first, int end,
                                             const float* hidden, const Store& store) {
  multiply<T>(
      p.fc2_weight, end - first, p.fc2_lanes,
      [&](int i) {
        return RowProduct{static_cast<int64_t>(first + i) * p.r, hidden, p.r,
                          bias_at<T>(p.fc2_bias, first + i)};
      },
      [&](int i, float sum) { store(first + i, sum); });
}

}  // namespace mod_kernels
