// What the likelihood's kernels take: plain pointers, no torch. T: float or dalle::bf16.
#pragma once

#include <cstdint>

#include "bf16.h"
#include "isa.h"

namespace dalle {

// A run of `count` elements, each array contiguous.
template <class T>
struct LaplaceForward {
  const T *pixels, *mu, *log_b;
  float* nll;
  int64_t count;
};

template <class T>
struct LaplaceBackward {
  const float* grad;
  const T *pixels, *mu, *log_b;
  T *dmu, *dlog_b;  // one may be null
  int64_t count;
};

template <class T>
struct LaplaceKernels {
  void (*forward)(const LaplaceForward<T>&);
  void (*backward)(const LaplaceBackward<T>&);
};

struct LaplaceTable {
  LaplaceKernels<float> f32;
  LaplaceKernels<dalle::bf16> bf16;
};

DALLE_KERNEL_TABLE(LaplaceTable, laplace_kernels)

}  // namespace dalle
