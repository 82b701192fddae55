// The logit-Laplace likelihood: every array is read once and written once.
//
//     nll = log 2 + log b + log x (1 - x) + |z|        z = (logit x - mu) / b
//     dmu = -g sign(z) / b                             dlog b = g (1 - |z|)
//
// Two logarithms, of x (1 - x) and of x / (1 - x), instead of those of x and 1 - x: near x = 1/2 the logit keeps its
// digits. Outside 0 < x < 1 everything is NaN, as in the definition.
#pragma once

#include "likelihood/kernels.h"
#include "simd.h"

DALLE_TARGET_BEGIN
namespace dalle::DALLE_ISA {

// log of a positive number, denormal or not.
DALLE_INLINE F log_of_any(F x) {
  const Mask small = greater(set(FLT_MIN), x);
  return log(select(small, x * set(0x1p32f), x)) + select(small, set(-32 * 0x1.62e430p-1f), zero());
}

// e^-x; the rounding of x log2(e) is taken back before it can cost the result its digits.
DALLE_INLINE F exp_minus(F x) {
  const F clamped = min(max(x, set(-88.f)), set(87.3f));  // the result stays a normal number
  const F whole = round(clamped * set(-0x1.715476p+0f));
  const F rest = fnma(clamped, set(0x1.4ae0c0p-26f), fnma(clamped, set(0x1.715476p+0f), zero() - whole));
  return select(is_nan(x), x, scale_by_power(exp2_reduced(rest), whole));
}

struct LaplaceTerms {
  F logit, rate;  // logit x - mu, 1 / b
};

DALLE_INLINE LaplaceTerms laplace_terms(F x, F mu, F log_b) {
  const F inside = select(greater(x, zero()) & greater(set(1.f), x), x, set(NAN));
  const F logit = log_of_any(inside / (set(1.f) - inside));
  return {select(is_nan(inside), inside, logit) - mu, exp_minus(log_b)};
}

DALLE_INLINE F magnitude(F x) { return as_float(as_words(x) & set(0x7FFFFFFFu)); }

// Whole vectors, then a shorter one.
template <class Step>
DALLE_INLINE void for_vectors(int64_t count, Step step) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) step(i, kLanes);
  if (i < count) step(i, int(count - i));
}

template <class T>
DALLE_INLINE F load_some(const T* p, int n) {
  return n == kLanes ? load(p) : load(p, n);
}

template <class T>
DALLE_INLINE void store_some(T* p, F x, int n) {
  if (n == kLanes) store(p, x);
  else store(p, x, n);
}

template <class T>
void laplace_forward(const LaplaceForward<T>& p) {
  for_vectors(p.count, [&](int64_t i, int n) __attribute__((always_inline)) {
    const F x = load_some(p.pixels + i, n), log_b = load_some(p.log_b + i, n);
    const LaplaceTerms terms = laplace_terms(x, load_some(p.mu + i, n), log_b);
    const F density = log_b + log_of_any(x * (set(1.f) - x)) + set(0x1.62e430p-1f);
    store_some(p.nll + i, fma(magnitude(terms.logit), terms.rate, density), n);
  });
}

template <class T>
void laplace_backward(const LaplaceBackward<T>& p) {
  for_vectors(p.count, [&](int64_t i, int n) __attribute__((always_inline)) {
    const LaplaceTerms terms =
        laplace_terms(load_some(p.pixels + i, n), load_some(p.mu + i, n), load_some(p.log_b + i, n));
    const F grad = load_some(p.grad + i, n);
    if (p.dmu != nullptr) {
      const U sign = (as_words(terms.logit) & set(0x80000000u)) ^ set(0x80000000u);
      const F slope = as_float(as_words(grad * terms.rate) ^ sign);
      const F dmu = select(equal(terms.logit, zero()), zero(), slope);
      store_some(p.dmu + i, select(is_nan(terms.logit), terms.logit, dmu), n);
    }
    if (p.dlog_b != nullptr)
      store_some(p.dlog_b + i, grad * fnma(magnitude(terms.logit), terms.rate, set(1.f)), n);
  });
}

const LaplaceTable& laplace_kernels() {
  static constexpr LaplaceTable table{{&laplace_forward<float>, &laplace_backward<float>},
                                  {&laplace_forward<bf16>, &laplace_backward<bf16>}};
  return table;
}

}  // namespace dalle::DALLE_ISA
DALLE_TARGET_END
