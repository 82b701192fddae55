// torch.ops.dalle_kernels_cuda.sample_tokens: unpacks tensors for csrc/sampling/sample.cu.

#include <optional>

#include "cuda/tensors.h"
#include "sampling/cuda.h"

namespace dalle {

static void sample(Tensor logits, std::optional<Tensor> unconditional, double guidance_scale, double temperature,
                   int64_t top_k, double top_p, Tensor seed, Tensor tokens) {
  const DeviceGuard guard(logits.get_device());
  SampleParameters p;
  p.logits = device_pointer<const void>(logits);
  p.unconditional = unconditional.has_value() ? device_pointer<const void>(*unconditional) : nullptr;
  p.seed = device_pointer<const int64_t>(seed);
  p.tokens = device_pointer<int64_t>(tokens);
  p.logits_stride = logits.stride(0);
  p.unconditional_stride = unconditional.has_value() ? unconditional->stride(0) : 0;
  p.batch = static_cast<int>(logits.size(0));
  p.vocabulary = static_cast<int>(logits.size(1));
  p.top_k = top_k < p.vocabulary ? static_cast<int>(top_k) : 0;
  p.top_p = static_cast<float>(top_p);
  p.temperature = static_cast<float>(temperature);
  p.guidance_scale = static_cast<float>(guidance_scale);
  sample_tokens(element_of(logits), p, current_stream(logits));
}

}  // namespace dalle

STABLE_TORCH_LIBRARY_FRAGMENT(DALLE_LIBRARY, m) {
  m.def(
      "sample_tokens(Tensor logits, Tensor? unconditional, float guidance_scale, float temperature, int top_k,"
      " float top_p, Tensor seed, Tensor(a!) tokens) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(DALLE_LIBRARY, DALLE_DISPATCH_KEY, m) { m.impl("sample_tokens", TORCH_BOX(&dalle::sample)); }
