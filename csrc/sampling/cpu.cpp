// sample_tokens as torch sees it: outputs and threads. The arithmetic is in sample.h; arguments were checked by
// dalle_kernels/sampling/op.py.

#include <optional>

#include "isa.h"
#include "operators.h"
#include "parallel.h"
#include "sampling/kernels.h"
#include "scratch.h"
#include "tensor.h"

namespace dalle {
namespace {

Tensor sample(const Tensor& logits, const std::optional<Tensor>& unconditional, double guidance_scale,
              double temperature, int64_t top_k, double top_p, int64_t seed, int64_t row_offset) {
  require(logits.dim() == 2 && has_rows(logits) &&
              (!unconditional || (unconditional->same_shape(logits) && unconditional->dtype() == logits.dtype() &&
                                  has_rows(*unconditional))),
          "sample: wanted logits [B, V] with contiguous rows, and unconditional logits alike");
  require(logits.dtype() == DType::float32 || logits.dtype() == DType::bfloat16,
          "the CPU kernels take float32 and bfloat16, not ", logits.dtype());
  Tensor tokens = empty({logits.size(0)}, DType::int64);
  const Sampling problem{logits.data<const void>(),
                         unconditional ? unconditional->data<const void>() : nullptr,
                         logits.size(0),
                         logits.size(1),
                         logits.stride(0),
                         unconditional ? unconditional->stride(0) : 0,
                         float(guidance_scale),
                         float(temperature),
                         top_k,
                         float(top_p),
                         uint64_t(seed),
                         uint64_t(row_offset),
                         tokens.data<int64_t>()};
  const SamplingTable& table = sampling_kernels();
  const SampleRows sample_rows = logits.dtype() == DType::float32 ? table.f32 : table.bf16;
  parallel_for(0, problem.rows, 1,
               [&](int64_t row, int64_t end) { sample_rows(problem, row, end, thread_scratch(problem.scratch())); });
  return tokens;
}

const Operators defined("CPU", {{"sample(Tensor logits, Tensor? unconditional, float guidance_scale, "
                                 "float temperature, int top_k, float top_p, int seed, int row_offset) -> Tensor",
                                 boxed<&sample>}});

}  // namespace
}  // namespace dalle
