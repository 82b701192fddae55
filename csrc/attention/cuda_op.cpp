// torch.ops.dalle_kernels_cuda.attention_*: unpacks tensors for the kernels of csrc/attention, and tells
// their shapes.

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

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

// A walk over tiles of kRowTile rows and kColumns columns.
static Walk walk_of(const Tensor& order, const Tensor& part_tiles, const Tensor& tile_steps, const Tensor& steps,
                    const Tensor& masks, int64_t slots) {
  if (masks.size(1) != kRowTile || 32 * masks.size(2) != kColumns) {
    throw std::runtime_error("dalle_kernels: masks: got those of tiles of " + std::to_string(masks.size(1)) + " x " +
                             std::to_string(32 * masks.size(2)) + ", wanted " + std::to_string(kRowTile) + " x " +
                             std::to_string(kColumns));
  }
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

template <class Parameters>
static void describe(Parameters& p, const Tensor& like) {
  p.batch = static_cast<int>(like.size(0));
  p.heads = static_cast<int>(like.size(1));
  p.width = static_cast<int>(like.size(3));
}

static bool is_half(const Tensor& tensor) { return element_of(tensor) == Element::float16; }

template <int... kWidths>
static std::vector<int64_t> list_of(std::integer_sequence<int, kWidths...>) {
  return {kWidths...};
}

static std::vector<int64_t> widths() { return list_of(Widths{}); }

using Tiles = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>;

static Tiles tiles(int64_t width) {
  Tiles tiles;
  const auto fill = [&](auto constant) {
    constexpr int kWidth = decltype(constant)::value;
    tiles = {kRowTile, kColumns, kAhead, kBlocks<kWidth>, kSlot<kWidth>, kKeySlot<kWidth>};
  };
  at_width(static_cast<int>(width), fill, Widths{});
  return tiles;
}

static void forward(Tensor q, Tensor k, Tensor v, std::optional<Tensor> padding, Tensor order, Tensor part_tiles,
                    Tensor tile_steps, Tensor steps, Tensor masks, int64_t slots, double scale, Tensor out,
                    Tensor lse) {
  const DeviceGuard guard(q.get_device());
  AttentionForward p;
  describe(p, q);
  p.q = rows_of<const void>(q);
  p.k = rows_of<const void>(k);
  p.v = rows_of<const void>(v);
  p.out = rows_of<void>(out);
  p.lse = device_pointer<float>(lse);
  p.padding = padding.has_value() ? device_pointer<const bool>(*padding) : nullptr;
  p.walk = walk_of(order, part_tiles, tile_steps, steps, masks, slots);
  p.scale = static_cast<float>(scale);
  (is_half(q) ? attention_forward_float16 : attention_forward_bfloat16)(p, current_stream(q));
}

static void statistics(Tensor grad_out, std::optional<Tensor> grad_lse, Tensor out, Tensor lse, Tensor order,
                       Tensor statistics) {
  const DeviceGuard guard(out.get_device());
  AttentionStatistics p;
  describe(p, out);
  p.grad_out = rows_of<const void>(grad_out);
  p.out = rows_of<const void>(out);
  p.grad_lse = grad_lse.has_value() ? device_pointer<const float>(*grad_lse) : nullptr;
  p.lse = device_pointer<const float>(lse);
  p.order = device_pointer<const int32_t>(order);
  p.statistics = device_pointer<float>(statistics);
  p.padded = static_cast<int>(statistics.size(3));
  p.length = static_cast<int>(order.size(0));
  (is_half(out) ? attention_statistics_float16 : attention_statistics_bfloat16)(p, current_stream(out));
}

// All but the walk and the gradients.
static AttentionBackward backward_of(const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v,
                                     const std::optional<Tensor>& padding, double scale, const Tensor& statistics) {
  AttentionBackward p{};
  describe(p, q);
  p.grad_out = rows_of<const void>(grad_out);
  p.q = rows_of<const void>(q);
  p.k = rows_of<const void>(k);
  p.v = rows_of<const void>(v);
  p.padding = padding.has_value() ? device_pointer<const bool>(*padding) : nullptr;
  p.statistics = device_pointer<const float>(statistics);
  p.padded = static_cast<int>(statistics.size(3));
  p.scale = static_cast<float>(scale);
  return p;
}

static void backward_queries(Tensor grad_out, Tensor q, Tensor k, Tensor v, std::optional<Tensor> padding, Tensor order,
                             Tensor part_tiles, Tensor tile_steps, Tensor steps, Tensor masks, int64_t slots,
                             double scale, Tensor statistics, Tensor dq) {
  const DeviceGuard guard(q.get_device());
  AttentionBackward p = backward_of(grad_out, q, k, v, padding, scale, statistics);
  p.walk = walk_of(order, part_tiles, tile_steps, steps, masks, slots);
  p.dq = rows_of<void>(dq);
  (is_half(q) ? attention_backward_queries_float16 : attention_backward_queries_bfloat16)(p, current_stream(q));
}

static void backward_keys(Tensor grad_out, Tensor q, Tensor k, Tensor v, std::optional<Tensor> padding, Tensor order,
                          Tensor part_tiles, Tensor tile_steps, Tensor steps, Tensor masks, int64_t slots, double scale,
                          Tensor statistics, Tensor dk, Tensor dv) {
  const DeviceGuard guard(q.get_device());
  AttentionBackward p = backward_of(grad_out, q, k, v, padding, scale, statistics);
  p.walk = walk_of(order, part_tiles, tile_steps, steps, masks, slots);
  p.dk = rows_of<void>(dk);
  p.dv = rows_of<void>(dv);
  (is_half(q) ? attention_backward_keys_float16 : attention_backward_keys_bfloat16)(p, current_stream(q));
}

}  // namespace dalle

STABLE_TORCH_LIBRARY_FRAGMENT(DALLE_LIBRARY, m) {
  m.def("attention_widths() -> int[]");
  m.def("attention_tiles(int width) -> (int rows, int columns, int ahead, int blocks, int slot, int key_slot)");
  m.def(
      "attention_forward(Tensor q, Tensor k, Tensor v, Tensor? padding, Tensor order, Tensor part_tiles,"
      " Tensor tile_steps, Tensor steps, Tensor masks, int slots, float scale, Tensor(a!) out, Tensor(b!) lse) -> ()");
  m.def(
      "attention_statistics(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse, Tensor order,"
      " Tensor(a!) statistics) -> ()");
  m.def(
      "attention_backward_queries(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor? padding, Tensor order,"
      " Tensor part_tiles, Tensor tile_steps, Tensor steps, Tensor masks, int slots, float scale, Tensor statistics,"
      " Tensor(a!) dq) -> ()");
  m.def(
      "attention_backward_keys(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor? padding, Tensor order,"
      " Tensor part_tiles, Tensor tile_steps, Tensor steps, Tensor masks, int slots, float scale, Tensor statistics,"
      " Tensor(a!) dk, Tensor(b!) dv) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(DALLE_LIBRARY, CompositeExplicitAutograd, m) {
  m.impl("attention_widths", TORCH_BOX(&dalle::widths));
  m.impl("attention_tiles", TORCH_BOX(&dalle::tiles));
}

STABLE_TORCH_LIBRARY_IMPL(DALLE_LIBRARY, DALLE_DISPATCH_KEY, m) {
  m.impl("attention_forward", TORCH_BOX(&dalle::forward));
  m.impl("attention_statistics", TORCH_BOX(&dalle::statistics));
  m.impl("attention_backward_queries", TORCH_BOX(&dalle::backward_queries));
  m.impl("attention_backward_keys", TORCH_BOX(&dalle::backward_keys));
}
