// The codebook's CPU operations as torch sees them: outputs, workspaces, threads. The arithmetic is in gumbel.h,
// projection.h and vq.h; arguments were checked by the op.py of its room. Results do not depend on the number of
// threads: tasks are cut by shapes alone, and whatever several rows add to has one writer.

#include <algorithm>
#include <cmath>
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

Gumbel gumbel_problem(const Tensor& logits, const Tensor& codebook, double temperature, bool noise, int64_t seed,
                      int64_t row_offset, int64_t counter_offset) {
  require(logits.dim() == 2 && has_rows(logits) && codebook.dim() == 2 && codebook.is_contiguous() &&
              logits.size(1) == codebook.size(0) && logits.dtype() == codebook.dtype(),
          "gumbel: wanted logits [N, K] with contiguous rows and a contiguous codebook [K, D] of their dtype");
  return {{codebook.data<const void>(), logits.size(0), logits.size(1), codebook.size(1), float(temperature), noise,
           uint64_t(seed), uint64_t(row_offset), uint32_t(counter_offset)},
          logits.data<const void>(),
          logits.stride(0)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gumbel_forward(
    const Tensor& logits, const Tensor& codebook, double temperature, bool hard, bool noise, int64_t seed,
    int64_t row_offset, int64_t counter_offset) {
  const Gumbel problem = gumbel_problem(logits, codebook, temperature, noise, seed, row_offset, counter_offset);
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

constexpr int64_t kCodesPerTask = 64, kRowsPerTask = 16;

// Each row of grad_latents to the code that it chose; what else grad_codebook holds is overwritten unless `add`.
void add_chosen(const CodebookKernels& kernels, const Tensor& grad_latents, const Tensor& indices, int64_t codes,
                int64_t width, const Tensor& grad_codebook, bool add = false) {
  const auto [starts, members] = members_of_codes(indices.data<const int64_t>(), indices.numel(), codes);
  const VqBackward scatter{.rows = indices.numel(),
                           .codes = codes,
                           .width = width,
                           .k = 1,
                           .grad_codebook = grad_codebook.data<void>(),
                           .starts = starts.data(),
                           .members = members.data(),
                           .add = add};
  parallel_for(0, codes, kCodesPerTask, [&](int64_t code, int64_t end) {
    kernels.scatter_rows(grad_latents.data<const void>(), scatter, code, end);
  });
}

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
                                           const Tensor& codebook, double temperature, bool hard, bool noise,
                                           int64_t seed, int64_t row_offset, const Tensor& latents,
                                           const Tensor& indices, const Tensor& kl, const Tensor& maximum,
                                           const Tensor& log_noisy, const Tensor& log_clean, const Tensor& mixture,
                                           int64_t counter_offset, bool needs_logits, bool needs_codebook) {
  const CodebookKernels& kernels = kernels_for(logits);
  const bool has_latents = pointer<const void>(grad_latents) != nullptr;
  // Without a gradient of the latents nothing asks for the noise, and codes can be walked in their own order.
  const Gumbel problem =
      gumbel_problem(logits, codebook, temperature, noise && has_latents, seed, row_offset, counter_offset);
  const int64_t columns = padded(problem.width), rows = problem.rows;
  Tensor grad_logits = needs_logits ? new_tensor({rows, problem.codes}, logits.dtype()) : empty({0}, logits.dtype());
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
  backward.grad_logits = needs_logits ? grad_logits.data<void>() : nullptr;
  backward.grad_codebook = through_mixture ? grad_codebook.data<void>() : nullptr;
  // A small codebook has few tiles: the rows are shared out as well, into parts of at least 256.
  backward.splits =
      std::clamp<int64_t>((64 + problem.tiles() - 1) / problem.tiles(), 1, std::max<int64_t>(rows / 256, 1));

  Tensor by_rows, packed, delta, partial;
  if (has_latents && (needs_logits || through_mixture)) {
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
  if (needs_logits || through_mixture)
    parallel_for(0, problem.tiles() * backward.splits, 1, [&](int64_t task, int64_t end) {
      kernels.gumbel_backward(backward, task, end, thread_scratch(backward.scratch()));
    });
  if (backward.partial != nullptr)
    parallel_for(0, problem.codes, kCodesPerTask,
                 [&](int64_t code, int64_t end) { kernels.gumbel_collect(backward, code, end); });
  if (has_latents && hard && needs_codebook)
    add_chosen(kernels, *grad_latents, indices, problem.codes, problem.width, grad_codebook);
  return {std::move(grad_logits), std::move(grad_codebook)};
}

Projection projection_problem(const Tensor& features, const Tensor& weight, const std::optional<Tensor>& bias,
                              const Tensor& codebook, double temperature, bool noise, int64_t seed, int64_t row_offset,
                              int64_t counter_offset) {
  require(features.dim() == 2 && has_rows(features) && weight.dim() == 2 && weight.is_contiguous() &&
              codebook.dim() == 2 && codebook.is_contiguous() && features.size(1) == weight.size(1) &&
              weight.size(0) == codebook.size(0) && features.dtype() == weight.dtype() &&
              features.dtype() == codebook.dtype(),
          "projection: wanted features [N, C] with contiguous rows, contiguous weight [K, C] and codebook [K, D], one "
          "dtype");
  require(!bias.has_value() ||
              (bias->is_contiguous() && bias->numel() == weight.size(0) && bias->dtype() == features.dtype()),
          "projection: wanted a contiguous bias [K] of the features' dtype");
  return {{codebook.data<const void>(), features.size(0), weight.size(0), codebook.size(1), float(temperature), noise,
           uint64_t(seed), uint64_t(row_offset), uint32_t(counter_offset)},
          features.data<const void>(),
          weight.data<const void>(),
          bias.has_value() ? bias->data<const void>() : nullptr,
          features.size(1),
          features.stride(0),
          0,
          0,
          nullptr};
}

// A strip's rows of a table in both forms: see Spread.
struct Spreading {
  Tensor by_rows, packed;

  Spreading(int64_t strip, int64_t width, bool pack)
      : by_rows(new_tensor({strip, padded(width)}, DType::int32)),
        packed(pack ? new_tensor({round_up(strip, 2), padded(width)}, DType::int32) : empty({0}, DType::int32)) {}

  void operator()(const CodebookKernels& kernels, const void* table, int64_t element_size, int64_t begin, int64_t end,
                  int64_t width, int64_t stride) const {
    const Spread rows{static_cast<const char*>(table) + begin * stride * element_size,
                      end - begin,
                      width,
                      stride,
                      by_rows.data<uint32_t>(),
                      packed.numel() > 0 ? packed.data<uint32_t>() : nullptr};
    parallel_for(0, round_up(end - begin, kRowTile) / kRowTile, 1,
                 [&](int64_t tile, int64_t last) { kernels.spread(rows, tile, last); });
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> projection_forward(
    const Tensor& features, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& codebook,
    double temperature, bool hard, bool noise, int64_t seed, int64_t row_offset, int64_t counter_offset,
    bool distribution) {
  const CodebookKernels& kernels = kernels_for(features);
  ProjectionForward forward{
      projection_problem(features, weight, bias, codebook, temperature, noise, seed, row_offset, counter_offset)};
  const int64_t rows = forward.rows, codes = forward.codes;
  const int64_t strip = std::min(rows, distribution ? Projection::rows_with_tables(codes) : Projection::kMostRows);
  Tensor latents = new_tensor({rows, forward.width}, features.dtype());
  Tensor indices = empty({rows}, DType::int64);
  Tensor kl = empty({rows}, DType::float32), maximum = empty({rows}, DType::float32);
  Tensor log_noisy = empty({rows}, DType::float32), log_clean = empty({rows}, DType::float32);
  Tensor mean = empty({distribution ? codes : 0}, DType::float32);
  if (distribution && rows == 0) std::fill_n(mean.data<float>(), codes, NAN);
  const Spreading spreading(strip, forward.channels, false);
  const Tensor states = empty({forward.splits() * strip * int64_t(sizeof(RowTotal)) / 8}, DType::int64);
  const Tensor sums =
      hard ? empty({0}, DType::float32) : new_tensor({forward.splits(), strip, padded(forward.width)}, DType::float32);
  const Tensor logits =
      distribution ? new_tensor({forward.table_size(strip)}, DType::float32) : empty({0}, DType::float32);
  forward.latents = latents.data<void>();
  forward.hard = hard;
  forward.indices = indices.data<int64_t>();
  forward.kl = kl.data<float>(), forward.maximum = maximum.data<float>();
  forward.log_noisy = log_noisy.data<float>(), forward.log_clean = log_clean.data<float>();
  forward.feature_rows = spreading.by_rows.data<uint32_t>();
  forward.states = reinterpret_cast<RowTotal*>(states.data<int64_t>());
  forward.sums = hard ? nullptr : sums.data<float>();
  forward.distribution = distribution ? mean.data<float>() : nullptr;
  forward.logits = distribution ? logits.data<float>() : nullptr;
  for (int64_t begin = 0; begin < rows; begin += strip) {
    forward.begin = begin, forward.end = std::min(rows, begin + strip);
    spreading(kernels, forward.features, features.element_size(), begin, forward.end, forward.channels,
              forward.features_stride);
    parallel_for(0, forward.splits(), 1, [&](int64_t split, int64_t end) {
      kernels.projection_scores(forward, split, end, thread_scratch(forward.scratch()));
    });
    parallel_for(0, forward.strip(), kRowsPerTask,
                 [&](int64_t row, int64_t end) { kernels.projection_finish(forward, row, end); });
    if (distribution)
      parallel_for(0, forward.tiles(), 1,
                   [&](int64_t tile, int64_t end) { kernels.projection_distribution(forward, tile, end); });
  }
  return {std::move(latents),   std::move(indices),   std::move(kl),  std::move(maximum),
          std::move(log_noisy), std::move(log_clean), std::move(mean)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> projection_backward(
    const std::optional<Tensor>& grad_latents, const std::optional<Tensor>& grad_kl,
    const std::optional<Tensor>& grad_distribution, const Tensor& features, const Tensor& weight,
    const std::optional<Tensor>& bias, const Tensor& codebook, double temperature, bool hard, bool noise, int64_t seed,
    int64_t row_offset, int64_t counter_offset, const Tensor& indices, const Tensor& kl, const Tensor& maximum,
    const Tensor& log_noisy, const Tensor& log_clean, const std::optional<Tensor>& delta, bool tied,
    bool needs_features, bool needs_weight, bool needs_bias, bool needs_codebook) {
  require(!tied || !needs_codebook, "projection: a tied codebook has no gradient of its own");
  const CodebookKernels& kernels = kernels_for(features);
  const bool through_logits = needs_features || needs_weight || needs_bias;
  const bool has_latents = pointer<const void>(grad_latents) != nullptr;
  const bool takes_codebook = tied ? needs_weight : needs_codebook;  // a tied codebook's gradient is the weight's
  const bool through_mixture = has_latents && takes_codebook && !hard;
  const bool walks_latents = has_latents && (through_logits || through_mixture);
  // Without a gradient of the latents nothing asks for the noise, and codes can be walked in their own order.
  ProjectionBackward backward{projection_problem(features, weight, bias, codebook, temperature, noise && walks_latents,
                                                 seed, row_offset, counter_offset)};
  const int64_t rows = backward.rows, codes = backward.codes, channels = backward.channels, width = backward.width;
  const DType dtype = features.dtype();
  const auto gradient = [&](bool needed, const std::vector<int64_t>& sizes) {
    return needed ? new_tensor(sizes, dtype) : empty({0}, dtype);
  };
  Tensor grad_features = gradient(needs_features, {rows, channels}),
         grad_weight = gradient(needs_weight, {codes, channels});
  Tensor grad_bias = gradient(needs_bias, {codes}), grad_codebook = gradient(needs_codebook, {codes, width});
  const auto clear = [](const Tensor& tensor) {
    std::memset(tensor.data<void>(), 0, size_t(tensor.numel() * tensor.element_size()));
  };
  backward.grad_latents = walks_latents ? pointer<const void>(grad_latents) : nullptr;
  backward.grad_kl = through_logits ? pointer<const float>(grad_kl) : nullptr;
  backward.grad_distribution = through_logits ? pointer<const float>(grad_distribution) : nullptr;
  const bool of_distribution = backward.grad_distribution != nullptr;
  const bool walks = rows > 0 && (walks_latents || backward.grad_kl != nullptr || of_distribution);
  if (!walks) clear(grad_features), clear(grad_weight), clear(grad_bias);
  if (needs_codebook && !(walks && through_mixture)) clear(grad_codebook);
  if (walks) {
    backward.kl = kl.data<const float>(), backward.maximum = maximum.data<const float>();
    backward.log_noisy = log_noisy.data<const float>(), backward.log_clean = log_clean.data<const float>();
    backward.delta = walks_latents ? pointer<const float>(delta) : nullptr;
    const auto result = [](bool needed, const Tensor& tensor) { return needed ? tensor.data<void>() : nullptr; };
    backward.grad_features = result(needs_features, grad_features);
    backward.grad_weight = result(needs_weight, grad_weight);
    backward.grad_bias = result(needs_bias, grad_bias);
    backward.grad_codebook = result(through_mixture, tied ? grad_weight : grad_codebook);

    const int64_t strip = std::min(rows, Projection::rows_with_tables(codes));
    std::vector<Tensor> workspaces;
    const auto workspace = [&](bool needed, int64_t size) -> float* {
      return needed ? workspaces.emplace_back(new_tensor({size}, DType::float32)).data<float>() : nullptr;
    };
    // Where weights and those of the logits are the same numbers, one table serves both.
    const bool alike = !backward.noise && backward.temperature == 1;
    const int64_t table = backward.table_size(strip);
    backward.terms = workspace(through_logits, table);
    backward.weights = workspace(walks_latents || of_distribution, table);
    backward.others = workspace(walks_latents && of_distribution && !alike, table);
    const int64_t totals = backward.tiles() * strip;
    backward.totals = workspace(through_logits && backward.weights != nullptr, totals);
    backward.other_totals = workspace(backward.others != nullptr, totals);
    backward.partial = workspace(needs_features, backward.splits() * strip * padded(channels));
    const bool keep = strip < rows && dtype != DType::float32;
    backward.wide_weight = workspace(needs_weight && keep, codes * padded(channels));
    backward.wide_codebook = workspace(through_mixture && !tied && keep, codes * padded(width));
    backward.wide_bias = workspace(needs_bias, codes);
    const Spreading of_features(strip, channels, needs_weight);
    const Spreading of_grad(walks_latents ? strip : 0, width, through_mixture);
    backward.feature_rows = of_features.by_rows.data<uint32_t>();
    backward.feature_columns = of_features.packed.data<uint32_t>();
    backward.grad_rows = of_grad.by_rows.data<uint32_t>();
    backward.grad_columns = of_grad.packed.data<uint32_t>();
    for (int64_t begin = 0; begin < rows; begin += strip) {
      backward.begin = begin, backward.end = std::min(rows, begin + strip);
      of_features(kernels, backward.features, features.element_size(), begin, backward.end, channels,
                  backward.features_stride);
      if (walks_latents)
        of_grad(kernels, backward.grad_latents, features.element_size(), begin, backward.end, width, width);
      parallel_for(0, backward.tiles(), 1, [&](int64_t tile, int64_t end) {
        kernels.projection_tables(backward, tile, end, thread_scratch(backward.scratch()));
      });
      parallel_for(0, backward.splits(), 1, [&](int64_t split, int64_t end) {
        kernels.projection_gradients(backward, split, end, thread_scratch(backward.scratch()));
      });
      if (needs_features)
        parallel_for(0, backward.strip(), kRowsPerTask,
                     [&](int64_t row, int64_t end) { kernels.projection_collect(backward, row, end); });
    }
  }
  if (has_latents && hard && takes_codebook)
    add_chosen(kernels, *grad_latents, indices, codes, width, tied ? grad_weight : grad_codebook, tied);
  return {std::move(grad_features), std::move(grad_weight), std::move(grad_bias), std::move(grad_codebook)};
}

int64_t head_bytes(const Tensor& tensor, int64_t head, int64_t size) { return head * size * tensor.element_size(); }

std::tuple<Tensor, Tensor, Tensor> vq_forward(const Tensor& features, const Tensor& codebook, int64_t metric, int64_t k,
                                              std::optional<double> temperature, int64_t seed, int64_t row_offset) {
  require(features.dim() == 3 && codebook.dim() == 3 && codebook.is_contiguous() &&
              features.size(0) == codebook.size(0) && features.size(2) == codebook.size(2) &&
              features.dtype() == codebook.dtype(),
          "vq: wanted features [H, N, D] and a contiguous codebook [H, K, D] of their dtype");
  require(1 <= k && k <= kMostNearest && k <= codebook.size(1), "k: got ", k, ", wanted 1 .. 8 and at most K");
  require(0 <= metric && metric <= int64_t(VqMetric::cosine), "metric: got ", metric, ", wanted 0 .. 3");
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
              float(temperature.value_or(0)),
              uint64_t(seed),
              uint64_t(row_offset),
              kVqStream + uint32_t(head) * kHeadStep,
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
    {{"gumbel_forward(Tensor logits, Tensor codebook, float temperature, bool hard, bool noise, int seed, int "
      "row_offset, int counter_offset)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
      boxed<&gumbel_forward>},
     {"gumbel_backward(Tensor? grad_latents, Tensor? grad_kl, Tensor logits, Tensor codebook, float temperature,"
      " bool hard, bool noise, int seed, int row_offset, Tensor latents, Tensor indices, Tensor kl, Tensor maximum,"
      " Tensor log_noisy, Tensor log_clean, Tensor mixture, int counter_offset, bool needs_logits, bool needs_codebook)"
      " -> (Tensor, Tensor)",
      boxed<&gumbel_backward>},
     {"projection_forward(Tensor features, Tensor weight, Tensor? bias, Tensor codebook, float temperature, bool hard,"
      " bool noise, int seed, int row_offset, int counter_offset, bool distribution) -> (Tensor, Tensor, Tensor, "
      "Tensor, Tensor, Tensor, "
      "Tensor)",
      boxed<&projection_forward>},
     {"projection_backward(Tensor? grad_latents, Tensor? grad_kl, Tensor? grad_distribution, Tensor features,"
      " Tensor weight, Tensor? bias, Tensor codebook, float temperature, bool hard, bool noise, int seed, int "
      "row_offset, int counter_offset,"
      " Tensor indices, Tensor kl, Tensor maximum, Tensor log_noisy, Tensor log_clean, Tensor? delta, bool tied, bool "
      "needs_features,"
      " bool needs_weight, bool needs_bias, bool needs_codebook) -> (Tensor, Tensor, Tensor, Tensor)",
      boxed<&projection_backward>},
     {"vq_forward(Tensor features, Tensor codebook, int metric, int k, float? temperature, int seed, int row_offset)"
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
