// The codebook's CPU operations as torch sees them: outputs, workspaces, threads. The arithmetic is in gumbel.h and
// vq.h; arguments were checked by the op.py of its room. Results do not depend on the number of threads: tasks
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

// The rows of each code, in ascending order: a counting sort. Rows of index -1 have none.
std::pair<std::vector<int64_t>, std::vector<int64_t>> members_of_codes(const int64_t* index, int64_t rows,
                                                                       int64_t codes) {
  std::vector<int64_t> starts(size_t(codes) + 1), members(static_cast<size_t>(rows));
  for (int64_t n = 0; n < rows; n++) {
    if (index[n] == -1) continue;
    require(0 <= index[n] && index[n] < codes, "indices: row ", n, " holds ", index[n], ", wanted 0 .. ", codes - 1);
    starts[size_t(index[n]) + 1]++;
  }
  for (int64_t k = 0; k < codes; k++) starts[size_t(k) + 1] += starts[size_t(k)];
  std::vector<int64_t> next(starts.begin(), starts.end() - 1);
  for (int64_t n = 0; n < rows; n++)
    if (index[n] != -1) members[size_t(next[size_t(index[n])]++)] = n;
  return {std::move(starts), std::move(members)};
}

constexpr int64_t kCodesPerTask = 64;

// body(head, first, last) over ranges of the `size` items of every head.
template <class Body>
void over_heads(int64_t heads, int64_t size, int64_t grain, const Body& body) {
  parallel_for(0, heads * size, grain, [&](int64_t item, int64_t end) {
    while (item < end) {
      const int64_t head = item / size, last = std::min(end, (head + 1) * size);
      body(head, item - head * size, last - head * size);
      item = last;
    }
  });
}

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
    const auto [starts, members] = members_of_codes(indices.data<const int64_t>(), rows, problem.codes);
    const VqBackward scatter{.rows = rows,
                             .codes = problem.codes,
                             .width = problem.width,
                             .k = 1,
                             .grad_codebook = grad_codebook.data<void>(),
                             .starts = starts.data(),
                             .members = members.data()};
    parallel_for(0, problem.codes, kCodesPerTask, [&](int64_t code, int64_t end) {
      kernels.scatter_rows(grad_latents->data<const void>(), scatter, code, end);
    });
  }
  return {std::move(grad_logits), std::move(grad_codebook)};
}

int64_t head_bytes(const Tensor& tensor, int64_t head, int64_t size) { return head * size * tensor.element_size(); }

std::tuple<Tensor, Tensor, Tensor> vq_forward(const Tensor& features, const Tensor& codebook, int64_t metric, int64_t k,
                                              const std::optional<Tensor>& temperature,
                                              const std::optional<Tensor>& seed) {
  require(features.dim() == 3 && codebook.dim() == 3 && codebook.is_contiguous() &&
              features.size(0) == codebook.size(0) && features.size(2) == codebook.size(2) &&
              features.dtype() == codebook.dtype(),
          "vq: wanted features [H, N, D] and a contiguous codebook [H, K, D] of their dtype");
  require(1 <= k && k <= kMostNearest && k <= codebook.size(1), "k: got ", k, ", wanted 1 .. 8 and at most K");
  require(0 <= metric && metric <= int64_t(VqMetric::cosine), "metric: got ", metric, ", wanted 0 .. 3");
  require(temperature.has_value() == seed.has_value(), "temperature, seed: wanted both or neither");
  const CodebookKernels& kernels = kernels_for(features);
  const int64_t heads = features.size(0), rows = features.size(1), codes = codebook.size(1), width = codebook.size(2);
  const Tensor dense = contiguous(features);
  Tensor nearest = new_tensor({heads, rows, k, width}, features.dtype());
  Tensor squared_distance = empty({heads, rows, k}, DType::float32), indices = empty({heads, rows, k}, DType::int64);
  const Tensor norms = empty({heads, codes}, DType::float32);
  const auto problem = [&](int64_t head) {
    return Vq{dense.data<const char>() + head_bytes(dense, head, rows * width),
              codebook.data<const char>() + head_bytes(codebook, head, codes * width),
              rows,
              codes,
              width,
              VqMetric(metric),
              k,
              temperature.has_value() ? *temperature->data<const float>() : 0.f,
              seed.has_value() ? uint64_t(*seed->data<const int64_t>()) : 0,
              head * rows,
              nearest.data<char>() + head_bytes(nearest, head, rows * k * width),
              indices.data<int64_t>() + head * rows * k,
              squared_distance.data<float>() + head * rows * k,
              norms.data<float>() + head * codes};
  };
  if (VqMetric(metric) != VqMetric::dot)
    over_heads(heads, codes, kCodesPerTask,
               [&](int64_t head, int64_t code, int64_t end) { kernels.vq_norms(problem(head), code, end); });
  over_heads(heads, rows, kRowTile, [&](int64_t head, int64_t row, int64_t end) {
    const Vq its = problem(head);
    kernels.vq_forward(its, row, end, thread_scratch(its.scratch()));
  });
  return {std::move(nearest), std::move(squared_distance), std::move(indices)};
}

