// The exact GELU, x * Phi(x) with Phi the normal distribution, on vectors.
#pragma once

#include <iterator>

#include "vec.h"

namespace mod_kernels {

// Phi(x) = 1/2 + x * q(x^2). q is entire, and for |x| <= kEnd a polynomial here; beyond, Phi is 0 or 1 to
// more digits than A has. Derived for this file: q from erf in 40 digits at 56 (float64: 77) Chebyshev nodes
// in u = 2 (x / kEnd)^2 - 1, its Chebyshev series cut off after degree 15 (36) and written out in powers of
// u, lowest first. Where |u| <= 1 Horner's rule loses nothing: the absolute values add up to q(0) = 0.399.
// The largest error of Phi, roundings and all, is 1e-7 in float32 and 5e-16 in float64:
// tests/native/cases_gelu.cpp.
template <class A>
struct NormalDistribution;

template <>
struct NormalDistribution<float> {
  static constexpr float kEnd = 5.3f;
  static constexpr float kPowers[] = {0.13339256f,   -0.066518426f,   0.04926456f,    -0.0395921f,
                                      0.032072354f,  -0.025261218f,   0.018973626f,   -0.013375751f,
                                      0.008677929f,  -0.0053509623f,  0.0033753735f,  -0.0017924589f,
                                      0.0005425999f, -0.00027101336f, 0.00034194163f, -0.00013940422f};
};

template <>
struct NormalDistribution<double> {
  static constexpr double kEnd = 8.3;
  static constexpr double kPowers[] = {
      0.08519358772121839,   -0.04259678724997113,    0.031947533511623286,   -0.026622617791265592,
      0.02329338348129499,   -0.020959198419002737,   0.019198686475128485,   -0.01779312324939295,
      0.016607365188807618,  -0.015543720305079113,   0.014523679724325793,   -0.01348332107598048,
      0.01237579887433358,   -0.011176506147255103,   0.009888029417641412,   -0.008539219044988198,
      0.007172726318702685,  -0.005839901992999756,   0.004614570687104652,   -0.003554045825725041,
      0.002625209114056818,  -0.0018151952102684013,  0.001261578669079733,   -0.0009574271259503575,
      0.0006089167714253691, -0.00022143835294815707, 0.00014633549430236872, -0.00025555261483245896,
      0.0001352791025828259, 5.9054550352135407e-05,  -2.545282578555379e-05, -6.277743254204165e-05,
      2.926543736883767e-05, 1.4977656760629834e-05,  -6.55732601715931e-06,  -3.85864191673218e-06,
      1.6862912330418992e-06};
};

// NaN stays; of -infinity it is NaN, 0 times infinity, as in torch.
template <class A>
inline Vec<A> gelu(Vec<A> x) {
  using Phi = NormalDistribution<A>;
  constexpr A kEnd = Phi::kEnd;
  Vec<A> inside = x > kEnd ? splat(kEnd) : x;
  inside = inside < -kEnd ? splat(-kEnd) : inside;
  const Vec<A> u = inside * (inside * (2 / (kEnd * kEnd))) - 1;
  constexpr int kDegree = static_cast<int>(std::size(Phi::kPowers)) - 1;
  Vec<A> q = splat(Phi::kPowers[kDegree]);
#pragma GCC unroll 40
  for (int i = kDegree - 1; i >= 0; --i) q = q * u + Phi::kPowers[i];
  Vec<A> phi = inside * q + A(0.5);
  phi = x >= kEnd ? splat(A{1}) : phi;
  phi = x <= -kEnd ? Vec<A>{} : phi;
  return x * phi;
}

}  // namespace mod_kernels
