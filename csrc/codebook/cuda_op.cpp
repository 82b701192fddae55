// torch.ops.dalle_kernels_cuda.gumbel_*: unpacks tensors for the kernels of csrc/codebook.

#include "codebook/cuda.h"

#include <optional>

#include "cuda/tensors.h"

namespace dalle {

template <class T>
static T* optional_pointer(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? device_pointer<T>(*tensor) : nullptr;
}

static void gumbel_forward(Tensor logits, Tensor codebook, Tensor codebook_terms, Tensor temperature, bool hard,
                           bool noise, Tensor seed, Tensor latents, Tensor indices, Tensor kl, Tensor maximum,
                           Tensor log_noisy, Tensor log_clean, Tensor mixture) {
  const DeviceGuard guard(logits.get_device());
  GumbelForward p;
  p.logits = device_pointer<const void>(logits);
  p.codebook = device_pointer<const void>(codebook);
  p.codebook_terms = device_pointer<const void>(codebook_terms);
  p.temperature = device_pointer<const float>(temperature);
  p.seed = device_pointer<const int64_t>(seed);
  p.latents = device_pointer<void>(latents);
  p.indices = device_pointer<int64_t>(indices);
  p.kl = device_pointer<float>(kl);
  p.maximum = device_pointer<float>(maximum);
  p.log_noisy = device_pointer<float>(log_noisy);
  p.log_clean = device_pointer<float>(log_clean);
  p.mixture = device_pointer<float>(mixture);
  p.logits_stride = logits.stride(0);
  p.rows = static_cast<int>(logits.size(0));
  p.codes = static_cast<int>(logits.size(1));
  p.width = static_cast<int>(codebook.size(1));
  p.hard = hard;
  p.noise = noise;
  switch (element_of(logits)) {
    case Element::float32:
      return gumbel_forward_float32(p, current_stream(logits));
    case Element::bfloat16:
      return gumbel_forward_bfloat16(p, current_stream(logits));
    case Element::float16:
      return gumbel_forward_float16(p, current_stream(logits));
  }
}

static void gumbel_backward(std::optional<Tensor> grad_terms, std::optional<Tensor> grad_kl, Tensor logits,
                            Tensor codebook_terms, Tensor temperature, bool noise, Tensor seed, Tensor kl,
                            Tensor maximum, Tensor log_noisy, Tensor log_clean, std::optional<Tensor> delta,
                            std::optional<Tensor> indices, int64_t parts, std::optional<Tensor> dlogits,
                            std::optional<Tensor> dcodebook) {
  const DeviceGuard guard(logits.get_device());
  GumbelBackward p;
  p.grad_terms = optional_pointer<const void>(grad_terms);
  p.grad_kl = optional_pointer<const float>(grad_kl);
  p.logits = device_pointer<const void>(logits);
  p.codebook_terms = device_pointer<const void>(codebook_terms);
  p.temperature = device_pointer<const float>(temperature);
  p.seed = device_pointer<const int64_t>(seed);
  p.kl = device_pointer<const float>(kl);
  p.maximum = device_pointer<const float>(maximum);
  p.log_noisy = device_pointer<const float>(log_noisy);
  p.log_clean = device_pointer<const float>(log_clean);
  p.delta = optional_pointer<const float>(delta);
  p.indices = optional_pointer<const int64_t>(indices);
  p.dlogits = optional_pointer<void>(dlogits);
  p.dcodebook = optional_pointer<float>(dcodebook);
  p.logits_stride = logits.stride(0);
  p.rows = static_cast<int>(logits.size(0));
  p.codes = static_cast<int>(logits.size(1));
  p.width = static_cast<int>(codebook_terms.size(2));
  p.parts = static_cast<int>(parts);
  p.noise = noise;
  switch (element_of(logits)) {
    case Element::float32:
      return gumbel_backward_float32(p, current_stream(logits));
    case Element::bfloat16:
      return gumbel_backward_bfloat16(p, current_stream(logits));
    case Element::float16:
      return gumbel_backward_float16(p, current_stream(logits));
  }
}

}  // namespace dalle

STABLE_TORCH_LIBRARY_FRAGMENT(DALLE_LIBRARY, m) {
  m.def(
      "gumbel_forward(Tensor logits, Tensor codebook, Tensor codebook_terms, Tensor temperature, bool hard, bool noise,"
      " Tensor seed, Tensor(a!) latents, Tensor(b!) indices, Tensor(c!) kl, Tensor(d!) maximum, Tensor(e!) log_noisy,"
      " Tensor(f!) log_clean, Tensor(g!) mixture) -> ()");
  m.def(
      "gumbel_backward(Tensor? grad_terms, Tensor? grad_kl, Tensor logits, Tensor codebook_terms, Tensor temperature,"
      " bool noise, Tensor seed, Tensor kl, Tensor maximum, Tensor log_noisy, Tensor log_clean, Tensor? delta,"
      " Tensor? indices, int parts,"
      " Tensor(a!)? dlogits, Tensor(b!)? dcodebook) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(DALLE_LIBRARY, DALLE_DISPATCH_KEY, m) {
  m.impl("gumbel_forward", TORCH_BOX(&dalle::gumbel_forward));
  m.impl("gumbel_backward", TORCH_BOX(&dalle::gumbel_backward));
}
