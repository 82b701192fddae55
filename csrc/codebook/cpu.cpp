// The codebook's CPU operations as torch sees them: outputs, workspaces, threads. The arithmetic is in gumbel.h and
// vq.h; arguments were checked by dalle_kernels/codebook/op.py. Results do not depend on the number of threads: tasks
// are cut by shapes alone, and whatever several rows add to has one writer.

#include <algorithm>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "codebook/kernels.h"
#include "isa.h"
#include "memory.h"
#include "operators.h"
#include "parallel.h"
#include "scratch.h"
#include "tensor.h"

namespace dalle {
namespace {

const CodebookKernels& kernels_for(const Tensor& tensor) {
  const CodebookTable& table = codebook_kernels();
  require(tensor.dtype() == DType::float32 || tensor.dtype() == DType::bfloat16,
          "the CPU kernels take float32 and bfloat16, not ", tensor.dtype());
  return tensor.dtype() == DType::float32 ? table.f32 : table.bf16;
}

template <class T>
T* pointer(const std::optional<Tensor>& tensor) {
  return tensor.has_value() && tensor->numel() > 0 ? tensor->data<T>() : nullptr;
}

Gumbel gumbel_problem(const Tensor& logits, const Tensor& codebook, const Tensor& temperature, bool noise,
                      const Tensor& seed) {
  require(logits.dim() == 2 && has_rows(logits) && codebook.dim() == 2 && codebook.is_contiguous() &&
              logits.size(1) == codebook.size(0) && logits.dtype() == codebook.dtype(),
          "gumbel: wanted logits [N, K] with contiguous rows and a contiguous codebook [K, D] of their dtype");
  require(temperature.dtype() == DType::float32 && temperature.numel() == 1, "temperature: wanted one float32");
  require(seed.dtype() == DType::int64 && seed.numel() == 1, "seed: wanted one int64");
  return {logits.data<const void>(),
          codebook.data<const void>(),
          logits.size(0),
          logits.size(1),
          codebook.size(1),
          logits.stride(0),
          *temperature.data<const float>(),
          noise,
          uint64_t(*seed.data<const int64_t>())};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gumbel_forward(const Tensor& logits,
                                                                                  const Tensor& codebook,
                                                                                  const Tensor& temperature, bool hard,
                                                                                  bool noise, const Tensor& seed) {
  const Gumbel problem = gumbel_problem(logits, codebook, temperature, noise, seed);
  Tensor latents = new_tensor({problem.rows, problem.width}, logits.dtype());
  Tensor indices = empty({problem.rows}, DType::int64);
  Tensor kl = empty({problem.rows}, DType::float32), maximum = empty({problem.rows}, DType::float32);
  Tensor log_noisy = empty({problem.rows}, DType::float32), log_clean = empty({problem.rows}, DType::float32);
  Tensor mixture = hard ? new_tensor({problem.rows, problem.width}, DType::float32) : empty({0}, DType::float32);
  GumbelForward forward{problem,
                        latents.data<void>(),
                        hard ? mixture.data<float>() : nullptr,
                        indices.data<int64_t>(),
                        kl.data<float>(),
                        maximum.data<float>(),
                        log_noisy.data<float>(),
                        log_clean.data<float>(),
                        nullptr};
  const Tensor packed = new_tensor({forward.packed_words()}, DType::int32);
  forward.packed = packed.data<uint32_t>();
  const CodebookKernels& kernels = kernels_for(logits);
  parallel_for(0, problem.tiles(), 1, [&](int64_t tile, int64_t end) { kernels.gumbel_pack(forward, tile, end); });
  parallel_for(0, problem.rows, 1, [&](int64_t row, int64_t end) {
    kernels.gumbel_forward(forward, row, end, thread_scratch(forward.scratch()));
  });
  return {std::move(latents),   std::move(indices),   std::move(kl),     std::move(maximum),
          std::move(log_noisy), std::move(log_clean), std::move(mixture)};
}

// The rows of each code, in ascending order: a counting sort.
std::pair<std::vector<int64_t>, std::vector<int64_t>> members_of_codes(const Tensor& indices, int64_t codes) {
  require(indices.dtype() == DType::int64 && indices.is_contiguous(), "indices: wanted contiguous int64");
  const int64_t rows = indices.numel(), *index = indices.data<const int64_t>();
  std::vector<int64_t> starts(size_t(codes) + 1), members(static_cast<size_t>(rows));
  for (int64_t n = 0; n < rows; n++) {
    require<std::out_of_range>(0 <= index[n] && index[n] < codes, "indices: row ", n, " holds ", index[n],
                               ", wanted 0 .. ", codes - 1);
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
                                           const Tensor& kl, const Tensor& maximum, const Tensor& log_noisy,
                                           const Tensor& log_clean, const Tensor& mixture, bool needs_codebook) {
  const CodebookKernels& kernels = kernels_for(logits);
  const bool has_latents = pointer<const void>(grad_latents) != nullptr;
  // Without a gradient of the latents nothing asks for the noise, and codes can be walked in their own order.
  const Gumbel problem = gumbel_problem(logits, codebook, temperature, noise && has_latents, seed);
  const int64_t columns = padded(problem.width), rows = problem.rows;
  Tensor grad_logits = new_tensor({rows, problem.codes}, logits.dtype());
  const bool through_mixture = has_latents && !hard && needs_codebook;
  Tensor grad_codebook = needs_codebook ? new_tensor_like(codebook) : empty({0}, codebook.dtype());
  if (needs_codebook && !through_mixture)
    std::memset(grad_codebook.data<void>(), 0, size_t(codebook.numel() * codebook.element_size()));

  GumbelBackward backward{problem};
  backward.grad_latents = pointer<const void>(grad_latents);
  backward.grad_kl = pointer<const float>(grad_kl);
  backward.kl = kl.data<const float>();
  backward.maximum = maximum.data<const float>();
  backward.log_noisy = log_noisy.data<const float>();
  backward.log_clean = log_clean.data<const float>();
  backward.mixture = hard ? mixture.data<const float>() : nullptr;
  backward.latents = latents.data<const void>();
  backward.grad_logits = grad_logits.data<void>();
  backward.grad_codebook = through_mixture ? grad_codebook.data<void>() : nullptr;
  // A small codebook has few tiles: the rows are shared out as well, into parts of at least 256.
  backward.splits =
      std::clamp<int64_t>((64 + problem.tiles() - 1) / problem.tiles(), 1, std::max<int64_t>(rows / 256, 1));

  Tensor by_rows, packed, delta, partial;
  if (has_latents) {
    by_rows = new_tensor({rows, columns}, DType::int32);
    packed = new_tensor({rows, columns}, DType::int32);
    delta = empty({rows}, DType::float32);
    backward.grad_by_rows = by_rows.data<uint32_t>();
    backward.grad_packed = packed.data<uint32_t>();
    backward.delta = delta.data<float>();
    parallel_for(0, round_up(rows, kRowTile) / kRowTile, 1,
                 [&](int64_t tile, int64_t end) { kernels.gumbel_prepare(backward, tile, end); });
  }
  if (through_mixture && backward.splits > 1) {
    partial = new_tensor({backward.splits, problem.codes, columns}, DType::float32);
    backward.partial = partial.data<float>();
  }
  parallel_for(0, problem.tiles() * backward.splits, 1, [&](int64_t task, int64_t end) {
    kernels.gumbel_backward(backward, task, end, thread_scratch(backward.scratch()));
  });
  if (backward.partial != nullptr)
    parallel_for(0, problem.codes, kCodesPerTask,
                 [&](int64_t code, int64_t end) { kernels.gumbel_collect(backward, code, end); });
  if (has_latents && hard && needs_codebook) {
    const auto [starts, members] = members_of_codes(indices, problem.codes);
    const VqBackward scatter{.rows = rows,
                             .codes = problem.codes,
                             .width = problem.width,
                             .grad_codebook = grad_codebook.data<void>(),
                             .starts = starts.data(),
                             .members = members.data()};
    parallel_for(0, problem.codes, kCodesPerTask, [&](int64_t code, int64_t end) {
      kernels.scatter_rows(grad_latents->data<const void>(), scatter, code, end);
    });
  }
  return {std::move(grad_logits), std::move(grad_codebook)};
}

std::tuple<Tensor, Tensor> vq_forward(const Tensor& features, const Tensor& codebook) {
  const CodebookKernels& kernels = kernels_for(features);
  const int64_t rows = features.size(0), codes = codebook.size(0), width = codebook.size(1);
  const Tensor dense = contiguous(features);
  Tensor indices = empty({rows}, DType::int64), squared_distance = empty({rows}, DType::float32);
  const Tensor half_norms = empty({codes}, DType::float32);
  const Vq problem{
      dense.data<const void>(),       codebook.data<const void>(), rows, codes, width, indices.data<int64_t>(),
      squared_distance.data<float>(), half_norms.data<float>()};
  parallel_for(0, codes, kCodesPerTask, [&](int64_t code, int64_t end) { kernels.half_norms(problem, code, end); });
  parallel_for(0, rows, kRowTile, [&](int64_t row, int64_t end) {
    kernels.vq_forward(problem, row, end, thread_scratch(problem.scratch()));
  });
  return {std::move(indices), std::move(squared_distance)};
}

std::tuple<Tensor, Tensor> vq_backward(const Tensor& grad, const Tensor& features, const Tensor& codebook,
                                       const Tensor& indices, bool needs_features, bool needs_codebook) {
  const CodebookKernels& kernels = kernels_for(features);
  const int64_t rows = features.size(0), codes = codebook.size(0), width = codebook.size(1);
  const Tensor dense = contiguous(features);
  Tensor grad_features = needs_features ? new_tensor_like(dense) : empty({0}, features.dtype());
  Tensor grad_codebook = needs_codebook ? new_tensor_like(codebook) : empty({0}, codebook.dtype());
  const auto [starts, members] = members_of_codes(indices, codes);
  const VqBackward backward{grad.data<const float>(),
                            dense.data<const void>(),
                            codebook.data<const void>(),
                            rows,
                            codes,
                            width,
                            indices.data<const int64_t>(),
                            grad_features.data<void>(),
                            grad_codebook.data<void>(),
                            starts.data(),
                            members.data()};
  if (needs_features)
    parallel_for(0, rows, kCodesPerTask,
                 [&](int64_t row, int64_t end) { kernels.vq_grad_features(backward, row, end); });
  if (needs_codebook)
    parallel_for(0, codes, kCodesPerTask,
                 [&](int64_t code, int64_t end) { kernels.vq_grad_codebook(backward, code, end); });
  return {std::move(grad_features), std::move(grad_codebook)};
}

// The generator by itself, for tests: words int64 [4, 16] of 16 counters from `counter`, and their noise.
std::tuple<Tensor, Tensor> noise_words(int64_t seed, int64_t row, int64_t stream, int64_t counter) {
  Tensor wide = empty({4, 16}, DType::int64), noise = empty({4, 16}, DType::float32);
  uint32_t words[4][16];
  kernels_for(noise).noise_words(uint64_t(seed), uint64_t(row), uint32_t(stream), uint32_t(counter), words,
                                 (float (*)[16])noise.data<float>());
  std::copy(&words[0][0], &words[0][0] + 64, wide.data<int64_t>());
  return {std::move(wide), std::move(noise)};
}

const Operators defined(
    "CPU",
    {{"gumbel_forward(Tensor logits, Tensor codebook, Tensor temperature, bool hard, bool noise, Tensor seed)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
      boxed<&gumbel_forward>},
     {"gumbel_backward(Tensor? grad_latents, Tensor? grad_kl, Tensor logits, Tensor codebook, Tensor temperature,"
      " bool hard, bool noise, Tensor seed, Tensor latents, Tensor indices, Tensor kl, Tensor maximum,"
      " Tensor log_noisy, Tensor log_clean, Tensor mixture, bool needs_codebook) -> (Tensor, Tensor)",
      boxed<&gumbel_backward>},
     {"vq_forward(Tensor features, Tensor codebook) -> (Tensor, Tensor)", boxed<&vq_forward>},
     {"vq_backward(Tensor grad_squared_distance, Tensor features, Tensor codebook, Tensor indices, bool needs_features,"
      " bool needs_codebook) -> (Tensor, Tensor)",
      boxed<&vq_backward>}});
// Without a tensor there is no device to go by.
const Operators anywhere("CompositeExplicitAutograd",
                         {{"noise_words(int seed, int row, int stream, int counter) -> (Tensor, Tensor)",
                           boxed<&noise_words>}});

}  // namespace
}  // namespace dalle
