// Fibers: functions with a stack each, of which one runs at a time until it hands over by itself.
#pragma once

#include <cstddef>

namespace cuda_host {

// Stacks come from a pool and go back to it. AddressSanitizer is told of every switch.
class Fiber {
 public:
  Fiber() = default;
  ~Fiber() { drop(); }
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Makes ready to run `entry`, which must end by suspend(kForGood).
  void start(void (*entry)());
  bool started() const { return stack_ != nullptr; }
  // Runs the fiber until it suspends. Not from within a fiber.
  void resume();
  enum Until { kResumed, kForGood };
  // From the running fiber back to where a fiber was last resumed.
  static void suspend(Until until);
  // From the running fiber to another.
  static void hand_over(Fiber& next);
  // Gives the stack back, whatever is on it.
  void drop();

 private:
  static void begin();

  void (*entry_)() = nullptr;
  bool ended_ = false;
  char* stack_ = nullptr;
  void* context_ = nullptr;
  void* fake_stack_ = nullptr;  // AddressSanitizer's
};

}  // namespace cuda_host
