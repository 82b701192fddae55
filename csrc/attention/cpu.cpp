// sparse_attention on tensors and torch's threads: what the Python side calls as torch.ops.dalle_kernels_cpu.
//
// Work is cut into pieces that depend on the problem alone, never on the number of threads, and every piece writes its
// own part of the results: the bits are the same for any number of threads.
#include <algorithm>
#include <cstring>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "attention/kernels.h"
#include "attention/threads.h"
#include "isa.h"
#include "memory.h"
#include "operators.h"
#include "tensor.h"

namespace dalle::attention {
namespace {

const Kernels& kernels_for(DType dtype) {
  if (dtype == DType::float32) return attention_kernels().f32;
  require(dtype == DType::bfloat16, "q: got dtype ", dtype, ", wanted float32 or bfloat16");
  return attention_kernels().bf16;
}

ListStorage lists_of(const Tensor& offsets, const Tensor& others, const Tensor& ids, const Tensor& full_counts,
                     const Tensor& masks, int64_t length, int64_t walked) {
  for (const Tensor* tensor : {&offsets, &others, &ids, &full_counts, &masks})
    require(tensor->dtype() == DType::int32 && tensor->is_contiguous(), "schedule: wanted contiguous int32");
  require(masks.size(1) == kTile && masks.size(2) == kTile / 32, "schedule: wanted tiles of 64 x 64");
  return build_lists({offsets.data<const int32_t>(), others.data<const int32_t>(), ids.data<const int32_t>(),
                      full_counts.data<const int32_t>(), masks.data<const int32_t>()},
                     int32_t(length), int32_t(walked));
}

// A plan as one int32 tensor: how many words each of the ten arrays has, then the arrays: order and query_order, then
// full_offsets, full_tiles, pair_offsets and pairs by query, then the same by key.
constexpr size_t kArrays = 10;

Tensor attention_plan(const Tensor& order, const Tensor& query_order, const Tensor& key_offsets,
                      const Tensor& key_tiles, const Tensor& mask_ids, const Tensor& full_counts,
                      const Tensor& query_offsets, const Tensor& query_tiles, const Tensor& query_mask_ids,
                      const Tensor& query_full_counts, const Tensor& masks, const Tensor& masks_transposed) {
  for (const Tensor* tensor : {&order, &query_order})
    require(tensor->dtype() == DType::int32 && tensor->is_contiguous(), "schedule: wanted contiguous int32");
  const int64_t length = order.numel(), queries = query_order.numel();
  const ListStorage sides[] = {
      lists_of(key_offsets, key_tiles, mask_ids, full_counts, masks_transposed, queries, length),
      lists_of(query_offsets, query_tiles, query_mask_ids, query_full_counts, masks, length, queries)};
  std::vector<int32_t> words(kArrays);
  size_t array = 0;
  const auto append = [&](const void* data, size_t count) {
    words[array++] = int32_t(count);
    words.resize(words.size() + count);
    if (count) std::memcpy(words.data() + words.size() - count, data, count * sizeof(int32_t));
  };
  append(order.data<const int32_t>(), size_t(length));
  append(query_order.data<const int32_t>(), size_t(queries));
  for (const ListStorage& lists : sides) {
    append(lists.full_offsets.data(), lists.full_offsets.size());
    append(lists.full_tiles.data(), lists.full_tiles.size());
    append(lists.pair_offsets.data(), lists.pair_offsets.size());
    append(lists.pairs.data(), lists.pairs.size() * sizeof(Pair) / sizeof(int32_t));
  }
  Tensor plan = empty({int64_t(words.size())}, DType::int32);
  std::memcpy(plan.data<int32_t>(), words.data(), words.size() * sizeof(int32_t));
  return plan;
}

Plan view(const Tensor& plan) {
  const int64_t words = plan.numel();
  require(plan.dtype() == DType::int32 && plan.is_contiguous() && words >= int64_t(kArrays),
          "plan: wanted what attention_plan gives");
  const int32_t *counts = plan.data<const int32_t>(), *arrays[kArrays], *next = counts + kArrays;
  for (size_t i = 0; i < kArrays; i++) {
    arrays[i] = next;
    next += counts[i];
  }
  require(next == counts + words, "plan: wanted what attention_plan gives");
  const auto lists = [&](int i) { return Lists{arrays[i], arrays[i + 1], arrays[i + 2], (const Pair*)arrays[i + 3]}; };
  return {counts[0], counts[6] - 1, arrays[0], counts[1], counts[2] - 1, arrays[1], lists(2), lists(6)};
}

bool queries_in_order(const Plan& plan) {
  for (int32_t p = 0; p < plan.query_length; p++)
    if (plan.query_order[p] != p) return false;
  return true;
}

// A tensor whose rows can be read: unit stride along D.
Tensor with_rows(const Tensor& tensor) { return tensor.stride(-1) == 1 ? tensor : contiguous(tensor); }

// Kernels read some arrays and write others through the same type.
Array array_of(const Tensor& tensor) {
  return {const_cast<void*>(tensor.data<const void>()), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

void check(const Tensor& q, const Tensor& k, const Plan& plan, std::initializer_list<const Tensor*> like_q,
           std::initializer_list<const Tensor*> like_k) {
  require(q.dim() == 4, "q: got ", q.dim(), " dimensions, wanted [B, H, S, D]");
  require(q.size(2) == plan.query_length, "q: got ", q.size(2), " tokens, wanted the ", int64_t(plan.query_length),
          " of the plan");
  require(k.dim() == 4 && k.size(0) == q.size(0) && k.size(1) == q.size(1) && k.size(2) == plan.length &&
              k.size(3) == q.size(3) && k.dtype() == q.dtype(),
          "k: got shape ", shape_of(k), " and dtype ", k.dtype(), ", wanted ", int64_t(plan.length),
          " tokens of the plan, else as q: ", shape_of(q), ", ", q.dtype());
  require(q.size(3) % 8 == 0 && q.size(3) > 0, "q: got D = ", q.size(3), ", wanted a multiple of 8");
  const auto alike = [](const Tensor& other, const Tensor& tensor) {
    require(other.same_shape(tensor) && other.dtype() == tensor.dtype(), "got shape ", shape_of(other), " and dtype ",
            other.dtype(), ", wanted ", shape_of(tensor), ", ", tensor.dtype());
  };
  for (const Tensor* other : like_q) alike(*other, q);
  for (const Tensor* other : like_k) alike(*other, k);
}

// Of a problem: how steeply a soft cap's tanh rises, a number that float32 holds.
float steepness(double scale, std::optional<double> softcap) {
  constexpr double kMost = std::numeric_limits<float>::max();
  return softcap ? float(std::clamp(scale / *softcap, -kMost, kMost)) : 0.f;
}

struct Padding {
  Tensor tensor;
  const uint8_t* data = nullptr;

  Padding(const std::optional<Tensor>& mask, const Tensor& k) {
    if (!mask) return;
    require(
        mask->dtype() == DType::boolean && mask->dim() == 2 && mask->size(0) == k.size(0) && mask->size(1) == k.size(2),
        "key_padding_mask: wanted bool [B, S]");
    tensor = contiguous(*mask);
    data = tensor.data<const uint8_t>();
  }
};

Problem problem_of(const Plan& plan, const Tensor& q, double scale, std::optional<double> softcap,
                   const Padding& padding, bool scattered) {
  return {&plan,
          q.size(0),
          q.size(1),
          q.size(3),
          float(scale),
          float(softcap.value_or(0)),
          steepness(scale, softcap),
          padding.data,
          scattered};
}

std::tuple<Tensor, Tensor> attention_forward(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in,
                                             const std::optional<Tensor>& key_padding_mask, double scale,
                                             std::optional<double> softcap, const Tensor& plan_words) {
  const Plan plan = view(plan_words);
  check(q_in, k_in, plan, {}, {&v_in});
  const Tensor q = with_rows(q_in), k = with_rows(k_in), v = with_rows(v_in);
  Tensor out = new_rows_like(q_in);
  Tensor lse = empty({q.size(0), q.size(1), q.size(2)}, DType::float32);
  if (q.numel() == 0) return {std::move(out), std::move(lse)};
  const Padding padding(key_padding_mask, k);
  const bool scattered = k.stride(2) != k.size(3) || v.stride(2) != v.size(3);
  const Problem problem = problem_of(plan, q, scale, softcap, padding, scattered);
  const ForwardArrays arrays{array_of(q), array_of(k), array_of(v), array_of(out), lse.data<float>()};
  const Kernels& kernels = kernels_for(q.dtype());

  // Pieces of a head: about an eighth of its work, whole tiles.
  constexpr int kPieces = 8;
  const std::vector<int32_t> cuts =
      even_cuts(plan.query_tiles, kPieces, [&](int32_t t) { return tile_cost(plan.by_query, t); });
  const int64_t floats = kernels.forward_floats(problem);
  share_out(problem.batch * problem.heads * kPieces, floats, [&](int64_t piece, Scratch& scratch) {
    const int64_t part = piece % kPieces;
    kernels.forward(problem, arrays, piece / kPieces, cuts[part], cuts[part + 1], scratch);
  });
  return {std::move(out), std::move(lse)};
}

// Memory for a gradient; none for one that nobody asked for.
Tensor gradient_like(const Tensor& tensor, bool needed) {
  return needed ? new_rows_like(tensor) : empty({0}, tensor.dtype());
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(
    const Tensor& grad_out_in, const std::optional<Tensor>& grad_lse_in, const Tensor& q_in, const Tensor& k_in,
    const Tensor& v_in, const Tensor& out_in, const Tensor& lse_in, const std::optional<Tensor>& key_padding_mask,
    double scale, std::optional<double> softcap, const Tensor& plan_words, bool needs_q, bool needs_k, bool needs_v) {
  const Plan plan = view(plan_words);
  check(q_in, k_in, plan, {&out_in, &grad_out_in}, {&v_in});
  const Tensor q = with_rows(q_in), k = with_rows(k_in), v = with_rows(v_in), out = with_rows(out_in);
  const Tensor grad_out = with_rows(grad_out_in);
  Tensor dq = gradient_like(q_in, needs_q), dk = gradient_like(k_in, needs_k), dv = gradient_like(v_in, needs_v);
  if (q.numel() == 0 || !(needs_q || needs_k || needs_v)) return {std::move(dq), std::move(dk), std::move(dv)};
  const Padding padding(key_padding_mask, k);
  const Tensor lse = contiguous(lse_in);
  const Tensor grad_lse = grad_lse_in ? contiguous_float32(*grad_lse_in) : Tensor();
  // Every tile of text keys reads all queries again, so here the plan's order counts too.
  const bool scattered = q.stride(2) != q.size(3) || grad_out.stride(2) != q.size(3) || !queries_in_order(plan);
  const Problem problem = problem_of(plan, q, scale, softcap, padding, scattered);
  const BackwardArrays arrays{array_of(q),
                              array_of(k),
                              array_of(v),
                              array_of(out),
                              array_of(grad_out),
                              needs_q ? array_of(dq) : Array{},
                              needs_k ? array_of(dk) : Array{},
                              needs_v ? array_of(dv) : Array{},
                              lse.data<const float>(),
                              grad_lse.defined() ? grad_lse.data<const float>() : nullptr};
  const Kernels& kernels = kernels_for(q.dtype());
  const int64_t heads = problem.batch * problem.heads, floats = kernels.backward_floats(problem);

  // Eight heads or more: each is one piece. Fewer: a head's queries are cut into ranges, none too short to repay
  // that every range turns the text's keys again.
  constexpr int64_t kWantedPieces = 8, kShortest = 5;
  const int32_t ranges =
      int32_t(std::clamp<int64_t>(plan.query_tiles / kShortest, 1, (kWantedPieces + heads - 1) / heads));
  const std::vector<int32_t> cuts =
      even_cuts(plan.query_tiles, ranges, [&](int32_t t) { return tile_cost(plan.by_query, t); });
  const Ranges shared = share_keys(plan, cuts);
  const int64_t slot = 2 * kTile * kernels.rounded_width(problem.width), slots = shared.slot_offsets.back();
  const Tensor partial = new_tensor({heads * slots * slot}, DType::float32);
  float* partial_data = partial.data<float>();
  share_out(heads * ranges, floats, [&](int64_t piece, Scratch& scratch) {
    const int64_t head = piece / ranges, range = piece % ranges;
    kernels.backward(problem, arrays, head, cuts[range], cuts[range + 1],
                     shared.destinations.data() + range * plan.tiles, partial_data + head * slots * slot, scratch);
  });
  if (slots)
    parallel_for(0, heads * plan.tiles, plan.tiles, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const int64_t head = i / plan.tiles, tile = i % plan.tiles;
        const int32_t offset = shared.slot_offsets[tile], count = shared.slot_offsets[tile + 1] - offset;
        if (count)
          kernels.reduce_keys(problem, arrays, head, int32_t(tile), partial_data + (head * slots + offset) * slot,
                              count);
      }
    });
  return {std::move(dq), std::move(dk), std::move(dv)};
}

const Operators defined(
    "CPU",
    {{"attention_plan(Tensor order, Tensor query_order, Tensor key_offsets, Tensor key_tiles, Tensor mask_ids, Tensor "
      "full_counts, "
      "Tensor query_offsets, Tensor query_tiles, Tensor query_mask_ids, Tensor query_full_counts, Tensor masks, "
      "Tensor masks_transposed) -> Tensor",
      boxed<&attention_plan>},
     {"attention_forward(Tensor q, Tensor k, Tensor v, Tensor? key_padding_mask, float scale, float? softcap, "
      "Tensor plan) -> (Tensor, Tensor)",
      boxed<&attention_forward>},
     {"attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
      "Tensor? key_padding_mask, float scale, float? softcap, Tensor plan, bool needs_q, bool needs_k, bool needs_v)"
      " -> (Tensor, Tensor, Tensor)",
      boxed<&attention_backward>}});

}  // namespace
}  // namespace dalle::attention
