#include "../../csrc/cpu/gelu.h"
#include "cases.h"
#include "support.h"

namespace mod_kernels {
namespace {

template <class A>
A gelu_of(A x) {
  return gelu<A>(splat(x))[0];
}

// Phi, against the C library's erfc in double, which is right to the last place or two.
template <class A>
void normal_distribution(double allowed, int64_t steps) {
  begin_case(spell("Phi, ", kName<A>));
  for (int64_t i = -steps; i <= steps; ++i) {
    const A x = static_cast<A>(10.0 * (static_cast<double>(i) + 0.37) / static_cast<double>(steps));
    const double phi = static_cast<double>(gelu_of(x)) / static_cast<double>(x);
    const double expected = std::erfc(-static_cast<double>(x) / std::sqrt(2.0)) / 2;
    if (!(std::abs(phi - expected) <= allowed)) {
      fail(spell("Phi(", x, ") is ", phi, " and must be ", expected));
    }
  }
}

template <class A>
void ends() {
  begin_case(spell("gelu far out, ", kName<A>));
  const A infinity = std::numeric_limits<A>::infinity(), nan = std::numeric_limits<A>::quiet_NaN();
  const A largest = std::numeric_limits<A>::max();
  check_same("gelu of large values", std::vector<A>{gelu_of<A>(1000), gelu_of(largest), gelu_of(infinity)},
             std::vector<A>{1000, largest, infinity});
  check_same("gelu of 0 and -1000", std::vector<A>{gelu_of<A>(0), std::abs(gelu_of<A>(-1000))},
             std::vector<A>{0, 0});
  if (!std::isnan(gelu_of(nan)) || !std::isnan(gelu_of(-infinity))) fail("a NaN was lost");
}

}  // namespace

void gelu_cases(bool few) {
  const int64_t steps = few ? 3000 : 100000;
  // What gelu.h says, and the rounding of x * Phi(x), from which Phi is taken back out.
  normal_distribution<float>(1e-7 + 0x1p-24, steps);
  normal_distribution<double>(5e-16 + 0x1p-52, steps);
  ends<float>();
  ends<double>();
}

}  // namespace mod_kernels
