// The codebook's CPU operations as torch sees them: outputs, workspaces, threads. The arithmetic is in gumbel.h and
// vq.h; arguments were checked by dalle_kernels/codebook/op.py. Results do not depend on the number of threads: tasks
// are cut by shapes alone, and whatever several rows add to has one writer.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "codebook/kernels.h"
#include "isa.h"
#include "memory.h"
#include "scratch.h"

namespace dalle {
namespace {

using at::Tensor;

const CodebookKernels& kernels_for(const Tensor& tensor) {
  const CodebookTable& table =
      for_isa(avx2::codebook_kernels, avx512::codebook_kernels, avx512_bf16::codebook_kernels)();
  TORCH_CHECK_TYPE(tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kBFloat16,
                   "the CPU kernels take float32 and bfloat16, not ", tensor.scalar_type());
  return tensor.scalar_type() == at::kFloat ? table.f32 : table.bf16;
}

template <class T>
T* pointer(const std::optional<Tensor>& tensor) {
  return tensor.has_value() && tensor->numel() > 0 ? (T*)tensor->data_ptr() : nullptr;
}

Gumbel gumbel_problem(const Tensor& logits, const Tensor& codebook, const Tensor& temperature, bool noise,
                      const Tensor& seed) {
  TORCH_CHECK_VALUE(logits.dim() == 2 && has_rows(logits) && codebook.dim() == 2 && codebook.is_contiguous() &&
                        logits.size(1) == codebook.size(0) && logits.scalar_type() == codebook.scalar_type(),
                    "gumbel: wanted logits [N, K] with contiguous rows and a contiguous codebook [K, D] of their dtype");
  return {logits.data_ptr(), codebook.data_ptr(), logits.size(0), logits.size(1), codebook.size(1), logits.stride(0),
          temperature.item<float>(), noise, uint64_t(seed.item<int64_t>())};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gumbel_forward(const Tensor& logits, const Tensor& codebook,
                                                                          const Tensor& temperature, bool hard,
                                                                          bool noise, const Tensor& seed) {
  const Gumbel problem = gumbel_problem(logits, codebook, temperature, noise, seed);
  const auto wide = logits.options().dtype(at::kFloat);
  Tensor latents = new_tensor({problem.rows, problem.width}, logits.options());
  Tensor indices = at::empty({problem.rows}, logits.options().dtype(at::kLong));
  Tensor kl = at::empty({problem.rows}, wide), lse_noisy = at::empty_like(kl), lse_clean = at::empty_like(kl);
  Tensor mixture = hard ? new_tensor({problem.rows, problem.width}, wide) : at::empty({0}, wide);
  GumbelForward forward{problem, latents.data_ptr(), hard ? mixture.data_ptr<float>() : nullptr,
                        indices.data_ptr<int64_t>(), kl.data_ptr<float>(), lse_noisy.data_ptr<float>(),
                        lse_clean.data_ptr<float>(), nullptr};
  const Tensor packed = new_tensor({forward.packed_words()}, logits.options().dtype(at::kInt));
  forward.packed = (uint32_t*)packed.data_ptr();
  const CodebookKernels& kernels = kernels_for(logits);
  at::parallel_for(0, problem.tiles(), 1,
                   [&](int64_t tile, int64_t end) { kernels.gumbel_pack(forward, tile, end); });
  at::parallel_for(0, problem.rows, 1, [&](int64_t row, int64_t end) {
    kernels.gumbel_forward(forward, row, end, thread_scratch(forward.scratch()));
  });
  return {latents, indices, kl, lse_noisy, lse_clean, mixture};
}

// The rows of each code, in ascending order: a counting sort.
std::pair<std::vector<int64_t>, std::vector<int64_t>> members_of_codes(const Tensor& indices, int64_t codes) {
  const int64_t rows = indices.numel(), *index = indices.data_ptr<int64_t>();
  std::vector<int64_t> starts(size_t(codes) + 1), members(static_cast<size_t>(rows));
  for (int64_t n = 0; n < rows; n++) {
    TORCH_CHECK_INDEX(0 <= index[n] && index[n] < codes, "indices: row ", n, " holds ", index[n], ", wanted 0 .. ", codes - 1);
    starts[size_t(index[n]) + 1]++;
  }
  for (int64_t k = 0; k < codes; k++) starts[size_t(k) + 1] += starts[size_t(k)];
  std::vector<int64_t> next(starts.begin(), starts.end() - 1);
  for (int64_t n = 0; n < rows; n++) members[size_t(next[size_t(index[n])]++)] = n;
  return {std::move(starts), std::move(members)};
}

constexpr int64_t kCodesPerTask = 64;

std::tuple<Tensor, Tensor> gumbel_backward(const std::optional<Tensor>& grad_latents,
                                           const std::optional<Tensor>& grad_kl, const Tensor& logits,
                                           const Tensor& codebook, const Tensor& temperature, bool hard, bool noise,
                                           const Tensor& seed, const Tensor& latents, const Tensor& indices,
                                           const Tensor& kl, const Tensor& lse_noisy, const Tensor& lse_clean,
                                           const Tensor& mixture) {
  const CodebookKernels& kernels = kernels_for(logits);
  const bool has_latents = pointer<void>(grad_latents) != nullptr;
  // Without a gradient of the latents nothing asks for the noise, and codes can be walked in their own order.
  const Gumbel problem = gumbel_problem(logits, codebook, temperature, noise && has_latents, seed);
  const int64_t columns = padded(problem.width), rows = problem.rows;
  Tensor grad_logits = new_tensor({rows, problem.codes}, logits.options());
  const bool through_mixture = has_latents && !hard;
  Tensor grad_codebook = through_mixture ? new_tensor_like(codebook) : at::zeros_like(codebook);

  GumbelBackward backward{problem};
  backward.grad_latents = pointer<void>(grad_latents);
  backward.grad_kl = pointer<float>(grad_kl);
  backward.kl = kl.data_ptr<float>();
  backward.lse_noisy = lse_noisy.data_ptr<float>();
  backward.lse_clean = lse_clean.data_ptr<float>();
  backward.mixture = hard ? mixture.data_ptr<float>() : nullptr;
  backward.latents = latents.data_ptr();
  backward.grad_logits = grad_logits.data_ptr();
  backward.grad_codebook = through_mixture ? grad_codebook.data_ptr() : nullptr;
  // A small codebook has few tiles: the rows are shared out as well, into parts of at least 256.
  backward.splits = std::clamp<int64_t>((64 + problem.tiles() - 1) / problem.tiles(), 1,
                                         std::max<int64_t>(rows / 256, 1));

  const auto words = logits.options().dtype(at::kInt), wide = logits.options().dtype(at::kFloat);
  Tensor by_rows, packed, delta, partial;
  if (has_latents) {
    by_rows = new_tensor({rows, columns}, words);
    packed = new_tensor({rows, columns}, words);
    delta = at::empty({rows}, wide);
    backward.grad_by_rows = (uint32_t*)by_rows.data_ptr();
    backward.grad_packed = (uint32_t*)packed.data_ptr();
    backward.delta = delta.data_ptr<float>();
    at::parallel_for(0, round_up(rows, kRowTile) / kRowTile, 1,
                     [&](int64_t tile, int64_t end) { kernels.gumbel_prepare(backward, tile, end); });
  }
  if (through_mixture && backward.splits > 1) {
    partial = new_tensor({backward.splits, problem.codes, columns}, wide);
    backward.partial = partial.data_ptr<float>();
  }
  at::parallel_for(0, problem.tiles() * backward.splits, 1, [&](int64_t task, int64_t end) {
    kernels.gumbel_backward(backward, task, end, thread_scratch(backward.scratch()));
  });
  if (backward.partial != nullptr)
    at::parallel_for(0, problem.codes, kCodesPerTask,
                     [&](int64_t code, int64_t end) { kernels.gumbel_collect(backward, code, end); });
  if (has_latents && hard) {
    const auto [starts, members] = members_of_codes(indices, problem.codes);
    const VqBackward scatter{.rows = rows, .codes = problem.codes, .width = problem.width,
                             .grad_codebook = grad_codebook.data_ptr(), .starts = starts.data(), .members = members.data()};
    at::parallel_for(0, problem.codes, kCodesPerTask, [&](int64_t code, int64_t end) {
      kernels.scatter_rows(grad_latents->data_ptr(), scatter, code, end);
    });
  }
  return {grad_logits, grad_codebook};
}

std::tuple<Tensor, Tensor> vq_forward(const Tensor& features, const Tensor& codebook) {
  const CodebookKernels& kernels = kernels_for(features);
  const int64_t rows = features.size(0), codes = codebook.size(0), width = codebook.size(1);
  const Tensor dense = features.contiguous();
  const auto wide = features.options().dtype(at::kFloat);
  Tensor indices = at::empty({rows}, features.options().dtype(at::kLong));
  Tensor squared_distance = at::empty({rows}, wide), half_norms = at::empty({codes}, wide);
  const Vq problem{dense.data_ptr(), codebook.data_ptr(), rows, codes, width, indices.data_ptr<int64_t>(),
                   squared_distance.data_ptr<float>(), half_norms.data_ptr<float>()};
  at::parallel_for(0, codes, kCodesPerTask, [&](int64_t code, int64_t end) { kernels.half_norms(problem, code, end); });
  at::parallel_for(0, rows, kRowTile, [&](int64_t row, int64_t end) {
    kernels.vq_forward(problem, row, end, thread_scratch(problem.scratch()));
  });
  return {indices, squared_distance};
}

std::tuple<Tensor, Tensor> vq_backward(const Tensor& grad, const Tensor& features, const Tensor& codebook,
                                       const Tensor& indices) {
  const CodebookKernels& kernels = kernels_for(features);
  const int64_t rows = features.size(0), codes = codebook.size(0), width = codebook.size(1);
  const Tensor dense = features.contiguous();
  Tensor grad_features = new_tensor_like(dense), grad_codebook = new_tensor_like(codebook);
  const auto [starts, members] = members_of_codes(indices, codes);
  const VqBackward backward{grad.data_ptr<float>(), dense.data_ptr(), codebook.data_ptr(), rows, codes, width,
                            indices.data_ptr<int64_t>(), grad_features.data_ptr(), grad_codebook.data_ptr(),
                            starts.data(), members.data()};
  at::parallel_for(0, rows, kCodesPerTask, [&](int64_t row, int64_t end) { kernels.vq_grad_features(backward, row, end); });
  at::parallel_for(0, codes, kCodesPerTask, [&](int64_t code, int64_t end) { kernels.vq_grad_codebook(backward, code, end); });
  return {grad_features, grad_codebook};
}

// The generator by itself, for tests: words int64 [4, 16] of 16 counters from `counter`, and their noise.
std::tuple<Tensor, Tensor> noise_words(int64_t seed, int64_t row, int64_t stream, int64_t counter) {
  Tensor words = at::empty({4, 16}, at::kInt), noise = at::empty({4, 16}, at::kFloat);
  kernels_for(noise).noise_words(uint64_t(seed), uint64_t(row), uint32_t(stream), uint32_t(counter),
                                 (uint32_t(*)[16])words.data_ptr(), (float(*)[16])noise.data_ptr());
  return {words.to(at::kLong).bitwise_and(0xFFFFFFFFLL), noise};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(dalle_kernels_cpu, m) {
  m.def("gumbel_forward(Tensor logits, Tensor codebook, Tensor temperature, bool hard, bool noise, Tensor seed)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)", &gumbel_forward);
  m.def("gumbel_backward(Tensor? grad_latents, Tensor? grad_kl, Tensor logits, Tensor codebook, Tensor temperature,"
        " bool hard, bool noise, Tensor seed, Tensor latents, Tensor indices, Tensor kl, Tensor lse_noisy,"
        " Tensor lse_clean, Tensor mixture) -> (Tensor, Tensor)", &gumbel_backward);
  m.def("vq_forward(Tensor features, Tensor codebook) -> (Tensor, Tensor)", &vq_forward);
  m.def("vq_backward(Tensor grad_squared_distance, Tensor features, Tensor codebook, Tensor indices)"
        " -> (Tensor, Tensor)", &vq_backward);
  m.def("noise_words(int seed, int row, int stream, int counter) -> (Tensor, Tensor)", &noise_words);
}

}  // namespace dalle