std::tuple<Tensor, Tensor> vq_backward(const Tensor& grad, const Tensor& features, const Tensor& nearest,
                                       const Tensor& indices, int64_t codes, bool needs_features, bool needs_codebook) {
  require(features.dim() == 3 && indices.dim() == 3, "vq: wanted features [H, N, D] and indices [H, N, k]");
  const int64_t heads = features.size(0), rows = features.size(1), width = features.size(2), k = indices.size(2);
  require(nearest.is_contiguous() && indices.is_contiguous() && indices.dtype() == DType::int64 &&
              grad.is_contiguous() && indices.numel() == heads * rows * k && grad.numel() == heads * rows * k &&
              nearest.numel() == heads * rows * k * width,
          "vq: wanted contiguous grad and indices [H, N, k], and nearest [H, N, k, D]");
  const CodebookKernels& kernels = kernels_for(features);
  const Tensor dense = contiguous(features);
  Tensor grad_features = needs_features ? new_tensor_like(dense) : empty({0}, features.dtype());
  Tensor grad_codebook =
      needs_codebook ? new_tensor({heads, codes, width}, features.dtype()) : empty({0}, features.dtype());
  const auto problem = [&](int64_t head) {
    return VqBackward{
        .grad = grad.data<const float>() + head * rows * k,
        .features = dense.data<const char>() + head_bytes(dense, head, rows * width),
        .nearest = nearest.data<const char>() + head_bytes(nearest, head, rows * k * width),
        .rows = rows,
        .codes = codes,
        .width = width,
        .k = k,
        .grad_features = needs_features ? grad_features.data<char>() + head_bytes(dense, head, rows * width) : nullptr,
        .grad_codebook = needs_codebook ? grad_codebook.data<char>() + head_bytes(dense, head, codes * width) : nullptr,
        .starts = nullptr,
        .members = nullptr};
  };
  if (needs_features)
    over_heads(heads, rows, kCodesPerTask,
               [&](int64_t head, int64_t row, int64_t end) { kernels.vq_grad_features(problem(head), row, end); });
  for (int64_t head = 0; needs_codebook && head < heads; head++) {
    const auto [starts, members] = members_of_codes(indices.data<const int64_t>() + head * rows * k, rows * k, codes);
    VqBackward its = problem(head);
    its.starts = starts.data(), its.members = members.data();
    parallel_for(0, codes, kCodesPerTask, [&](int64_t code, int64_t end) { kernels.vq_grad_codebook(its, code, end); });
  }
  return {std::move(grad_features), std::move(grad_codebook)};
}

std::tuple<Tensor, Tensor> code_statistics(const Tensor& features, const Tensor& indices, int64_t codes) {
  require(features.dim() == 3 && indices.is_contiguous() && indices.dtype() == DType::int64 &&
              indices.numel() == features.size(0) * features.size(1),
          "code_statistics: wanted features [H, N, D] and contiguous int64 indices [H, N]");
  const CodebookKernels& kernels = kernels_for(features);
  const int64_t heads = features.size(0), rows = features.size(1), width = features.size(2);
  const Tensor dense = contiguous(features);
  Tensor counts = empty({heads, codes}, DType::float32), sums = new_tensor({heads, codes, width}, DType::float32);
  for (int64_t head = 0; head < heads; head++) {
    const auto [starts, members] = members_of_codes(indices.data<const int64_t>() + head * rows, rows, codes);
    float* count = counts.data<float>() + head * codes;
    for (int64_t code = 0; code < codes; code++) count[code] = float(starts[size_t(code) + 1] - starts[size_t(code)]);
    const VqBackward its{.grad = nullptr,
                         .features = dense.data<const char>() + head_bytes(dense, head, rows * width),
                         .nearest = nullptr,
                         .rows = rows,
                         .codes = codes,
                         .width = width,
                         .k = 1,
                         .grad_features = nullptr,
                         .grad_codebook = sums.data<float>() + head * codes * width,
                         .starts = starts.data(),
                         .members = members.data()};
    parallel_for(0, codes, kCodesPerTask, [&](int64_t code, int64_t end) { kernels.sum_rows(its, code, end); });
  }
  return {std::move(counts), std::move(sums)};
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
     {"vq_forward(Tensor features, Tensor codebook, int metric, int k, Tensor? temperature, Tensor? seed)"
      " -> (Tensor, Tensor, Tensor)",
      boxed<&vq_forward>},
     {"vq_backward(Tensor grad_squared_distance, Tensor features, Tensor nearest, Tensor indices, int codes,"
      " bool needs_features, bool needs_codebook) -> (Tensor, Tensor)",
      boxed<&vq_backward>},
     {"code_statistics(Tensor features, Tensor indices, int codes) -> (Tensor, Tensor)", boxed<&code_statistics>}});
// Without a tensor there is no device to go by.
const Operators anywhere("CompositeExplicitAutograd",
                         {{"noise_words(int seed, int row, int stream, int counter) -> (Tensor, Tensor)",
                           boxed<&noise_words>}});

}  // namespace
}  // namespace dalle
