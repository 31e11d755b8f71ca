// Means over the planes of a share of channels, x read once; out of place x is copied on the way.
//
// What is added in which order depends on the sample's shape, never on how many blocks share it.
#pragma once

#include "numeric.h"
#include "parameters.h"

namespace mod_kernels {

inline constexpr int kAhead = 4;  // loads of 16 bytes a thread has under way

// As many words as are loaded at once.
template <int kWords>
struct alignas(4 * kWords) Words {
  uint32_t word[kWords];
};

// A share of one sample: channels first to end of x, (c, hw) or (hw, c); y null where nothing is copied.
template <class T>
struct MapShare {
  const T* x;
  T* y;
  int first, end, c, hw;
};

// The sum over `lanes` neighbouring lanes, in each of them.
__device__ __forceinline__ float sum_of_lanes(float value, int lanes) {
#pragma unroll 1
  for (int apart = lanes >> 1; apart > 0; apart >>= 1) value += __shfl_xor_sync(0xffffffffu, value, apart);
  return value;
}

template <class T>
__device__ __forceinline__ void add_values(const uint4& bits, float (&sums)[kLanes<T>]) {
#pragma unroll
  for (int e = 0; e < kLanes<T>; ++e) sums[e] += lane<T>(bits, e);
}

// A thread's part of a plane in shared memory: chunks part, part + lanes ... of kWords words each.
template <class T, int kWords>
__device__ __forceinline__ float sum_of_chunks(const T* plane, int hw, int part, int lanes) {
  constexpr int kPerWord = 4 / sizeof(T);
  float sums[kWords * kPerWord] = {};
  const auto* chunks = reinterpret_cast<const Words<kWords>*>(plane);
  const int count = hw / (kWords * kPerWord);
#pragma unroll 4
  for (int i = part; i < count; i += lanes) {
    const Words<kWords> chunk = chunks[i];
#pragma unroll
    for (int e = 0; e < kWords * kPerWord; ++e) {
      sums[e] += lane<T>(uint4{chunk.word[e / kPerWord], 0, 0, 0}, e % kPerWord);
    }
  }
  float sum = sums[0];
#pragma unroll
  for (int e = 1; e < kWords * kPerWord; ++e) sum += sums[e];
  return sum;
}

// means[row] of dense planes in shared memory. A plane is read by the widest words that it is a whole number
// of: that number is odd unless they are 16 bytes, so lanes with a plane each hit different banks, and of
// 16-byte words a group of lanes reads neighbours (plan.h, row_lanes).
template <class T>
__device__ void average_planes(const T* planes, int rows, int hw, int lanes, float* means) {
  const int threads = kBlockThreads, thread = static_cast<int>(threadIdx.x);
  const int rows_at_once = quotient(threads, lanes), first = quotient(thread, lanes);
  const int part = thread - first * lanes, bytes = hw * static_cast<int>(sizeof(T));
#pragma unroll 1
  for (int base = 0; base < rows; base += rows_at_once) {
    const int row = base + first;
    float sum = 0.0f;
    if (row < rows) {
      const T* plane = planes + static_cast<int64_t>(row) * hw;
      if (bytes % 16 == 0) {
        sum = sum_of_chunks<T, 4>(plane, hw, part, lanes);
      } else if (bytes % 8 == 0) {
        sum = sum_of_chunks<T, 2>(plane, hw, part, lanes);
      } else if (bytes % 4 == 0) {
        sum = sum_of_chunks<T, 1>(plane, hw, part, lanes);
      } else {
#pragma unroll 1
        for (int i = part; i < hw; i += lanes) sum += widen(plane[i]);
      }
    }
    sum = sum_of_lanes(sum, lanes);
    if (row < rows && part == 0) means[row] = sum / static_cast<float>(hw);
  }
}

// The same for short planes of an odd number of 16-bit values (7x7): a thread takes two of them, together an
// odd number of words, so that its loads hit another bank than its neighbours'. The word in the middle is
// half of each.
template <class T>
__device__ void average_odd_planes(const T* planes, int rows, int hw, float* means) {
#pragma unroll 1
  for (int row = 2 * static_cast<int>(threadIdx.x); row < rows; row += 2 * kBlockThreads) {
    const auto* words = reinterpret_cast<const uint32_t*>(planes + static_cast<int64_t>(row) * hw);
    float even[2] = {}, odd[2] = {};
    const int middle = hw / 2;
#pragma unroll 4
    for (int i = 0; i < middle; ++i) {
      const uint4 bits{words[i], words[middle + 1 + i], 0, 0};
#pragma unroll
      for (int plane = 0; plane < 2; ++plane) {
        even[plane] += lane<T>(bits, 2 * plane);
        odd[plane] += lane<T>(bits, 2 * plane + 1);
      }
    }
    const uint4 bits{words[middle], 0, 0, 0};
    means[row] = (even[0] + odd[0] + lane<T>(bits, 0)) / static_cast<float>(hw);
    means[row + 1] = (even[1] + odd[1] + lane<T>(bits, 1)) / static_cast<float>(hw);
  }
}

// Pooling::kStaged. The share is a run of bytes, a multiple of 16 from a multiple of 16 on; stage_rows planes
// of it at a time come to shared memory, `stages` of them ahead where the copy engine does it (kBulk).
template <class T, bool kBulk>
__device__ void pool_staged(const BlockParameters& p, const MapShare<T>& map, char* memory,
                            BulkBarrier* barriers, float* means) {
  const int thread = static_cast<int>(threadIdx.x), rows = map.end - map.first, hw = map.hw;
  const int count = quotient(rows + p.stage_rows - 1, p.stage_rows), stages = kBulk ? p.stages : 1;
  const int64_t stage_values = static_cast<int64_t>(p.stage_rows) * hw;
  const T* from = map.x + static_cast<int64_t>(map.first) * hw;
  T* to = map.y + static_cast<int64_t>(map.first) * hw;
  const auto bytes_of = [&](int i) {
    return static_cast<uint32_t>(min_of(p.stage_rows, rows - i * p.stage_rows)) * static_cast<uint32_t>(hw) *
           static_cast<uint32_t>(sizeof(T));
  };
  const auto begin = [&](int i) {
    T* stage = reinterpret_cast<T*>(memory) + i % stages * stage_values;
    bulk_load(stage, from + i * stage_values, bytes_of(i), barriers + i % stages);
  };
  if constexpr (kBulk) {
    if (thread == 0) {
#pragma unroll 1
      for (int i = 0; i < min_of(stages, count); ++i) {
        bulk_init(barriers + i);
        begin(i);
      }
    }
    __syncthreads();
  }
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    T* stage = reinterpret_cast<T*>(memory) + i % stages * stage_values;
    char* bytes = reinterpret_cast<char*>(stage);
    const char* source = reinterpret_cast<const char*>(from + i * stage_values);
    char* copy = map.y == nullptr ? nullptr : reinterpret_cast<char*>(to + i * stage_values);
    const int size = static_cast<int>(bytes_of(i)), step = 16 * kBlockThreads;
    if constexpr (kBulk) {
      bulk_wait(barriers + i % stages, static_cast<uint32_t>(i / stages % 2));
    } else {
#pragma unroll 4
      for (int b = 16 * thread; b < size; b += step) store_16_bytes(bytes + b, load_16_bytes(source + b));
      __syncthreads();
    }
    if (copy != nullptr) {
#pragma unroll 1
      for (int b = 16 * thread; b < size; b += step) store_16_bytes(copy + b, load_16_bytes(bytes + b));
    }
    const int first = i * p.stage_rows, here = min_of(p.stage_rows, rows - first);
    if (sizeof(T) == 2 && hw % 2 == 1 && p.row_lanes == 1) {
      average_odd_planes(stage, here, hw, means + first);
    } else {
      average_planes(stage, here, hw, p.row_lanes, means + first);
    }
    __syncthreads();
    if constexpr (kBulk) {
      if (thread == 0 && i + stages < count) begin(i + stages);
    }
  }
}

