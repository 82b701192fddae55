// The likelihood as torch sees it: outputs, layouts and threads. The arithmetic is in laplace.h; arguments were checked
// by dalle_kernels/likelihood/op.py.

#include <algorithm>
#include <array>
#include <tuple>

#include "isa.h"
#include "likelihood/kernels.h"
#include "memory.h"
#include "operators.h"
#include "strided.h"
#include "tensor.h"

namespace dalle {
namespace {

constexpr int64_t kGrain = 4096;  // elements below which a second thread costs more than it gives
constexpr int64_t kRun = 512;     // elements of scattered arrays that are packed at a time

template <class T>
const LaplaceKernels<T>& kernels();
template <>
const LaplaceKernels<float>& kernels() {
  return laplace_kernels().f32;
}
template <>
const LaplaceKernels<bf16>& kernels() {
  return laplace_kernels().bf16;
}

// An array of a run: in place where it is contiguous, otherwise in a buffer.
template <class T>
struct Run {
  char* base;
  int64_t stride;
  std::array<T, kRun> buffer;

  bool contiguous() const { return stride == int64_t(sizeof(T)); }
  T* at(int64_t i) { return contiguous() ? reinterpret_cast<T*>(base) + i : buffer.data(); }
  void gather(int64_t i, int64_t n) {
    for (int64_t j = 0; j < n && !contiguous(); j++) buffer[size_t(j)] = *reinterpret_cast<T*>(base + (i + j) * stride);
  }
  void scatter(int64_t i, int64_t n) {
    for (int64_t j = 0; j < n && !contiguous(); j++) *reinterpret_cast<T*>(base + (i + j) * stride) = buffer[size_t(j)];
  }
};

// step(i, n) for runs of n elements that cover 0 .. count - 1: one run where nothing needs packing.
template <class Step>
void for_runs(int64_t count, bool whole, Step step) {
  const int64_t run = whole ? count : kRun;
  for (int64_t i = 0; i < count; i += run) step(i, std::min(run, count - i));
}

template <class T>
void forward(const Strided<4>& arrays) {
  arrays.for_each(kGrain, [](const std::array<char*, 4>& data, const std::array<int64_t, 4>& strides, int64_t count) {
    Run<float> nll{data[0], strides[0], {}};
    Run<T> pixels{data[1], strides[1], {}}, mu{data[2], strides[2], {}}, log_b{data[3], strides[3], {}};
    const bool whole = nll.contiguous() && pixels.contiguous() && mu.contiguous() && log_b.contiguous();
    for_runs(count, whole, [&](int64_t i, int64_t n) {
      for (Run<T>* input : {&pixels, &mu, &log_b}) input->gather(i, n);
      kernels<T>().forward({pixels.at(i), mu.at(i), log_b.at(i), nll.at(i), n});
      nll.scatter(i, n);
    });
  });
}

template <class T>
void backward(const Strided<6>& arrays, bool needs_mu, bool needs_log_b) {
  arrays.for_each(kGrain, [=](const std::array<char*, 6>& data, const std::array<int64_t, 6>& strides, int64_t count) {
    Run<T> dmu{data[0], strides[0], {}}, dlog_b{data[1], strides[1], {}};
    Run<float> grad{data[2], strides[2], {}};
    Run<T> pixels{data[3], strides[3], {}}, mu{data[4], strides[4], {}}, log_b{data[5], strides[5], {}};
    const bool whole = grad.contiguous() && pixels.contiguous() && mu.contiguous() && log_b.contiguous() &&
                       dmu.contiguous() && dlog_b.contiguous();
    for_runs(count, whole, [&](int64_t i, int64_t n) {
      grad.gather(i, n);
      for (Run<T>* input : {&pixels, &mu, &log_b}) input->gather(i, n);
      kernels<T>().backward({grad.at(i), pixels.at(i), mu.at(i), log_b.at(i), needs_mu ? dmu.at(i) : nullptr,
                             needs_log_b ? dlog_b.at(i) : nullptr, n});
      if (needs_mu) dmu.scatter(i, n);
      if (needs_log_b) dlog_b.scatter(i, n);
    });
  });
}

void check(const Tensor& pixels, std::initializer_list<const Tensor*> others) {
  require(pixels.dtype() == DType::float32 || pixels.dtype() == DType::bfloat16,
          "the CPU kernels take float32 and bfloat16, not ", pixels.dtype());
  for (const Tensor* other : others)
    require(other->same_shape(pixels) && other->dtype() == pixels.dtype(), "got shape ", shape_of(*other),
            " and dtype ", other->dtype(), ", wanted those of pixels: ", shape_of(pixels), ", ", pixels.dtype());
}

// Inputs are read only, through the type that outputs have.
void* input(const Tensor& tensor) { return const_cast<void*>(tensor.data<const void>()); }

Tensor laplace_forward(const Tensor& pixels, const Tensor& mu, const Tensor& log_b) {
  check(pixels, {&mu, &log_b});
  Tensor nll = new_tensor_like(pixels, DType::float32);
  const Strided<4> arrays({&nll, &pixels, &mu, &log_b}, {nll.data<void>(), input(pixels), input(mu), input(log_b)});
  pixels.dtype() == DType::float32 ? forward<float>(arrays) : forward<bf16>(arrays);
  return nll;
}

std::tuple<Tensor, Tensor> laplace_backward(const Tensor& grad, const Tensor& pixels, const Tensor& mu,
                                            const Tensor& log_b, bool needs_mu, bool needs_log_b) {
  check(pixels, {&mu, &log_b});
  require(grad.dtype() == DType::float32 && grad.same_shape(pixels), "grad: got shape ", shape_of(grad), " and dtype ",
          grad.dtype(), ", wanted ", shape_of(pixels), " and float32");
  Tensor dmu = needs_mu ? new_tensor_like(mu) : empty({0}, mu.dtype());
  Tensor dlog_b = needs_log_b ? new_tensor_like(log_b) : empty({0}, mu.dtype());
  if (needs_mu || needs_log_b) {
    // One that is not asked for has the other's layout, and is not written.
    const Tensor &to_mu = needs_mu ? dmu : dlog_b, &to_log_b = needs_log_b ? dlog_b : dmu;
    const Strided<6> arrays(
        {&to_mu, &to_log_b, &grad, &pixels, &mu, &log_b},
        {to_mu.data<void>(), to_log_b.data<void>(), input(grad), input(pixels), input(mu), input(log_b)});
    (pixels.dtype() == DType::float32 ? backward<float> : backward<bf16>)(arrays, needs_mu, needs_log_b);
  }
  return {std::move(dmu), std::move(dlog_b)};
}

const Operators defined("CPU",
                        {{"logit_laplace_forward(Tensor pixels, Tensor mu, Tensor log_b) -> Tensor",
                          boxed<&laplace_forward>},
                         {"logit_laplace_backward(Tensor grad, Tensor pixels, Tensor mu, Tensor log_b, bool needs_mu, "
                          "bool needs_log_b) -> (Tensor, Tensor)",
                          boxed<&laplace_backward>}});

}  // namespace
}  // namespace dalle
