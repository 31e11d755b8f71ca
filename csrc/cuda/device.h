// All that a kernel asks of the machine: the part of CUDA that kernels may use, and what follows. Two
// implementations of one list, this one for nvcc and one for tests, which runs the same kernels on a host.
#pragma once

#include <cstdint>

#if defined(MOD_KERNELS_CUDA_HOST)

#include "cuda_host.h"

#else

namespace mod_kernels {

// Clusters of blocks and the engine that copies in bulk came together, with sm_90. Code for older devices
// must not instantiate them.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
inline constexpr bool kBulkCopies = false;
#else
inline constexpr bool kBulkCopies = true;
#endif

// Start of the block's shared memory, as many bytes as the launch asked for.
__device__ __forceinline__ char* shared_memory() {
  extern __shared__ __align__(128) char mod_kernels_shared_memory[];
  return mod_kernels_shared_memory;
}

__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

__device__ __forceinline__ int cluster_size() {
  uint32_t size = 1;
  if constexpr (kBulkCopies) asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(size));
  return static_cast<int>(size);
}

__device__ __forceinline__ int cluster_rank() {
  uint32_t rank = 0;
  if constexpr (kBulkCopies) asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}

// A barrier in two halves: what threads of the cluster wrote before they arrived, to shared or global memory,
// is seen by all of them after they waited. Of a kernel without clusters the block is the cluster.
__device__ __forceinline__ void cluster_arrive() {
  if constexpr (kBulkCopies) {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  } else {
    __syncthreads();
  }
}

__device__ __forceinline__ void cluster_wait() {
  if constexpr (kBulkCopies) asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

__device__ __forceinline__ void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

// The variable of the block `rank` that is at `mine` in this one. A block may not end while others may still
// touch its memory.
template <class T>
__device__ __forceinline__ T* remote_shared(T* mine, int rank) {
  if constexpr (kBulkCopies) {
    uint64_t theirs;
    asm("mapa.u64 %0, %1, %2;" : "=l"(theirs) : "l"(reinterpret_cast<uint64_t>(mine)), "r"(rank));
    return reinterpret_cast<T*>(theirs);
  } else {
    return mine;
  }
}

// Tells when a bulk copy has arrived, one copy at a time. In shared memory.
struct alignas(8) BulkBarrier {
  uint64_t word;
};

// By one thread; a __syncthreads() must follow before the others wait.
__device__ __forceinline__ void bulk_init(BulkBarrier* barrier) {
  if constexpr (kBulkCopies) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }
}

// By one thread. Both addresses and bytes are multiples of 16, and nothing wrote to the place before but
// another bulk copy, whose readers have all passed a __syncthreads().
__device__ __forceinline__ void bulk_load(void* shared, const void* global, uint32_t bytes,
                                          BulkBarrier* barrier) {
  if constexpr (kBulkCopies) {
    const uint32_t place = shared_address(barrier);
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(place), "r"(bytes)
                 : "memory");
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
            shared_address(shared)),
        "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(place)
        : "memory");
  }
}

// By every thread that reads what was copied. parity: 0 for a barrier's first copy, 1 for its second, 0
// again.
__device__ __forceinline__ void bulk_wait(BulkBarrier* barrier, uint32_t parity) {
  if constexpr (kBulkCopies) {
    const uint32_t place = shared_address(barrier);
    uint32_t arrived = 0;
    while (arrived == 0) {
      asm volatile(
          "{\n"
          ".reg .pred p;\n"
          "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
          "selp.u32 %0, 1, 0, p;\n"
          "}"
          : "=r"(arrived)
          : "r"(place), "r"(parity)
          : "memory");
    }
  }
}

// The value before. By one thread, after a __syncthreads() behind which all of its block's stores are; the
// answer goes to the others through shared memory and another. What every block stored before its addition is
// then seen by the blocks whose additions come later.
__device__ __forceinline__ int add_acquire_release(int* counter, int value) {
  int before;
  asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(__cvta_generic_to_global(counter)), "r"(value)
               : "memory");
  return before;
}

// Several values at once, whatever their type is.
using SixteenBytes = unsigned __int128 __attribute__((may_alias));

// Loads and stores are of one number: for a struct's members the compiler makes some of their own, which it
// does not always join. Not through the path for memory that nobody writes (__ldg): in place, x is written
// later in the same launch.
__device__ __forceinline__ uint4 load_16_bytes(const void* from) {
  const unsigned __int128 bits = *static_cast<const SixteenBytes*>(from);
  const uint64_t low = static_cast<uint64_t>(bits), high = static_cast<uint64_t>(bits >> 64);
  return {static_cast<uint32_t>(low), static_cast<uint32_t>(low >> 32), static_cast<uint32_t>(high),
          static_cast<uint32_t>(high >> 32)};
}
__device__ __forceinline__ void store_16_bytes(void* to, uint4 value) {
  const uint64_t low = value.x | uint64_t{value.y} << 32, high = value.z | uint64_t{value.w} << 32;
  *static_cast<SixteenBytes*>(to) = low | static_cast<unsigned __int128>(high) << 64;
}

}  // namespace mod_kernels

#endif
