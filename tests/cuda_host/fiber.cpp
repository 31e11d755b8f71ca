#include "fiber.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#if defined(CUDA_HOST_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// void switch_context(void** from, void* to): keeps what a call must keep on the stack, and the stack's
// pointer in *from. ucontext does the same by a system call, at seven times the cost.
extern "C" void switch_context(void** from, void* to);

#if defined(__x86_64__) && !defined(CUDA_HOST_UCONTEXT)
asm(R"(
.text
.globl switch_context
.type switch_context, @function
switch_context:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size switch_context, .-switch_context
)");
#elif defined(__aarch64__) && !defined(CUDA_HOST_UCONTEXT)
asm(R"(
.text
.globl switch_context
.type switch_context, %function
switch_context:
  sub sp, sp, #160
  stp x19, x20, [sp]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x2, sp
  str x2, [x0]
  mov sp, x1
  ldp x19, x20, [sp]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size switch_context, .-switch_context
)");
#else
extern "C" void switch_context(void** from, void* to) {
  ucontext_t here;
  *from = &here;
  swapcontext(&here, static_cast<ucontext_t*>(to));
}
#endif

namespace cuda_host {
namespace {

constexpr std::size_t kPage = 4096, kStackBytes = 16 * kPage;  // above one page that is never touched

std::vector<char*> stacks;  // those that are free
Fiber* running = nullptr;
void* resumer = nullptr;  // the context that resumed one, and its stack
const void* resumer_stack = nullptr;
std::size_t resumer_stack_bytes = 0;

char* take_stack() {
  if (stacks.empty()) {
    constexpr int kAtOnce = 256;
    constexpr std::size_t kBytes = kPage + kStackBytes;
    void* mapped = mmap(nullptr, kAtOnce * kBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED) {
      std::perror("stacks");
      std::abort();
    }
    for (int i = kAtOnce; i-- > 0;) {
      char* guard = static_cast<char*>(mapped) + i * kBytes;
      mprotect(guard, kPage, PROT_NONE);
      stacks.push_back(guard + kPage);
    }
  }
  char* stack = stacks.back();
  stacks.pop_back();
  return stack;
}

// Where a stack begins that grows down. Not at the same place in every stack's page: they would share a few
// sets of the cache.
char* top_of(char* stack) {
  const std::size_t number = reinterpret_cast<uintptr_t>(stack) / kPage;
  return stack + kStackBytes - number * 13 % 64 * 64;
}

// A context that, switched to, calls `entry` on `stack`.
void* fresh_context(char* stack, void (*entry)()) {
  char* top = top_of(stack);
#if defined(CUDA_HOST_UCONTEXT) || !(defined(__x86_64__) || defined(__aarch64__))
  auto* context = reinterpret_cast<ucontext_t*>(top - (sizeof(ucontext_t) + 63) / 64 * 64);
  getcontext(context);
  context->uc_stack.ss_sp = stack;
  context->uc_stack.ss_size = reinterpret_cast<char*>(context) - stack;
  makecontext(context, entry, 0);
  return context;
#elif defined(__x86_64__)
  void** frame = reinterpret_cast<void**>(top) - 8;  // six registers, where to, and a caller that is none
  for (int i = 0; i < 8; ++i) frame[i] = nullptr;
  frame[6] = reinterpret_cast<void*>(entry);
  return frame;
#else
  void** frame = reinterpret_cast<void**>(top) - 20;
  for (int i = 0; i < 20; ++i) frame[i] = nullptr;
  frame[11] = reinterpret_cast<void*>(entry);
  return frame;
#endif
}

void leave_for([[maybe_unused]] void** fake_stack, [[maybe_unused]] const void* stack,
               [[maybe_unused]] std::size_t bytes) {
#if defined(CUDA_HOST_ASAN)
  __sanitizer_start_switch_fiber(fake_stack, stack, bytes);
#endif
}

void arrived([[maybe_unused]] void* fake_stack, [[maybe_unused]] const void** from_stack = nullptr,
             [[maybe_unused]] std::size_t* from_bytes = nullptr) {
#if defined(CUDA_HOST_ASAN)
  __sanitizer_finish_switch_fiber(fake_stack, from_stack, from_bytes);
#endif
}

}  // namespace

void Fiber::begin() {
  const void* from = nullptr;
  std::size_t bytes = 0;
  arrived(nullptr, &from, &bytes);
  if (resumer_stack == nullptr) {  // the first fiber of all was not handed over to
    resumer_stack = from;
    resumer_stack_bytes = bytes;
  }
  running->entry_();
}

void Fiber::start(void (*entry)()) {
  stack_ = take_stack();
  entry_ = entry;
  context_ = fresh_context(stack_, begin);
}

void Fiber::resume() {
  void* fake_stack = nullptr;
  running = this;
  leave_for(&fake_stack, stack_, kStackBytes);
  switch_context(&resumer, context_);
  arrived(fake_stack);
  running = nullptr;
}

void Fiber::suspend(Until until) {
  Fiber* self = running;
  self->ended_ = until == kForGood;
  leave_for(until == kForGood ? nullptr : &self->fake_stack_, resumer_stack, resumer_stack_bytes);
  switch_context(&self->context_, resumer);
  arrived(self->fake_stack_);
}

void Fiber::hand_over(Fiber& next) {
  Fiber* self = running;
  running = &next;
  leave_for(&self->fake_stack_, next.stack_, kStackBytes);
  switch_context(&self->context_, next.context_);
  arrived(self->fake_stack_);
}

void Fiber::drop() {
  if (stack_ == nullptr) return;
#if defined(CUDA_HOST_ASAN)
  // What has returned has tidied up behind itself; the outermost functions have not.
  const std::size_t bytes = top_of(stack_) - stack_, used = ended_ ? 1024 : bytes;
  __asan_unpoison_memory_region(stack_ + bytes - used, used);
#endif
  stacks.push_back(stack_);
  stack_ = nullptr;
}

}  // namespace cuda_host
