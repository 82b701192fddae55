// sparse_attention on tensors and torch's threads: what the Python side calls as torch.ops.dalle_kernels_cpu.
//
// Work is cut into pieces that depend on the problem alone, never on the number of threads, and every piece writes its
// own part of the results: the bits are the same for any number of threads.
#include <torch/library.h>

#include <ATen/ATen.h>

#include <tuple>
#include <vector>

#include "attention/kernels.h"
#include "attention/threads.h"
#include "isa.h"
#include "memory.h"

namespace dalle::attention {
namespace {

using at::Tensor;

const Kernels& kernels_for(at::ScalarType dtype) {
  if (dtype == at::kFloat) return for_isa(kAvx2Float32, kAvx512Float32, kAvx512Float32);
  TORCH_CHECK(dtype == at::kBFloat16, "q: got dtype ", dtype, ", wanted float32 or bfloat16");
  return for_isa(kAvx2Bfloat16, kAvx512Bfloat16, kAvx512Bf16Bfloat16);
}

ListStorage lists_of(const Tensor& offsets, const Tensor& others, const Tensor& ids, const Tensor& full_counts,
                     const Tensor& masks, int64_t length) {
  for (const Tensor& tensor : {offsets, others, ids, full_counts, masks})
    TORCH_CHECK(tensor.scalar_type() == at::kInt && tensor.is_contiguous(), "schedule: wanted contiguous int32");
  TORCH_CHECK(masks.size(1) == kTile && masks.size(2) == kTile / 32, "schedule: wanted tiles of 64 x 64");
  return build_lists({offsets.const_data_ptr<int32_t>(), others.const_data_ptr<int32_t>(),
                      ids.const_data_ptr<int32_t>(), full_counts.const_data_ptr<int32_t>(),
                      masks.const_data_ptr<int32_t>()},
                     int32_t(length));
}

Tensor to_tensor(const void* data, int64_t words) {
  Tensor tensor = at::empty({words}, at::kInt);
  if (words) std::memcpy(tensor.mutable_data_ptr(), data, size_t(words) * sizeof(int32_t));
  return tensor;
}

// The plan of a schedule as int32 tensors: order, then full_offsets, full_tiles, pair_offsets and pairs by query, then
// the same by key.
std::vector<Tensor> attention_plan(const Tensor& order, const Tensor& key_offsets, const Tensor& key_tiles,
                                   const Tensor& mask_ids, const Tensor& full_counts, const Tensor& query_offsets,
                                   const Tensor& query_tiles, const Tensor& query_mask_ids,
                                   const Tensor& query_full_counts, const Tensor& masks,
                                   const Tensor& masks_transposed) {
  const int64_t length = order.numel();
  std::vector<Tensor> plan{order.contiguous()};
  for (const ListStorage& lists :
       {lists_of(key_offsets, key_tiles, mask_ids, full_counts, masks_transposed, length),
        lists_of(query_offsets, query_tiles, query_mask_ids, query_full_counts, masks, length)}) {
    plan.push_back(to_tensor(lists.full_offsets.data(), int64_t(lists.full_offsets.size())));
    plan.push_back(to_tensor(lists.full_tiles.data(), int64_t(lists.full_tiles.size())));
    plan.push_back(to_tensor(lists.pair_offsets.data(), int64_t(lists.pair_offsets.size())));
    plan.push_back(to_tensor(lists.pairs.data(), int64_t(lists.pairs.size() * sizeof(Pair) / sizeof(int32_t))));
  }
  return plan;
}

Plan view(at::TensorList plan) {
  TORCH_CHECK(plan.size() == 9, "plan: got ", plan.size(), " tensors, wanted the 9 of attention_plan");
  const auto words = [&](int i) { return plan[i].const_data_ptr<int32_t>(); };
  const auto lists = [&](int i) { return Lists{words(i), words(i + 1), words(i + 2), (const Pair*)words(i + 3)}; };
  return {int32_t(plan[0].numel()), int32_t(plan[1].numel() - 1), words(0), lists(1), lists(5)};
}

bool in_order(const Plan& plan) {
  for (int32_t p = 0; p < plan.length; p++)
    if (plan.order[p] != p) return false;
  return true;
}

// A tensor whose rows can be read: unit stride along D.
Tensor with_rows(const Tensor& tensor) { return tensor.stride(-1) == 1 ? tensor : tensor.contiguous(); }

Array array_of(const Tensor& tensor) {
  return {const_cast<void*>(tensor.const_data_ptr()), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

void check(const Tensor& q, const Plan& plan, std::initializer_list<Tensor> others) {
  TORCH_CHECK(q.dim() == 4, "q: got ", q.dim(), " dimensions, wanted [B, H, S, D]");
  TORCH_CHECK(q.size(2) == plan.length, "q: got ", q.size(2), " tokens, wanted the ", plan.length, " of the plan");
  TORCH_CHECK(q.size(3) % 8 == 0 && q.size(3) > 0, "q: got D = ", q.size(3), ", wanted a multiple of 8");
  for (const Tensor& other : others)
    TORCH_CHECK(other.sizes() == q.sizes() && other.scalar_type() == q.scalar_type(), "got shape ", other.sizes(),
                " and dtype ", other.scalar_type(), ", wanted those of q: ", q.sizes(), ", ", q.scalar_type());
}

struct Padding {
  Tensor tensor;
  const uint8_t* data = nullptr;

  Padding(const std::optional<Tensor>& mask, const Tensor& q) {
    if (!mask) return;
    TORCH_CHECK(mask->scalar_type() == at::kBool && mask->dim() == 2 && mask->size(0) == q.size(0) &&
                    mask->size(1) == q.size(2),
                "key_padding_mask: wanted bool [B, S]");
    tensor = mask->contiguous();
    data = (const uint8_t*)tensor.const_data_ptr();
  }
};

std::tuple<Tensor, Tensor> attention_forward(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in,
                                             const std::optional<Tensor>& key_padding_mask, double scale,
                                             at::TensorList plan_tensors) {
  const Plan plan = view(plan_tensors);
  check(q_in, plan, {k_in, v_in});
  const Tensor q = with_rows(q_in), k = with_rows(k_in), v = with_rows(v_in);
  Tensor out = new_rows_like(q_in);
  Tensor lse = at::empty({q.size(0), q.size(1), q.size(2)}, q.options().dtype(at::kFloat));
  if (q.numel() == 0) return {out, lse};
  const Padding padding(key_padding_mask, q);
  const bool scattered = k.stride(2) != k.size(3) || v.stride(2) != v.size(3);
  const Problem problem{&plan, q.size(0), q.size(1), q.size(3), float(scale), padding.data, scattered};
  const ForwardArrays arrays{array_of(q), array_of(k), array_of(v), array_of(out), lse.mutable_data_ptr<float>()};
  const Kernels& kernels = kernels_for(q.scalar_type());

  // Pieces of a head: about an eighth of its work, whole tiles.
  constexpr int kPieces = 8;
  const std::vector<int32_t> cuts = even_cuts(plan.tiles, kPieces, [&](int32_t t) { return tile_cost(plan.by_query, t); });
  const int64_t floats = kernels.forward_floats(problem);
  share_out(problem.batch * problem.heads * kPieces, floats, [&](int64_t piece, Scratch& scratch) {
    const int64_t part = piece % kPieces;
    kernels.forward(problem, arrays, piece / kPieces, cuts[part], cuts[part + 1], scratch);
  });
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(
    const Tensor& grad_out_in, const std::optional<Tensor>& grad_lse_in, const Tensor& q_in, const Tensor& k_in,
    const Tensor& v_in, const Tensor& out_in, const Tensor& lse_in, const std::optional<Tensor>& key_padding_mask,
    double scale, at::TensorList plan_tensors) {
  const Plan plan = view(plan_tensors);
  check(q_in, plan, {k_in, v_in, out_in, grad_out_in});
  const Tensor q = with_rows(q_in), k = with_rows(k_in), v = with_rows(v_in), out = with_rows(out_in);
  const Tensor grad_out = with_rows(grad_out_in);
  Tensor dq = new_rows_like(q_in), dk = new_rows_like(k_in), dv = new_rows_like(v_in);
  if (q.numel() == 0) return {dq, dk, dv};
  const Padding padding(key_padding_mask, q);
  const Tensor lse = lse_in.contiguous();
  const Tensor grad_lse = grad_lse_in ? grad_lse_in->to(at::kFloat).contiguous() : Tensor();
  // Every tile of text keys reads all queries again, so here the plan's order counts too.
  const bool scattered = q.stride(2) != q.size(3) || grad_out.stride(2) != q.size(3) || !in_order(plan);
  const Problem problem{&plan, q.size(0), q.size(1), q.size(3), float(scale), padding.data, scattered};
  const BackwardArrays arrays{array_of(q),  array_of(k),  array_of(v),  array_of(out), array_of(grad_out),
                              array_of(dq), array_of(dk), array_of(dv), lse.const_data_ptr<float>(),
                              grad_lse.defined() ? grad_lse.const_data_ptr<float>() : nullptr};
  const Kernels& kernels = kernels_for(q.scalar_type());
  const int64_t heads = problem.batch * problem.heads, floats = kernels.backward_floats(problem);

  // Eight heads or more: each is one piece. Fewer: a head's queries are cut into ranges, none too short to repay
  // that every range turns the text's keys again.
  constexpr int64_t kWantedPieces = 8, kShortest = 5;
  const int32_t ranges = int32_t(
      std::clamp<int64_t>(plan.tiles / kShortest, 1, (kWantedPieces + heads - 1) / heads));
  const std::vector<int32_t> cuts = even_cuts(plan.tiles, ranges, [&](int32_t t) { return tile_cost(plan.by_query, t); });
  const Ranges shared = share_keys(plan, cuts);
  const int64_t slot = 2 * kTile * kernels.rounded_width(problem.width), slots = shared.slot_offsets.back();
  const Tensor partial = new_tensor({heads * slots * slot}, q.options().dtype(at::kFloat));
  float* partial_data = partial.mutable_data_ptr<float>();
  share_out(heads * ranges, floats, [&](int64_t piece, Scratch& scratch) {
    const int64_t head = piece / ranges, range = piece % ranges;
    kernels.backward(problem, arrays, head, cuts[range], cuts[range + 1],
                     shared.destinations.data() + range * plan.tiles, partial_data + head * slots * slot, scratch);
  });
  if (slots)
    at::parallel_for(0, heads * plan.tiles, plan.tiles, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const int64_t head = i / plan.tiles, tile = i % plan.tiles;
        const int32_t offset = shared.slot_offsets[tile], count = shared.slot_offsets[tile + 1] - offset;
        if (count)
          kernels.reduce_keys(problem, arrays, head, int32_t(tile), partial_data + (head * slots + offset) * slot, count);
      }
    });
  return {dq, dk, dv};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(dalle_kernels_cpu, m) {
  m.def(
      "attention_plan(Tensor order, Tensor key_offsets, Tensor key_tiles, Tensor mask_ids, Tensor full_counts, "
      "Tensor query_offsets, Tensor query_tiles, Tensor query_mask_ids, Tensor query_full_counts, Tensor masks, "
      "Tensor masks_transposed) -> Tensor[]");
  m.def(
      "attention_forward(Tensor q, Tensor k, Tensor v, Tensor? key_padding_mask, float scale, Tensor[] plan) "
      "-> (Tensor, Tensor)");
  m.def(
      "attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
      "Tensor? key_padding_mask, float scale, Tensor[] plan) -> (Tensor, Tensor, Tensor)");
}
TORCH_LIBRARY_IMPL(dalle_kernels_cpu, CPU, m) {
  m.impl("attention_plan", &attention_plan);
  m.impl("attention_forward", &attention_forward);
  m.impl("attention_backward", &attention_backward);
}

}  // namespace dalle::attention
