// The machine itself: toy kernels that are right must come out right in every order, broken ones be caught.
//
// Without argument: the right ones. With the name of a broken one: runs it in one order after the other; what
// it says last is "caught: " and the Error, or "wrong: " and the order in which the result was; or
// AddressSanitizer ends it.
#include <cstdio>
#include <cstring>
#include <map>
#include <vector>

#include "toys.h"

namespace toys {
namespace {

constexpr int kSeeds = 20;

// Exactly as large as said, so that AddressSanitizer sees what is beyond; full of NaN.
template <class T>
struct Global {
  explicit Global(size_t size_) : data(new T[size_]), size(size_) {
    std::memset(data, 0xff, size * sizeof(T));
  }
  ~Global() { delete[] data; }
  Global(const Global&) = delete;
  T* data;
  size_t size;
};

struct Orders {
  std::vector<std::pair<Order, uint64_t>> all{{Order::kForward, 0}, {Order::kReversed, 0}};
  Orders() {
    for (uint64_t seed = 1; seed <= kSeeds; ++seed) all.emplace_back(Order::kShuffled, seed);
  }
};

std::string spell(Order order, uint64_t seed) {
  return order == Order::kForward    ? "forward"
         : order == Order::kReversed ? "reversed"
                                     : "seed " + std::to_string(seed);
}

// Where it went wrong, or nothing.
std::string run(const Toy& toy) {
  std::string wrong;
  for (const auto& [order, seed] : Orders().all) {
    Global<float> out(toy.size), in(toy.size);
    for (size_t i = 0; i < in.size; ++i) in.data[i] = input(i);
    Launch one = toy.one;
    one.order = order;
    one.seed = seed;
    cuda_host::launch(one, toy.kernel, out.data, in.data);
    for (size_t i = 0; i < toy.size; ++i) {
      if (std::bit_cast<int>(out.data[i]) == std::bit_cast<int>(toy.expected(i))) continue;
      wrong += (wrong.empty() ? "" : ", ") + spell(order, seed);
      break;
    }
  }
  return wrong;
}

const std::map<std::string, Toy> kRightOnes{
    {"rotate", kRotate<Rotate::kRight>}, {"warps", kWarps<Warps::kRight>}, {"ring", kRing<Ring::kRight>},
    {"bulk", kBulk<Bulk::kRight>},       {"last", kLast<Last::kRight>},    {"odd", kOdd<Odd::kRight>},
};

const std::map<std::string, Toy> kBrokenOnes{
    {"no barrier", kRotate<Rotate::kNoBarrier>},
    {"no barrier before reuse", kRotate<Rotate::kNoSecondBarrier>},
    {"shared read past the end", kRotate<Rotate::kReadPast>},
    {"shared write past the end", kRotate<Rotate::kWritePast>},
    {"global read past the end", kRotate<Rotate::kGlobalReadPast>},
    {"global write past the end", kRotate<Rotate::kGlobalWritePast>},
    {"shuffle by half a warp", kWarps<Warps::kLanesMissing>},
    {"shuffle after a lane has ended", kWarps<Warps::kOneEnds>},
    {"shuffle with half a mask", kWarps<Warps::kMask>},
    {"shuffles in two places", kWarps<Warps::kApart>},
    {"no cluster barrier before reading", kRing<Ring::kNoFirstSync>},
    {"no cluster barrier after writing", kRing<Ring::kNoMiddleSync>},
    {"ends while it is read remotely", kRing<Ring::kNoLastSync>},
    {"a pointer kept too long", kRing<Ring::kKept>},
    {"a block misses the cluster barrier", kRing<Ring::kOneBlockMissing>},
    {"arrives at the cluster barrier and ends", kRing<Ring::kHalfMissing>},
    {"no wait for a copy", kBulk<Bulk::kNoWait>},
    {"only a warp waits for a copy", kBulk<Bulk::kHalfWaits>},
    {"copy without initialisation", kBulk<Bulk::kNoInit>},
    {"no barrier after initialisation", kBulk<Bulk::kNoBarrierAfterInit>},
    {"copy from between 16 bytes", kBulk<Bulk::kMisaligned>},
    {"copy of no multiple of 16 bytes", kBulk<Bulk::kSize>},
    {"copy from past the end", kBulk<Bulk::kPastEnd>},
    {"copy to past the end", kBulk<Bulk::kPastShared>},
    {"wait for the wrong parity", kBulk<Bulk::kParity>},
    {"two copies for one wait", kBulk<Bulk::kTwice>},
    {"no barrier before a copy into what is read", kBulk<Bulk::kNoBarrierBeforeReuse>},
    {"ends before its copy has landed", kBulk<Bulk::kEndsEarly>},
    {"counts before the barrier", kLast<Last::kAddsFirst>},
    {"no barrier after the count", kLast<Last::kNoBroadcastBarrier>},
    {"divergent barrier", kOdd<Odd::kDivergent>},
    {"barrier after a thread has ended", kOdd<Odd::kSomeEnd>},
    {"thread ends without the barrier", kOdd<Odd::kSomeSkip>},
    {"two barriers wait for each other", kOdd<Odd::kDeadlock>},
    {"misaligned load", kOdd<Odd::kMisalignedLoad>},
    {"misaligned store", kOdd<Odd::kMisalignedStore>},
    {"misaligned by a promise", kOdd<Odd::kAssumed>},
};

}  // namespace
}  // namespace toys

int main(int count, char** arguments) {
  using namespace toys;
  if (count == 2 && std::strcmp(arguments[1], "list") == 0) {
    for (const auto& [name, toy] : kBrokenOnes) std::puts(name.c_str());
    return 0;
  }
  if (count == 2) {
    try {
      const std::string wrong = run(kBrokenOnes.at(arguments[1]));
      std::printf("%s%s\n", wrong.empty() ? "unseen" : "wrong: ", wrong.c_str());
    } catch (const cuda_host::Error& error) {
      std::printf("caught: %s\n", error.what());
    }
    return 0;
  }
  for (const auto& [name, toy] : kRightOnes) {
    try {
      const std::string wrong = run(toy);
      if (!wrong.empty()) return std::printf("%s is wrong: %s\n", name.c_str(), wrong.c_str()), 1;
    } catch (const cuda_host::Error& error) {
      return std::printf("%s: %s\n", name.c_str(), error.what()), 1;
    }
  }
  std::puts("all right");
}
