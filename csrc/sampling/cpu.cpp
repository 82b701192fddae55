// sample_tokens as torch sees it: outputs and threads. The arithmetic is in sample.h; arguments were checked by
// dalle_kernels/sampling/op.py.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "isa.h"
#include "memory.h"
#include "sampling/kernels.h"
#include "scratch.h"

namespace dalle {
namespace {

using at::Tensor;

Tensor sample(const Tensor& logits, const std::optional<Tensor>& unconditional, double guidance_scale,
              double temperature, int64_t top_k, double top_p, const Tensor& seed) {
  TORCH_CHECK_VALUE(logits.dim() == 2 && has_rows(logits) &&
                        (!unconditional.has_value() || (unconditional->sizes() == logits.sizes() &&
                                                        unconditional->scalar_type() == logits.scalar_type() &&
                                                        has_rows(*unconditional))),
                    "sample: wanted logits [B, V] with contiguous rows, and unconditional logits alike");
  TORCH_CHECK_TYPE(logits.scalar_type() == at::kFloat || logits.scalar_type() == at::kBFloat16,
                   "the CPU kernels take float32 and bfloat16, not ", logits.scalar_type());
  Tensor tokens = at::empty({logits.size(0)}, logits.options().dtype(at::kLong));
  const bool guided = unconditional.has_value();
  const Sampling problem{logits.data_ptr(), guided ? unconditional->data_ptr() : nullptr, logits.size(0), logits.size(1),
                         logits.stride(0), guided ? unconditional->stride(0) : 0, float(guidance_scale),
                         float(temperature), top_k, float(top_p), uint64_t(seed.item<int64_t>()),
                         tokens.data_ptr<int64_t>()};
  const SamplingTable& table = for_isa(avx2::sampling_kernels, avx512::sampling_kernels, avx512::sampling_kernels)();
  const SampleRows sample_rows = logits.scalar_type() == at::kFloat ? table.f32 : table.bf16;
  at::parallel_for(0, problem.rows, 1, [&](int64_t row, int64_t end) {
    sample_rows(problem, row, end, thread_scratch(problem.scratch()));
  });
  return tokens;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(dalle_kernels_cpu, m) {
  m.def("sample(Tensor logits, Tensor? unconditional, float guidance_scale, float temperature, int top_k, float top_p,"
        " Tensor seed) -> Tensor", &sample);
}

}  // namespace dalle