// A thread's 16-byte loads: those at from + i * apart for i = first, first + step ... below count, with sums
// of the values in each lane of the load. kAhead of them are under way before the first is stored or added.
template <class T>
__device__ __forceinline__ void read_wide(const T* from, T* copy, int first, int count, int step,
                                          int64_t apart, float (&sums)[kLanes<T>]) {
  int i = first;
#pragma unroll 1
  for (; i + (kAhead - 1) * step < count; i += kAhead * step) {
    uint4 bits[kAhead];
#pragma unroll
    for (int a = 0; a < kAhead; ++a) bits[a] = load_16_bytes(from + (i + a * step) * apart);
    if (copy != nullptr) {
#pragma unroll
      for (int a = 0; a < kAhead; ++a) store_16_bytes(copy + (i + a * step) * apart, bits[a]);
    }
#pragma unroll
    for (int a = 0; a < kAhead; ++a) add_values<T>(bits[a], sums);
  }
#pragma unroll 1
  for (; i < count; i += step) {
    const uint4 bits = load_16_bytes(from + i * apart);
    if (copy != nullptr) store_16_bytes(copy + i * apart, bits);
    add_values<T>(bits, sums);
  }
}

template <class T>
__device__ __forceinline__ void read_scalar(const T* from, T* copy, int first, int count, int step,
                                            int64_t apart, float (&sums)[1]) {
#pragma unroll 1
  for (int i = first; i < count; i += step) {
    const T value = from[i * apart];
    if (copy != nullptr) copy[i * apart] = value;
    sums[0] += widen(value);
  }
}

