// Maps in pieces of 16 bytes: how kernels load, store and walk them.
#pragma once

#include <initializer_list>

#include "device.h"
#include "map_plan.h"
#include "numeric.h"

namespace mod_kernels {

// Several values at once, whatever their type is.
using EightBytes = uint64_t __attribute__((may_alias));

// An index is data, which nothing on the host looks at: kernels leave out one that is no channel, and on a
// device the launch fails with this. (assert() would put the source's path into the library.)
__device__ __forceinline__ void device_assert_index([[maybe_unused]] bool inside) {
#if defined(__CUDA_ARCH__)
  if (!inside) __assert_fail("index is between 0 and C-1", "mod_kernels", 0, "");
#endif
}

// V neighbours.
template <class T, int V = kLanes<T>>
struct Piece {
  T values[V];
};

__device__ __forceinline__ bool begins_at_16_bytes(const void* address) {
  return reinterpret_cast<uintptr_t>(address) % 16 == 0;
}

// V values by one instruction: 16 bytes, 8, or one value, from a multiple of their size.
template <int V, class T>
__device__ __forceinline__ Piece<T, V> load_piece(const T* from) {
  Piece<T, V> piece;
  if constexpr (V * sizeof(T) == 16) {
    const uint4 bits = load_16_bytes(from);
    __builtin_memcpy(&piece, &bits, 16);
  } else if constexpr (V * sizeof(T) == 8) {
    const uint64_t bits = *reinterpret_cast<const EightBytes*>(from);
    __builtin_memcpy(&piece, &bits, 8);
  } else {
    static_assert(V == 1);
    piece.values[0] = *from;
  }
  return piece;
}

// Bits 32 * i and on of a piece. (A memcpy of values of 16 bits the compiler turns into narrow stores.)
template <class T, int V>
__device__ __forceinline__ uint32_t word_of(const Piece<T, V>& piece, int i) {
  if constexpr (sizeof(T) == 4) {
    return bits_of(piece.values[i]);
  } else {
    return piece.values[2 * i].bits | uint32_t{piece.values[2 * i + 1].bits} << 16;
  }
}

template <class T, int V>
__device__ __forceinline__ void store_piece(T* to, const Piece<T, V>& piece) {
  if constexpr (V * sizeof(T) == 16) {
    store_16_bytes(to, uint4{word_of(piece, 0), word_of(piece, 1), word_of(piece, 2), word_of(piece, 3)});
  } else if constexpr (V * sizeof(T) == 8) {
    *reinterpret_cast<EightBytes*>(to) = word_of(piece, 0) | uint64_t{word_of(piece, 1)} << 32;
  } else {
    static_assert(V == 1);
    *to = piece.values[0];
  }
}

// The values `begin` to `end - 1` of from[0] to from[V - 1], from anywhere; the others are not read.
template <int V, class T>
__device__ __forceinline__ Piece<T, V> load_some(const T* from, int begin, int end) {
  if (begin <= 0 && end >= V && begins_at_16_bytes(from)) return load_piece<V>(from);
  Piece<T, V> piece{};
#pragma unroll
  for (int i = 0; i < V; ++i) {
    if (i >= begin && i < end) piece.values[i] = from[i];
  }
  return piece;
}

template <class T>
__device__ __forceinline__ const T* sample_of(const InputMap& map, int64_t n) {
  return static_cast<const T*>(map.data) + n * map.stride_n;
}
template <class T>
__device__ __forceinline__ T* sample_of(const OutputMap& map, int64_t n) {
  return static_cast<T*>(map.data) + n * map.stride_n;
}

// One sample of a narrow map.
template <class T>
struct NarrowSample {
  const T* data;
  int64_t stride_c, stride_p;

  __device__ __forceinline__ T at(int j, int pixel) const { return data[j * stride_c + pixel * stride_p]; }
};
template <class T>
__device__ __forceinline__ NarrowSample<T> sample_of(const NarrowMap& map, int64_t n) {
  return {static_cast<const T*>(map.data) + n * map.stride_n, map.stride_c, map.stride_p};
}

// ---- NCHW: a sample is values in a row, planes of hw of them; a block takes a run of them

// Blocks that a multiprocessor must be able to hold. Without such a number the compiler spills a few
// registers to reach a step in occupancy that these kernels have no use for.
inline constexpr int kMapBlocks = 6;

template <class T>
inline constexpr int kRunValues = kMapThreads * kMapSteps * kLanes<T>;

// Channel and pixel of a value, the channel counted from its run's first.
struct Place {
  int row, pixel;

  __device__ __forceinline__ void to_next(int hw) {
    const bool last = ++pixel == hw;
    row += last;
    pixel = last ? 0 : pixel;
  }
};

struct Run {
  int64_t begin;  // in the sample
  int count;
  int channel, pixel;  // of the first value

  // What is left of the `end` values of a sample from `begin` on, but no more than `most`.
  __device__ Run(int64_t begin_, int64_t end, int most, int hw)
      : begin(begin_),
        count(static_cast<int>(end - begin < most ? end - begin : most)),
        channel(static_cast<int>(begin / hw)),
        pixel(static_cast<int>(begin - static_cast<int64_t>(channel) * hw)) {}

