// The machine of csrc/cuda/device.h on a CPU, for tests: every CUDA thread is a fiber, and one runs at a
// time.
//
// Fibers change at barriers, shuffles, atomics and fences, and only there; which goes on is the order's
// choice (Order). Memory is sequentially consistent: a fence left out goes unseen, a barrier left out does
// not. Accesses are checked by AddressSanitizer; shared memory is a heap allocation per block, exactly as
// large as the launch says, full of NaN, and gone when the block ends. What the machine itself finds wrong is
// thrown by launch as an Error.
#pragma once

#include <bit>
#include <cstdint>
#include <functional>
#include <memory>
#include <source_location>
#include <stdexcept>
#include <string>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
// The compiler's own promises without looking.
#define __builtin_assume_aligned(address, alignment) cuda_host::aligned(address, alignment)

struct dim3 {
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
  unsigned x, y, z;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};

// Of the thread that runs.
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace mod_kernels {
struct alignas(8) BulkBarrier {
  uint64_t word;
};
}  // namespace mod_kernels

namespace cuda_host {

// Which of the threads that can go on does, and which blocks are there at once:
//  kForward: the first cluster alone, to its end, then the next; of a cluster the first block, of that the
//  first warp,
//    of that the first lane;
//  kReversed: several clusters at once, last ones first. A block that has done an atomic operation waits
//  until all
//    that has done none can't go on: the last to arrive at a counter finds the others' work as unfinished as
//    it can be;
//  kShuffled: several clusters at once, in an order by seed, from which some seeds stray at every step.
// Bulk copies land when nothing else can go on; in shuffled order also at any moment before.
enum class Order { kForward, kReversed, kShuffled };

struct Launch {
  dim3 grid;
  int threads = 1;
  int cluster = 1;
  size_t shared_bytes = 0;
  Order order = Order::kForward;
  uint64_t seed = 0;
};

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

void run(const Launch& launch, const std::function<void()>& thread);

// Runs the kernel to its end, or throws an Error that names block and thread.
template <class... P>
void launch(const Launch& launch, void (*kernel)(P...), std::type_identity_t<P>... parameters) {
  run(launch, [&] { kernel(parameters...); });
}

// ---- what device code below is made of; places are where the kernel says it
using Place = std::source_location;

[[noreturn]] void fail(const std::string& what);
void block_barrier(Place place);
void cluster_arrive(Place place);
void cluster_wait(Place place);
// Waits for the other lanes of the warp at the same place, each with a value. Afterwards value_of gives them.
void meet(uint32_t mask, uint64_t value, Place place);
uint64_t value_of(int lane);
unsigned votes();  // bit i: the value of lane i is odd
int lane();
// Lets other threads go first, before and after an atomic operation.
void before_atomic();
void after_atomic();
char* shared();
int cluster_blocks();
int cluster_block();
void* shared_of(void* mine, int rank);
void bulk_init(mod_kernels::BulkBarrier* barrier);
void bulk_load(void* to, const void* from, uint32_t bytes, mod_kernels::BulkBarrier* barrier);
void bulk_wait(mod_kernels::BulkBarrier* barrier, uint32_t parity, Place place);
void check_aligned(const void* address, size_t alignment, const char* what);

template <class T>
T* aligned(T* address, size_t alignment) {
  check_aligned(address, alignment, "an access");
  return address;
}

// What `source` has, one value a lane; its own where source is none of the 32.
template <class T>
T exchange(uint32_t mask, T value, int source, Place place) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  meet(mask, std::bit_cast<Bits>(value), place);
  return source < 0 || source >= 32 ? value : std::bit_cast<T>(static_cast<Bits>(value_of(source)));
}

inline unsigned ballot(uint32_t mask, bool predicate, Place place) {
  meet(mask, predicate, place);
  return votes();
}

}  // namespace cuda_host

// ---- CUDA's own names
inline void __syncthreads(cuda_host::Place place = cuda_host::Place::current()) {
  cuda_host::block_barrier(place);
}

inline void __syncwarp(unsigned mask = 0xffffffffu, cuda_host::Place place = cuda_host::Place::current()) {
  cuda_host::meet(mask, 0, place);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, cuda_host::Place place = cuda_host::Place::current()) {
  return cuda_host::exchange(mask, value, source & 31, place);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, cuda_host::Place place = cuda_host::Place::current()) {
  return cuda_host::exchange(mask, value, cuda_host::lane() ^ bits, place);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by,
                   cuda_host::Place place = cuda_host::Place::current()) {
  return cuda_host::exchange(mask, value, cuda_host::lane() + static_cast<int>(by), place);
}

inline unsigned __ballot_sync(unsigned mask, int predicate,
                              cuda_host::Place place = cuda_host::Place::current()) {
  return cuda_host::ballot(mask, predicate != 0, place);
}

inline int __any_sync(unsigned mask, int predicate, cuda_host::Place place = cuda_host::Place::current()) {
  return cuda_host::ballot(mask, predicate != 0, place) != 0;
}

template <class T>
T __ldg(const T* address) {
  return *address;
}

inline int atomicAdd(int* address, int value) {
  cuda_host::before_atomic();
  const int before = *address;
  *address = before + value;
  cuda_host::after_atomic();
  return before;
}

inline void __threadfence() { cuda_host::before_atomic(); }

// ---- csrc/cuda/device.h's
namespace mod_kernels {

inline constexpr bool kBulkCopies = true;

inline char* shared_memory() { return cuda_host::shared(); }
inline int cluster_size() { return cuda_host::cluster_blocks(); }
inline int cluster_rank() { return cuda_host::cluster_block(); }

inline void cluster_arrive(cuda_host::Place place = cuda_host::Place::current()) {
  cuda_host::cluster_arrive(place);
}
inline void cluster_wait(cuda_host::Place place = cuda_host::Place::current()) {
  cuda_host::cluster_wait(place);
}
inline void cluster_sync(cuda_host::Place place = cuda_host::Place::current()) {
  cuda_host::cluster_arrive(place);
  cuda_host::cluster_wait(place);
}

template <class T>
T* remote_shared(T* mine, int rank) {
  return static_cast<T*>(cuda_host::shared_of(const_cast<std::remove_const_t<T>*>(mine), rank));
}

inline void bulk_init(BulkBarrier* barrier) { cuda_host::bulk_init(barrier); }
inline void bulk_load(void* shared, const void* global, uint32_t bytes, BulkBarrier* barrier) {
  cuda_host::bulk_load(shared, global, bytes, barrier);
}
inline void bulk_wait(BulkBarrier* barrier, uint32_t parity,
                      cuda_host::Place place = cuda_host::Place::current()) {
  cuda_host::bulk_wait(barrier, parity, place);
}

inline int add_acquire_release(int* counter, int value) { return atomicAdd(counter, value); }

inline uint4 load_16_bytes(const void* address) {
  cuda_host::check_aligned(address, 16, "a 16-byte load");
  return *static_cast<const uint4*>(address);
}

inline void store_16_bytes(void* address, uint4 value) {
  cuda_host::check_aligned(address, 16, "a 16-byte store");
  *static_cast<uint4*>(address) = value;
}

}  // namespace mod_kernels