// NCHW from x to registers, a plane a warp.
template <class T, bool kWide>
__device__ void pool_planes(const MapShare<T>& map, float* means) {
  constexpr int kValues = kWide ? kLanes<T> : 1;
  const int lane_of_warp = static_cast<int>(threadIdx.x) % kWarp, warps = kBlockThreads / kWarp;
#pragma unroll 1
  for (int c = map.first + static_cast<int>(threadIdx.x) / kWarp; c < map.end; c += warps) {
    const int64_t plane = static_cast<int64_t>(c) * map.hw;
    T* copy = map.y == nullptr ? nullptr : map.y + plane;
    float sums[kValues] = {};
    if constexpr (kWide) {
      read_wide<T>(map.x + plane, copy, lane_of_warp, map.hw / kValues, kWarp, kValues, sums);
    } else {
      read_scalar<T>(map.x + plane, copy, lane_of_warp, map.hw, kWarp, 1, sums);
    }
    float sum = sums[0];
#pragma unroll
    for (int e = 1; e < kValues; ++e) sum += sums[e];
    sum = warp_sum(sum);
    if (lane_of_warp == 0) means[c - map.first] = sum / static_cast<float>(map.hw);
  }
}

// channels_last from x to registers: `columns` loads side by side, and with the rest of its threads as many
// pixels at a time; sums (pixels at a time, columns * values of a load) are in shared memory.
template <class T, bool kWide>
__device__ void pool_pixels(const MapShare<T>& map, int columns, float* sums_of_rows, float* means) {
  constexpr int kValues = kWide ? kLanes<T> : 1;
  const int thread = static_cast<int>(threadIdx.x), threads = kBlockThreads;
  const int row = quotient(thread, columns), rows = quotient(threads, columns), width = columns * kValues;
#pragma unroll 1
  for (int begin = map.first; begin < map.end; begin += width) {
    const int column = (thread - row * columns) * kValues, channel = begin + column;
    float sums[kValues] = {};
    if (channel < map.end) {
      T* copy = map.y == nullptr ? nullptr : map.y + channel;
      if constexpr (kWide) {
        read_wide<T>(map.x + channel, copy, row, map.hw, rows, map.c, sums);
      } else {
        read_scalar<T>(map.x + channel, copy, row, map.hw, rows, map.c, sums);
      }
    }
#pragma unroll
    for (int e = 0; e < kValues; ++e) sums_of_rows[row * width + column + e] = sums[e];
    __syncthreads();
#pragma unroll 1
    for (int i = thread; i < min_of(width, map.end - begin); i += threads) {
      float sum = 0.0f;
#pragma unroll 4
      for (int r = 0; r < rows; ++r) sum += sums_of_rows[r * width + i];
      means[begin - map.first + i] = sum / static_cast<float>(map.hw);
    }
    __syncthreads();
  }
}

// means[c - first] of the share, by all threads of the block; a barrier must follow. `memory` holds what
// shared memory the chosen way needs (plan.h, SharedLayout::reused).
template <class T, bool kBulk>
__device__ void pool_share(const BlockParameters& p, const MapShare<T>& map, char* memory,
                           BulkBarrier* barriers, float* means) {
  if (p.channels_last) {
    float* sums = reinterpret_cast<float*>(memory);
    if (p.pooling == Pooling::kWide) {
      pool_pixels<T, true>(map, p.columns, sums, means);
    } else {
      pool_pixels<T, false>(map, p.columns, sums, means);
    }
  } else if (p.pooling == Pooling::kStaged) {
    pool_staged<T, kBulk>(p, map, memory, barriers, means);
  } else if (p.pooling == Pooling::kWide) {
    pool_planes<T, true>(map, means);
  } else {
    pool_planes<T, false>(map, means);
  }
}

}  // namespace mod_kernels
