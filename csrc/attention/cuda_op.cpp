// torch.ops.dalle_kernels_cuda.attention_*: unpacks tensors for the kernels of csrc/attention.

#include <optional>

#include "attention/cuda.h"
#include "cuda/tensors.h"

namespace dalle {

template <class T>
static Rows rows_of(const Tensor& tensor) {
  Rows rows;
  rows.data = const_cast<void*>(device_pointer<T>(tensor));
  copy_strides(rows.strides, tensor);
  return rows;
}

static Walk walk_of(const Tensor& order, const Tensor& part_tiles, const Tensor& tile_steps, const Tensor& steps,
                    const Tensor& masks, int64_t slots) {
  Walk walk;
  walk.order = device_pointer<const int32_t>(order);
  walk.part_tiles = device_pointer<const int32_t>(part_tiles);
  walk.tile_steps = device_pointer<const int32_t>(tile_steps);
  walk.steps = device_pointer<const int32_t>(steps);
  walk.masks = device_pointer<const int32_t>(masks);
  walk.parts = static_cast<int>(part_tiles.size(0)) - 1;
  walk.slots = static_cast<int>(slots);
  walk.length = static_cast<int>(order.size(0));
  return walk;
}

static void forward(Tensor q, Tensor k, Tensor v, std::optional<Tensor> padding, Tensor order, Tensor part_tiles,
                    Tensor tile_steps, Tensor steps, Tensor masks, int64_t slots, double scale, Tensor out,
                    Tensor lse) {
  const DeviceGuard guard(q.get_device());
  AttentionForward p;
  p.q = rows_of<const void>(q);
  p.k = rows_of<const void>(k);
  p.v = rows_of<const void>(v);
  p.out = rows_of<void>(out);
  p.lse = device_pointer<float>(lse);
  p.padding = padding.has_value() ? device_pointer<const bool>(*padding) : nullptr;
  p.walk = walk_of(order, part_tiles, tile_steps, steps, masks, slots);
  p.batch = static_cast<int>(q.size(0));
  p.heads = static_cast<int>(q.size(1));
  p.width = static_cast<int>(q.size(3));
  p.scale = static_cast<float>(scale);
  const bool half = element_of(q) == Element::float16;
  (half ? attention_forward_float16 : attention_forward_bfloat16)(p, current_stream(q));
}

static void backward(Tensor grad_out, std::optional<Tensor> grad_lse, Tensor q, Tensor k, Tensor v, Tensor out,
                     Tensor lse, std::optional<Tensor> padding, Tensor order, Tensor query_part_tiles,
                     Tensor query_tile_steps, Tensor query_steps, Tensor query_masks, int64_t query_slots,
                     Tensor key_part_tiles, Tensor key_tile_steps, Tensor key_steps, Tensor key_masks,
                     int64_t key_slots, double scale, Tensor statistics, Tensor dq, Tensor dk, Tensor dv) {
  const DeviceGuard guard(q.get_device());
  AttentionBackward p;
  p.grad_out = rows_of<const void>(grad_out);
  p.q = rows_of<const void>(q);
  p.k = rows_of<const void>(k);
  p.v = rows_of<const void>(v);
  p.out = rows_of<const void>(out);
  p.dq = rows_of<void>(dq);
  p.dk = rows_of<void>(dk);
  p.dv = rows_of<void>(dv);
  p.grad_lse = grad_lse.has_value() ? device_pointer<const float>(*grad_lse) : nullptr;
  p.lse = device_pointer<const float>(lse);
  p.padding = padding.has_value() ? device_pointer<const bool>(*padding) : nullptr;
  p.statistics = device_pointer<float>(statistics);
  p.padded = static_cast<int>(statistics.size(3));
  p.by_query = walk_of(order, query_part_tiles, query_tile_steps, query_steps, query_masks, query_slots);
  p.by_key = walk_of(order, key_part_tiles, key_tile_steps, key_steps, key_masks, key_slots);
  p.batch = static_cast<int>(q.size(0));
  p.heads = static_cast<int>(q.size(1));
  p.width = static_cast<int>(q.size(3));
  p.scale = static_cast<float>(scale);
  const bool half = element_of(q) == Element::float16;
  (half ? attention_backward_float16 : attention_backward_bfloat16)(p, current_stream(q));
}

}  // namespace dalle

STABLE_TORCH_LIBRARY_FRAGMENT(DALLE_LIBRARY, m) {
  m.def(
      "attention_forward(Tensor q, Tensor k, Tensor v, Tensor? padding, Tensor order, Tensor part_tiles,"
      " Tensor tile_steps, Tensor steps, Tensor masks, int slots, float scale, Tensor(a!) out, Tensor(b!) lse) -> ()");
  m.def(
      "attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
      " Tensor? padding, Tensor order, Tensor query_part_tiles, Tensor query_tile_steps, Tensor query_steps,"
      " Tensor query_masks, int query_slots, Tensor key_part_tiles, Tensor key_tile_steps, Tensor key_steps,"
      " Tensor key_masks, int key_slots, float scale, Tensor(a!) statistics, Tensor(b!) dq, Tensor(c!) dk,"
      " Tensor(d!) dv) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(DALLE_LIBRARY, DALLE_DISPATCH_KEY, m) {
  m.impl("attention_forward", TORCH_BOX(&dalle::forward));
  m.impl("attention_backward", TORCH_BOX(&dalle::backward));
}
