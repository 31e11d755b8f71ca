// What runs the threads of a launch: who waits for what, and who goes on.
#pragma once

#include <cstdlib>
#include <map>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "cuda_host.h"
#include "fiber.h"

namespace cuda_host {

constexpr int kLanes = 32, kMaxThreads = 1024, kMaxCluster = 16;
constexpr size_t kMaxSharedBytes = 227 * 1024;
constexpr int kMaxClustersAtOnce = 6, kMaxThreadsAtOnce = 4096;
constexpr int kPoison = 0xff;  // every float format's NaN, and no index

enum class Waits { kNot, kForWarp, kForBlock, kForCluster, kForCopy, kEnded };

struct Block;

struct Thread {
  Fiber fiber;
  Block* block = nullptr;
  int index = 0;
  Waits waits = Waits::kNot;
  Place place;               // where it waits
  int arrived = 0, met = 0;  // times, at the cluster's barrier
  const void* barrier = nullptr;
  uint32_t parity = 0;
};

struct Warp {
  uint32_t ready = 0;  // bit i: the i-th lane in the launch's order can go on
  int lanes = 0;       // that have not ended
  int arrived = 0;     // lanes at the meeting they are called to
  int at_block_barrier = 0;
  Place place;
  uint64_t given[kLanes], taken[kLanes];
  uint32_t votes = 0;  // bit i: lane i has given an odd number
};

// A barrier for bulk copies: of its phases, from one copy's landing to the next's, `done` are over.
struct Copy {
  uint32_t done = 0;
  bool under_way = false;
  void* to = nullptr;
  const void* from = nullptr;
  uint32_t bytes = 0;
};

struct Cluster {
  std::vector<std::unique_ptr<Block>> blocks;
  int arrived = 0, phase = 0;  // threads at its barrier; how often it has opened
  int running = 0;             // blocks
};

struct Free {
  void operator()(char* memory) const { std::free(memory); }
};

struct Block {
  Cluster* cluster = nullptr;
  int rank = 0;
  dim3 index;
  std::unique_ptr<char, Free> shared;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  uint32_t ready = 0;  // bit i: the i-th warp in the launch's order has a lane that can go on
  int running = 0;     // threads
  int arrived = 0;     // threads at the block's barrier
  Place place;
  int looked_into = -1;  // the last phase of the cluster in which another block asked for its shared memory
  bool has_done_atomic = false;
  std::map<const void*, Copy> copies;
};

std::string where(const Place& place);
std::string name(const Thread& thread);
bool same(const Place& a, const Place& b);

template <class... Words>
std::string spell(const Words&... words) {
  std::ostringstream out;
  (out << ... << words);
  return out.str();
}

struct Random {
  uint64_t state;
  uint64_t next() {  // splitmix64
    uint64_t z = state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
  }
  // In how many of 256 cases.
  bool happens(int often) { return static_cast<int>(next() & 255) < often; }
  int below(int limit) { return static_cast<int>(next() % static_cast<uint64_t>(limit)); }
  template <class T>
  void shuffle(std::vector<T>& values) {
    for (int i = static_cast<int>(values.size()); i > 1; --i) std::swap(values[i - 1], values[below(i)]);
  }
};

class Machine {
 public:
  Machine(const Launch& launch, const std::function<void()>& thread);
  void run();

  const Launch& launch;
  const std::function<void()>& thread_body;
  Thread* current = nullptr;
  std::string error;

  Warp& warp() { return current->block->warps[current->index / kLanes]; }
  void go_on(Thread& thread);
  void suspend(Waits waits, const Place& place);
  void yield();
  void delay_block();
  void end_thread();

 private:
  void check_launch() const;
  std::vector<int> order_of(int count);
  void start_cluster(int number);
  int pick(uint32_t ready);
  Thread* next_thread();
  void enter(Thread& thread);
  bool land_a_copy();
  void end_block(Block& block);
  std::string deadlock() const;

  Random random_;
  int stray_ = 0;  // of 256 choices, those that are not as the order says
  std::vector<int> clusters_, warp_at_, warp_place_, lane_at_, lane_place_;
  size_t started_ = 0, at_once_ = 1;
  std::vector<std::unique_ptr<Cluster>> resident_;
  std::vector<Block*> blocks_;  // of the resident clusters, in the order in which they go on
};

// The one there is.
extern Machine* machine;

}  // namespace cuda_host