  __device__ __forceinline__ Place place(int value, int hw) const {
    const unsigned from_row = static_cast<unsigned>(pixel) + value;
    const int row = from_row / hw;
    return {row, static_cast<int>(from_row - row * hw)};
  }
  // Whether it is of whole pieces, each of which begins at a multiple of 16 bytes in every map.
  template <class T>
  __device__ __forceinline__ bool is_wide(std::initializer_list<const T*> samples) const {
    bool wide = count % kLanes<T> == 0;
    for (const T* sample : samples)
      wide = wide && begins_at_16_bytes(sample == nullptr ? sample : sample + begin);
    return wide;
  }
  // visit(row, begin, end) for the channels of its values [begin, end), with the values that are of each.
  template <class Visit>
  __device__ __forceinline__ void for_rows(int begin, int end, int hw, const Visit& visit) const {
    int row = place(begin, hw).row;
#pragma unroll 1
    for (int64_t row_end; begin < end; begin = static_cast<int>(row_end), ++row) {
      row_end = static_cast<int64_t>(row + 1) * hw - pixel;
      if (row_end > end) row_end = end;
      visit(row, begin, static_cast<int>(row_end));
    }
  }
  // Channels it has values of.
  __device__ __forceinline__ int rows(int hw) const { return place(count - 1, hw).row + 1; }
};

// ---- channels_last: a block takes a chunk of the channels, a thread one piece of them in every rows-th
// pixel

// Which chunk of the channels, and which part of a sample's pixels, a block takes.
struct ColumnBlock {
  int64_t n;
  int part, chunk;

  __device__ explicit ColumnBlock(const MapGrid& grid) {
    const unsigned row = blockIdx.x / grid.chunks;
    chunk = static_cast<int>(blockIdx.x % grid.chunks);
    part = static_cast<int>(row % grid.parts);
    n = row / grid.parts;
  }
};

struct Column {
  int chunk_begin;     // the chunk's first channel
  int channel, count;  // the thread's first channel, and how many; count <= 0 past the last
  int lane;            // which piece of the chunk
  int row, rows;       // its first pixel, and the distance to the next

  // Of the channels [begin, end), in pieces of `width`.
  __device__ Column(const MapGrid& grid, int chunk, int begin, int end, int width)
      : chunk_begin(begin + chunk * grid.lanes * width),
        lane(static_cast<int>(threadIdx.x) % grid.lanes),
        row(static_cast<int>(threadIdx.x) / grid.lanes),
        rows(static_cast<int>(blockDim.x) / grid.lanes) {
    channel = chunk_begin + lane * width;
    count = end - channel < width ? end - channel : width;
  }

  // Whether it is a whole piece that begins at a multiple of 16 bytes in every pixel and every map.
  template <class T>
  __device__ __forceinline__ bool is_wide(int channels, std::initializer_list<const T*> samples) const {
    bool wide = count == kLanes<T> && channels % kLanes<T> == 0;
    for (const T* sample : samples)
      wide = wide && begins_at_16_bytes(sample == nullptr ? sample : sample + channel);
    return wide;
  }
  // A bit for each of its values i that has marked(i).
  template <int V, class Marked>
  __device__ __forceinline__ unsigned marked(const Marked& marked) const {
    unsigned bits = 0;
#pragma unroll 1
    for (int i = 0; i < V && i < count; ++i) bits |= static_cast<unsigned>(marked(i)) << i;
    return bits;
  }
};

// visit(i) for every bit that is set.
template <class Visit>
__device__ __forceinline__ void for_marked(unsigned bits, const Visit& visit) {
#pragma unroll 1
  for (int i = 0; bits != 0; ++i, bits >>= 1) {
    if (bits & 1) visit(i);
  }
}

// Pixels [begin, end) of one of `parts` blocks, in multiples of `rows`.
struct Pixels {
  int begin, end;

  __device__ Pixels(int hw, int part, int parts, int rows) {
    const int64_t each = (static_cast<int64_t>(hw) + static_cast<int64_t>(parts) * rows - 1) /
                         (static_cast<int64_t>(parts) * rows) * rows;
    const int64_t first = part * each, last = first + each;
    begin = static_cast<int>(first < hw ? first : hw);
    end = static_cast<int>(last < hw ? last : hw);
  }
};

// ---- which gathered channels came from a channel

// For each of `rows` channels from `first` on, which j of a sample's index name it. In shared memory, two
// integers a row: how many there are, and their sum, which is the one where there is one. Sums of integers:
// no order shows.
struct Links {
  static constexpr int kNone = -1, kSeveral = -2;
  int *counts, *sums;

  __device__ Links(char* shared, int rows) : counts(reinterpret_cast<int*>(shared)), sums(counts + rows) {}

  // By all threads of the block. An index that is no channel is left out.
  __device__ void build(const int64_t* index, int k, int first, int rows, int channels) const {
    for (int i = threadIdx.x; i < 2 * rows; i += blockDim.x) counts[i] = 0;
    __syncthreads();
    for (int j = threadIdx.x; j < k; j += blockDim.x) {
      const int64_t channel = index[j];
      device_assert_index(channel >= 0 && channel < channels);
      if (channel < first || channel >= static_cast<int64_t>(first) + rows || channel >= channels) continue;
      atomicAdd(counts + (channel - first), 1);
      atomicAdd(sums + (channel - first), j);
    }
    __syncthreads();
  }
  __device__ __forceinline__ int of(int row) const {
    const int count = counts[row];
    return count == 0 ? kNone : count == 1 ? sums[row] : kSeveral;
  }
};

// add(j) for all that a link stands for, in ascending order.
template <class Add>
__device__ __forceinline__ void for_links(int link, const int64_t* index, int k, int64_t channel,
                                          const Add& add) {
  if (link >= 0) {
    add(link);
  } else if (link == Links::kSeveral) {
    for (int j = 0; j < k; ++j) {
      if (index[j] == channel) add(j);
    }
  }
}

}  // namespace mod_kernels
