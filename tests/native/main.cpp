// The CPU engine's kernels without torch, against plain loops in double, in memory that nothing can overrun.
// Built and run by tests/backends/test_native_program.py, with sanitizers; `few` as argument for an emulator.
#include <signal.h>

#include <chrono>
#include <cstdio>
#include <string_view>

#include "cases.h"
#include "support.h"

extern "C" void __sanitizer_set_death_callback(void (*)()) __attribute__((weak));

namespace mod_kernels {
namespace {

std::string current;
int64_t begun = 0;

void name_case() { std::fprintf(stderr, "in case: %s\n", current.c_str()); }

// A sanitizer handles all but an abort itself, and tells where.
void name_case_on_crash() {
  if (__sanitizer_set_death_callback) __sanitizer_set_death_callback(name_case);
  for (int number : {SIGABRT, SIGSEGV, SIGBUS, SIGILL, SIGFPE}) {
    if (__sanitizer_set_death_callback && number != SIGABRT) continue;
    signal(number, [](int caught) {
      name_case();
      signal(caught, SIG_DFL);
      raise(caught);
    });
  }
}

// Infinite or NaN: then both are.
bool agree_beyond_numbers(const char* what, double got, double expected, std::size_t i) {
  if (std::isfinite(got) && std::isfinite(expected)) return false;
  if (got == expected || (std::isnan(got) && std::isnan(expected))) return true;
  fail(spell(what, ": element ", i, " is ", got, " and must be ", expected));
}

}  // namespace

void begin_case(std::string name) {
  current = std::move(name);
  ++begun;
}

void fail(const std::string& what) {
  std::fprintf(stderr, "FAILED: %s\n", what.c_str());
  name_case();
  std::_Exit(1);
}

void check_largest(const char* what, const Values& got, const Values& expected, double tolerance,
                   double scale) {
  double largest = scale, difference = 0;
  for (std::size_t i = 0; i < expected.size(); ++i) {
    if (agree_beyond_numbers(what, got[i], expected[i], i)) continue;
    largest = std::max(largest, std::abs(expected[i]));
    difference = std::max(difference, std::abs(got[i] - expected[i]));
  }
  if (difference > tolerance * largest) fail(spell(what, ": off by ", difference, " of ", largest));
}

void check_values(const char* what, const Values& got, const Values& expected, double tolerance) {
  double squares = 0, difference_squares = 0;
  for (std::size_t i = 0; i < expected.size(); ++i) {
    if (agree_beyond_numbers(what, got[i], expected[i], i)) continue;
    squares += expected[i] * expected[i];
    difference_squares += (got[i] - expected[i]) * (got[i] - expected[i]);
  }
  if (difference_squares > tolerance * tolerance * squares) {
    fail(spell(what, ": off by ", std::sqrt(difference_squares / squares), " in norm"));
  }
  const double typical = std::sqrt(squares / std::max<std::size_t>(1, expected.size()));
  for (std::size_t i = 0; i < expected.size(); ++i) {
    if (std::isfinite(expected[i]) &&
        std::abs(got[i] - expected[i]) > tolerance * (std::abs(expected[i]) + typical)) {
      fail(spell(what, ": element ", i, " of ", expected.size(), " is ", got[i], " and must be ",
                 expected[i]));
    }
  }
}

}  // namespace mod_kernels

int main(int count, char** arguments) {
  using namespace mod_kernels;
  const bool few = count == 2 && arguments[1] == std::string_view("few");
  if (count > 1 && !few) {
    std::fprintf(stderr, "usage: %s [few]\n", arguments[0]);
    return 2;
  }
  name_case_on_crash();
  const struct {
    const char* name;
    void (*run)(bool few);
  } groups[] = {{"conversions", conversion_cases},
                {"pool", pool_cases},
                {"linear", linear_cases},
                {"top_k", top_k_cases},
                {"fuse", fuse_cases},
                {"gelu", gelu_cases},
                {"block", block_cases},
                {"backward", backward_cases},
                {"training", training_cases}};
  for (const auto& [name, run] : groups) {
    const auto start = std::chrono::steady_clock::now();
    const int64_t before = begun;
    run(few);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    std::printf("%s: %lld cases in %.1f s\n", name, static_cast<long long>(begun - before), seconds.count());
  }
  std::printf("%lld cases passed\n", static_cast<long long>(begun));
}
