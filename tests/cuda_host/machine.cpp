#include "machine.h"

#include <algorithm>
#include <cstring>

namespace cuda_host {

Machine* machine = nullptr;

std::string where(const Place& place) {
  const std::string file = place.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(place.line());
}

bool same(const Place& a, const Place& b) {
  return a.line() == b.line() && a.column() == b.column() &&
         (a.file_name() == b.file_name() || std::strcmp(a.file_name(), b.file_name()) == 0);
}

std::string name(const Thread& thread) {
  const dim3& index = thread.block->index;
  return spell("block (", index.x, ", ", index.y, ", ", index.z, "), thread ", thread.index);
}

namespace {

const char* spell_wait(Waits waits) {
  switch (waits) {
    case Waits::kForWarp:
      return "for its warp";
    case Waits::kForBlock:
      return "at __syncthreads";
    case Waits::kForCluster:
      return "for the cluster";
    case Waits::kForCopy:
      return "for a bulk copy";
    default:
      return "for nothing";
  }
}

std::vector<int> inverse(const std::vector<int>& order) {
  std::vector<int> places(order.size());
  for (size_t i = 0; i < order.size(); ++i) places[order[i]] = static_cast<int>(i);
  return places;
}

void begin_thread() {
  machine->thread_body();
  machine->end_thread();
}

}  // namespace

Machine::Machine(const Launch& launch_, const std::function<void()>& thread)
    : launch(launch_), thread_body(thread), random_{launch_.seed} {
  check_launch();
  const int blocks = static_cast<int>(launch.grid.x * launch.grid.y * launch.grid.z);
  clusters_ = order_of(blocks / launch.cluster);
  warp_at_ = order_of((launch.threads + kLanes - 1) / kLanes);
  lane_at_ = order_of(kLanes);
  warp_place_ = inverse(warp_at_);
  lane_place_ = inverse(lane_at_);
  const int most = std::clamp(kMaxThreadsAtOnce / (launch.threads * launch.cluster), 1, kMaxClustersAtOnce);
  if (launch.order == Order::kReversed) at_once_ = most;
  if (launch.order == Order::kShuffled) {
    at_once_ = 1 + random_.below(most);
    constexpr int kStray[] = {0, 16, 256};
    stray_ = kStray[random_.below(3)];
  }
}

void Machine::check_launch() const {
  const auto require = [](bool holds, const std::string& what) {
    if (!holds) throw Error("launch: " + what);
  };
  const dim3& grid = launch.grid;
  require(grid.x > 0 && grid.y > 0 && grid.z > 0 && grid.y < 65536 && grid.z < 65536,
          spell("a grid of ", grid.x, " x ", grid.y, " x ", grid.z));
  require(launch.threads > 0 && launch.threads <= kMaxThreads, spell(launch.threads, " threads a block"));
  require(launch.cluster > 0 && launch.cluster <= kMaxCluster && grid.x % launch.cluster == 0,
          spell("clusters of ", launch.cluster, " blocks in a grid of ", grid.x));
  require(launch.shared_bytes <= kMaxSharedBytes, spell(launch.shared_bytes, " bytes of shared memory"));
}

std::vector<int> Machine::order_of(int count) {
  std::vector<int> order(count);
  for (int i = 0; i < count; ++i) order[i] = launch.order == Order::kReversed ? count - 1 - i : i;
  if (launch.order == Order::kShuffled) random_.shuffle(order);
  return order;
}

void Machine::start_cluster(int number) {
  auto cluster = std::make_unique<Cluster>();
  cluster->running = launch.cluster;
  std::vector<Block*> fresh;
  for (int rank = 0; rank < launch.cluster; ++rank) {
    auto block = std::make_unique<Block>();
    const unsigned flat = static_cast<unsigned>(number * launch.cluster + rank);
    block->index = {flat % launch.grid.x, flat / launch.grid.x % launch.grid.y,
                    flat / launch.grid.x / launch.grid.y};
    block->cluster = cluster.get();
    block->rank = rank;
    void* shared = nullptr;
    if (posix_memalign(&shared, 128, launch.shared_bytes) != 0) std::abort();
    std::memset(shared, kPoison, launch.shared_bytes);
    block->shared.reset(static_cast<char*>(shared));
    block->running = launch.threads;
    block->warps = std::vector<Warp>(warp_at_.size());
    block->threads = std::vector<Thread>(launch.threads);
    for (int i = 0; i < launch.threads; ++i) {
      Thread& thread = block->threads[i];
      thread.block = block.get();
      thread.index = i;
      ++block->warps[i / kLanes].lanes;
      go_on(thread);
    }
    fresh.push_back(block.get());
    cluster->blocks.push_back(std::move(block));
  }
  if (launch.order == Order::kReversed) std::reverse(fresh.begin(), fresh.end());
  if (launch.order == Order::kShuffled) random_.shuffle(fresh);
  // Before those that have done atomics.
  blocks_.insert(std::find_if(blocks_.begin(), blocks_.end(), [](Block* b) { return b->has_done_atomic; }),
                 fresh.begin(), fresh.end());
  resident_.push_back(std::move(cluster));
}

void Machine::go_on(Thread& thread) {
  thread.waits = Waits::kNot;
  const int warp = thread.index / kLanes;
  thread.block->warps[warp].ready |= 1u << lane_place_[thread.index % kLanes];
  thread.block->ready |= 1u << warp_place_[warp];
}

void Machine::suspend(Waits waits, const Place& place) {
  Thread& thread = *current;
  thread.waits = waits;
  thread.place = place;
  Warp& its = warp();
  its.ready &= ~(1u << lane_place_[thread.index % kLanes]);
  if (its.ready == 0) thread.block->ready &= ~(1u << warp_place_[thread.index / kLanes]);
  yield();
}

// To the next thread, which may be the same; where there is none, or something else to do, to run().
void Machine::yield() {
  Thread& thread = *current;
  if (thread.waits == Waits::kEnded) return thread.fiber.suspend(Fiber::kForGood);
  Thread* next = error.empty() ? next_thread() : nullptr;
  if (next == nullptr) return thread.fiber.suspend(Fiber::kResumed);
  if (next == &thread) return;
  enter(*next);
  Fiber::hand_over(next->fiber);
}

void Machine::enter(Thread& thread) {
  current = &thread;
  threadIdx.x = static_cast<unsigned>(thread.index);
  blockIdx = thread.block->index;
  if (!thread.fiber.started()) thread.fiber.start(begin_thread);
}

void Machine::delay_block() {
  Block* block = current->block;
  if (launch.order == Order::kForward) return;
  if (launch.order == Order::kShuffled && random_.happens(128)) return;
  blocks_.erase(std::find(blocks_.begin(), blocks_.end(), block));
  // The longer ago, the further back.
  const auto delayed =
      std::find_if(blocks_.begin(), blocks_.end(), [](Block* one) { return one->has_done_atomic; });
  const bool last = launch.order == Order::kShuffled && random_.happens(128);
  blocks_.insert(last ? blocks_.end() : delayed, block);
  block->has_done_atomic = true;
}

int Machine::pick(uint32_t ready) {
  if (stray_ > 0 && random_.happens(stray_)) {
    for (int skip = random_.below(std::popcount(ready)); skip > 0; --skip) ready &= ready - 1;
  }
  return std::countr_zero(ready);
}

Thread* Machine::next_thread() {
  if (launch.order == Order::kShuffled && random_.happens(1)) land_a_copy();
  auto chosen = std::find_if(blocks_.begin(), blocks_.end(), [](Block* block) { return block->ready != 0; });
  if (chosen == blocks_.end()) return nullptr;
  if (stray_ > 0 && random_.happens(stray_)) {
    const auto other = blocks_.begin() + random_.below(static_cast<int>(blocks_.size()));
    if ((*other)->ready != 0) chosen = other;
  }
  const int warp = warp_at_[pick((*chosen)->ready)];
  const int index = warp * kLanes + lane_at_[pick((*chosen)->warps[warp].ready)];
  return &(*chosen)->threads[index];
}

bool Machine::land_a_copy() {
  std::vector<std::pair<Block*, std::map<const void*, Copy>::iterator>> waiting;
  for (Block* block : blocks_) {
    for (auto it = block->copies.begin(); it != block->copies.end(); ++it) {
      if (it->second.under_way) waiting.emplace_back(block, it);
    }
  }
  if (waiting.empty()) return false;
  const int count = static_cast<int>(waiting.size());
  const int which = launch.order == Order::kForward    ? 0
                    : launch.order == Order::kReversed ? count - 1
                                                       : random_.below(count);
  auto& [block, at] = waiting[which];
  auto& [barrier, copy] = *at;
  std::memcpy(copy.to, copy.from, copy.bytes);
  copy.under_way = false;
  ++copy.done;
  for (Thread& thread : block->threads) {
    if (thread.waits == Waits::kForCopy && thread.barrier == barrier && copy.done % 2 != thread.parity) {
      go_on(thread);
    }
  }
  return true;
}

void Machine::end_thread() {
  Thread& thread = *current;
  Block& block = *thread.block;
  if (block.arrived > 0) fail(spell("ended while threads of its block wait at ", where(block.place)));
  if (warp().arrived > 0) fail(spell("ended while lanes of its warp wait at ", where(warp().place)));
  if (thread.arrived != thread.met) fail("ended between cluster_arrive and cluster_wait");
  if (block.looked_into >= thread.met) {
    fail("ended while another block may still use its shared memory: no cluster_sync after that");
  }
  --warp().lanes;
  if (--block.running == 0) end_block(block);
  suspend(Waits::kEnded, Place::current());
}

void Machine::end_block(Block& block) {
  for (const auto& [barrier, copy] : block.copies) {
    if (copy.under_way) fail("ended while a bulk copy into its shared memory is under way");
  }
  block.shared.reset();
  --block.cluster->running;
}

std::string Machine::deadlock() const {
  std::ostringstream out;
  out << "deadlock:";
  int said = 0;
  for (const Block* block : blocks_) {
    const Thread* before = nullptr;
    for (const Thread& thread : block->threads) {
      if (thread.waits == Waits::kEnded || said == 8) continue;
      if (before && before->waits == thread.waits && same(before->place, thread.place)) continue;
      before = &thread;
      ++said;
      out << " " << name(thread) << " waits " << spell_wait(thread.waits) << " at " << where(thread.place)
          << ";";
    }
  }
  return out.str();
}

void Machine::run() {
  blockDim = {static_cast<unsigned>(launch.threads), 1, 1};
  gridDim = launch.grid;
  for (;;) {
    while (resident_.size() < at_once_ && started_ < clusters_.size()) start_cluster(clusters_[started_++]);
    if (resident_.empty()) return;
    Thread* next = next_thread();
    if (next == nullptr) {
      if (land_a_copy()) continue;
      throw Error(deadlock());
    }
    enter(*next);
    next->fiber.resume();
    if (!error.empty()) throw Error(error);
    if (current->waits == Waits::kEnded) {
      current->fiber.drop();
      Cluster* cluster = current->block->cluster;
      if (cluster->running == 0) {
        std::erase_if(blocks_, [&](Block* block) { return block->cluster == cluster; });
        std::erase_if(resident_, [&](const auto& one) { return one.get() == cluster; });
      }
    }
  }
}

void run(const Launch& launch, const std::function<void()>& thread) {
  Machine here(launch, thread);
  machine = &here;
  here.run();
}

}  // namespace cuda_host
