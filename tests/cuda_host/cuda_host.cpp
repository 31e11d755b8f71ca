#include "cuda_host.h"

#include <algorithm>
#include <cstring>

#include "machine.h"

#if defined(CUDA_HOST_ASAN)
#include <sanitizer/asan_interface.h>
#endif

namespace cuda_host {

void fail(const std::string& what) {
  machine->error = name(*machine->current) + ": " + what;
  machine->yield();
  std::abort();  // nothing resumes it
}

void block_barrier(Place place) {
  Block& block = *machine->current->block;
  if (block.running < machine->launch.threads) {
    fail("waits at __syncthreads, " + where(place) + ", for threads that have ended");
  }
  if (machine->warp().arrived > 0) {
    fail("at __syncthreads, " + where(place) + ", while lanes of its warp wait at " +
         where(machine->warp().place));
  }
  if (block.arrived > 0 && !same(block.place, place)) {
    fail("divergent __syncthreads: at " + where(place) + ", others at " + where(block.place));
  }
  block.place = place;
  ++machine->warp().at_block_barrier;
  if (++block.arrived < machine->launch.threads) return machine->suspend(Waits::kForBlock, place);
  block.arrived = 0;
  for (Warp& warp : block.warps) warp.at_block_barrier = 0;
  for (Thread& thread : block.threads) machine->go_on(thread);
  machine->yield();
}

void cluster_arrive(Place place) {
  Thread& thread = *machine->current;
  Cluster& cluster = *thread.block->cluster;
  if (thread.arrived != thread.met) fail("cluster_arrive twice before cluster_wait, " + where(place));
  ++thread.arrived;
  if (++cluster.arrived < machine->launch.threads * machine->launch.cluster) return machine->yield();
  cluster.arrived = 0;
  ++cluster.phase;
  for (const auto& block : cluster.blocks) {
    for (Thread& other : block->threads) {
      if (other.waits == Waits::kForCluster) machine->go_on(other);
    }
  }
  machine->yield();
}

void cluster_wait(Place place) {
  Thread& thread = *machine->current;
  if (thread.arrived == thread.met) fail("cluster_wait without cluster_arrive, " + where(place));
  if (thread.block->cluster->phase == thread.met) machine->suspend(Waits::kForCluster, place);
  ++thread.met;
}

void meet(uint32_t mask, uint64_t value, Place place) {
  Thread& thread = *machine->current;
  Warp& warp = machine->warp();
  if (mask != 0xffffffffu) fail("not all lanes are in the mask, " + where(place));
  if (warp.lanes < kLanes) fail("waits for lanes that have ended or never were, " + where(place));
  if (warp.at_block_barrier > 0) {
    fail("waits for its warp at " + where(place) + ", other lanes at __syncthreads, " +
         where(thread.block->place));
  }
  if (warp.arrived > 0 && !same(warp.place, place)) {
    fail("lanes of its warp apart: at " + where(place) + ", others at " + where(warp.place));
  }
  warp.place = place;
  warp.given[thread.index % kLanes] = value;
  if (++warp.arrived < kLanes) return machine->suspend(Waits::kForWarp, place);
  warp.arrived = 0;
  std::copy_n(warp.given, kLanes, warp.taken);
  warp.votes = 0;
  for (int i = 0; i < kLanes; ++i) warp.votes |= static_cast<uint32_t>(warp.given[i] & 1) << i;
  for (int i = 0; i < kLanes; ++i) machine->go_on(thread.block->threads[thread.index / kLanes * kLanes + i]);
  machine->yield();
}

uint64_t value_of(int lane) { return machine->warp().taken[lane]; }
unsigned votes() { return machine->warp().votes; }
int lane() { return machine->current->index % kLanes; }

void before_atomic() { machine->yield(); }
void after_atomic() {
  machine->delay_block();
  machine->yield();
}

char* shared() { return machine->current->block->shared.get(); }
int cluster_blocks() { return machine->launch.cluster; }
int cluster_block() { return machine->current->block->rank; }

void* shared_of(void* mine, int rank) {
  Thread& thread = *machine->current;
  const auto offset = static_cast<char*>(mine) - shared();
  if (offset < 0 || offset > static_cast<ptrdiff_t>(machine->launch.shared_bytes)) {
    fail("remote_shared of what is not in its shared memory");
  }
  if (rank < 0 || rank >= machine->launch.cluster) fail(spell("remote_shared of rank ", rank));
  Block& other = *thread.block->cluster->blocks[rank];
  if (&other == thread.block) return mine;
  if (other.running == 0) fail(spell("remote_shared of rank ", rank, ", which has ended"));
  other.looked_into = std::max(other.looked_into, thread.arrived);
  return other.shared.get() + offset;
}

void check_aligned(const void* address, size_t alignment, const char* what) {
  if (reinterpret_cast<uintptr_t>(address) % alignment != 0)
    fail(spell(what, " at an address not so aligned"));
}

void bulk_init(mod_kernels::BulkBarrier* barrier) {
  check_aligned(barrier, 8, "bulk_init");
  const ptrdiff_t offset = reinterpret_cast<char*>(barrier) - shared();
  if (offset < 0 ||
      offset + ptrdiff_t{sizeof(*barrier)} > static_cast<ptrdiff_t>(machine->launch.shared_bytes)) {
    fail("bulk_init outside its shared memory");
  }
  if (!machine->current->block->copies.emplace(barrier, Copy{}).second) fail("bulk_init twice of a barrier");
  machine->yield();
}

void bulk_load(void* to, const void* from, uint32_t bytes, mod_kernels::BulkBarrier* barrier) {
  Block& block = *machine->current->block;
  const auto found = block.copies.find(barrier);
  if (found == block.copies.end()) fail("bulk_load with a barrier that is not initialised");
  Copy& copy = found->second;
  if (copy.under_way) fail("bulk_load while the barrier's last copy is under way");
  check_aligned(to, 16, "bulk_load");
  check_aligned(from, 16, "bulk_load");
  if (bytes == 0 || bytes % 16 != 0) fail(spell("bulk_load of ", bytes, " bytes"));
  const ptrdiff_t offset = static_cast<char*>(to) - shared();
  if (offset < 0 || offset + ptrdiff_t{bytes} > static_cast<ptrdiff_t>(machine->launch.shared_bytes))
    fail("bulk_load to beyond its shared memory");
#if defined(CUDA_HOST_ASAN)
  if (__asan_region_is_poisoned(const_cast<void*>(from), bytes)) fail("bulk_load from beyond an allocation");
#endif
  copy = {copy.done, true, to, from, bytes};
  std::memset(to, kPoison, bytes);
  machine->yield();
}

void bulk_wait(mod_kernels::BulkBarrier* barrier, uint32_t parity, Place place) {
  Thread& thread = *machine->current;
  const auto found = thread.block->copies.find(barrier);
  if (found == thread.block->copies.end())
    fail("bulk_wait for a barrier that is not initialised, " + where(place));
  const Copy& copy = found->second;
  if (parity > 1) fail("bulk_wait for a parity that is none, " + where(place));
  if (copy.done == 0 && parity == 1) fail("bulk_wait for the copy before the first, " + where(place));
  if (copy.done % 2 != parity) return machine->yield();
  thread.barrier = barrier;
  thread.parity = parity;
  machine->suspend(Waits::kForCopy, place);
}

}  // namespace cuda_host
