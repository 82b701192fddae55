// decode_attention on tensors and torch's threads: torch.ops.dalle_kernels_cpu.decode_forward.
#include <algorithm>
#include <deque>
#include <limits>
#include <optional>
#include <vector>

#include "decode/kernels.h"
#include "isa.h"
#include "memory.h"
#include "operators.h"
#include "parallel.h"
#include "scratch.h"
#include "tensor.h"

namespace dalle::decode {
namespace {

const Kernels& kernels_for(DType dtype, bool eight_bit) {
  const DecodeKernels& table = decode_kernels();
  if (dtype == DType::float32) return eight_bit ? table.f32_eight_bit : table.f32;
  require(dtype == DType::bfloat16, "q: got dtype ", dtype, ", wanted float32 or bfloat16");
  return eight_bit ? table.bf16_eight_bit : table.bf16;
}

// The rows of a [B, H, S, D] tensor.
struct Rows {
  char* data;
  int64_t batch, head, row;  // strides in bytes

  // Kernels read some tensors and write others through the same type.
  explicit Rows(const Tensor& tensor, bool written = false)
      : data(written ? tensor.data<char>() : const_cast<char*>(tensor.data<const char>())),
        batch(tensor.stride(0) * tensor.element_size()),
        head(tensor.stride(1) * tensor.element_size()),
        row(tensor.stride(2) * tensor.element_size()) {}
  char* at(int64_t b, int64_t h, int64_t s) const { return data + b * batch + h * head + s * row; }
};

// A cache's keys and values [B, H, L, D], and the scales [B, H, L, 2] of eight-bit ones.
struct Slots {
  Rows keys, values;
  float* scales;
  int64_t heads, count, row;

  Slots(const Tensor& keys, const Tensor& values, const std::optional<Tensor>& scales, bool written)
      : keys(keys, written),
        values(values, written),
        scales(!scales   ? nullptr
               : written ? scales->data<float>()
                         : const_cast<float*>(scales->data<const float>())),
        heads(keys.size(1)),
        count(keys.size(2)),
        row(keys.stride(2)) {}
  float* scales_at(int64_t b, int64_t h) const { return scales ? scales + (b * heads + h) * count * 2 : nullptr; }
  Held at(int64_t b, int64_t h) const { return {keys.at(b, h, 0), values.at(b, h, 0), row, scales_at(b, h)}; }
};

// A DecodeTable's lists.
struct Lists {
  const int32_t* prefix;
  const int64_t* offsets;
  const int32_t* slots;

  Lists(const Tensor& prefix, const Tensor& offsets, const Tensor& slots)
      : prefix(prefix.data<const int32_t>()),
        offsets(offsets.data<const int64_t>()),
        slots(slots.data<const int32_t>()) {}
  Visible at(int64_t position) const {
    const int64_t first = offsets[position];
    return {prefix[position], int32_t(offsets[position + 1] - first), slots + first};
  }
};

// `visible` without the slots at which `hidden` is set, its list kept in `lists`.
Visible without(const Visible& visible, const bool* hidden, std::deque<std::vector<int32_t>>& lists) {
  std::vector<int32_t>& left = lists.emplace_back();
  for (int32_t entry = 0; entry < visible.prefix + visible.listed; entry++) {
    const int32_t slot = entry < visible.prefix ? entry : visible.slots[entry - visible.prefix];
    if (!hidden[slot]) left.push_back(slot);
  }
  return {0, int32_t(left.size()), left.data()};
}

int32_t entries(const Visible& visible) { return visible.prefix + visible.listed; }

void require_slots(const Visible& visible, int64_t slots) {
  const int64_t last = std::max(visible.prefix - 1, visible.listed ? visible.slots[visible.listed - 1] : 0);
  require(entries(visible) == 0 || last < slots, "cache: got ", slots, " slots, wanted at least ", last + 1);
}

// What every row and token sees, worked out before the threads start.
struct Sight {
  std::vector<int64_t> slot;               // [rows, tokens]
  std::vector<Visible> own;                // [rows, tokens]
  std::vector<Visible> shared;             // [rows, tokens]; empty without a shared prompt
  std::vector<bool> together;              // [prompts]: whether a prompt's rows stand at one position
  std::deque<std::vector<int32_t>> lists;  // where padding leaves holes
};

// The first `tokens` of attend_many()'s queries worth a product: fewer are faster one by one.
constexpr int64_t kFewestTogether = 8;
constexpr int64_t kMostSharedParts = 8;

// Writes the new keys and values k and v [B, H, G, D] into their slots of keys and values [B, H, L, D], then attends
// from q, which may have several heads for each of theirs; row by row G tokens from `position` on, or from `positions`
// (one, or [B]) where they are given. Each B / P rows also see shared_keys and shared_values [P, H, M, D]. hidden [B,
// L] and shared_hidden [P, M] are true at slots of padding; scales [B, H, L, 2] and shared_scales [P, H, M, 2] are
// there where keys and values are int8. slot [S], prefix [S], offsets [S + 1], slots: a DecodeTable, as the shared
// ones, which have no slot.
Tensor decode_forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& keys, const Tensor& values,
                      const std::optional<Tensor>& shared_keys, const std::optional<Tensor>& shared_values,
                      const std::optional<Tensor>& hidden, const std::optional<Tensor>& shared_hidden,
                      const std::optional<Tensor>& scales, const std::optional<Tensor>& shared_scales, int64_t position,
                      const std::optional<Tensor>& positions, double scale, std::optional<double> softcap,
                      const Tensor& slot, const Tensor& prefix, const Tensor& offsets, const Tensor& slots,
                      const std::optional<Tensor>& shared_prefix, const std::optional<Tensor>& shared_offsets,
                      const std::optional<Tensor>& shared_slots) {
  const int64_t rows = q.size(0), heads = q.size(1), tokens = q.size(2), width = q.size(3);
  const int64_t element = keys.element_size(), own_heads = k.size(1), group = own_heads ? heads / own_heads : 1;
  require(1 <= width && width <= kWidest, "q: got D = ", width, ", wanted 1 to 256");
  require(heads == own_heads * group, "q: got ", heads, " heads, wanted a multiple of the ", own_heads, " of k");
  const bool shares = shared_keys.has_value();
  const int64_t prompts = shares ? shared_keys->size(0) : rows, copies = prompts ? rows / prompts : 1;
  const DType held = scales ? DType::int8 : q.dtype();
  const auto check = [&](const Tensor& tensor, int64_t batch, DType dtype) {
    require(tensor.dtype() == dtype, "got dtype ", tensor.dtype(), ", wanted ", dtype);
    require(tensor.dim() == 4 && tensor.size(0) == batch && tensor.size(1) == own_heads && tensor.size(3) == width &&
                tensor.stride(3) == 1,
            "got shape ", shape_of(tensor), ", wanted the B, H and D of k, ", shape_of(k), ", and unit stride along D");
  };
  const auto check_scales = [&](const std::optional<Tensor>& tensor, const Tensor& of) {
    require(tensor.has_value() == scales.has_value(), "scales: wanted them where keys and values are int8");
    require(!tensor || (tensor->dtype() == DType::float32 && tensor->is_contiguous() &&
                        tensor->numel() == of.size(0) * of.size(1) * of.size(2) * 2),
            "scales: wanted contiguous float32 of shape [B, H, L, 2]");
  };
  for (const Tensor* tensor : {&k, &v}) check(*tensor, rows, q.dtype());
  for (const Tensor* tensor : {&keys, &values}) check(*tensor, rows, held);
  require(q.stride(3) == 1, "q: wanted unit stride along D");
  check_scales(scales, keys);
  require(k.size(2) == tokens && v.size(2) == tokens, "k, v: wanted ", tokens, " tokens as q has");
  require(!positions || positions->numel() == 1 || positions->numel() == rows, "position: wanted one, or ", rows);
  if (shares) {
    require(shared_values && shared_prefix && shared_offsets && shared_slots && rows == prompts * copies,
            "shared_keys: wanted values, a table, and a divisor of ", rows, " prompts with them");
    check(*shared_keys, prompts, held);
    check(*shared_values, prompts, held);
    check_scales(shared_scales, *shared_keys);
  }
  for (const std::optional<Tensor>* mask : {&hidden, &shared_hidden})
    require(!*mask || ((*mask)->dtype() == DType::boolean && (*mask)->is_contiguous()),
            "hidden: wanted contiguous booleans");
  Tensor out = new_rows_like(q);

  Sight sight;
  const Lists own(prefix, offsets, slots);
  const std::optional<Lists> prompt =
      shares ? std::optional<Lists>({*shared_prefix, *shared_offsets, *shared_slots}) : std::nullopt;
  const int64_t* start = positions ? positions->data<const int64_t>() : &position;
  const bool by_row = positions && positions->numel() > 1;
  bool* const own_hidden = hidden ? hidden->data<bool>() : nullptr;
  const bool* const prompt_hidden = shared_hidden ? shared_hidden->data<const bool>() : nullptr;
  for (int64_t b = 0; b < rows; b++) {
    const int64_t first = start[by_row ? b : 0], p = b / copies;
    require(first >= 0 && first + tokens <= slot.numel(), "position: got ", first, ", wanted 0 to ",
            slot.numel() - tokens);
    const bool leads = b % copies == 0;
    if (leads) sight.together.push_back(true);
    if (first != start[by_row ? p * copies : 0]) sight.together[size_t(p)] = false;
    for (int64_t g = 0; g < tokens; g++) {
      const int64_t to = slot.data<const int32_t>()[first + g];
      require(to >= 0 && to < keys.size(2) && to < values.size(2), "cache: got ", keys.size(2), " slots, wanted slot ",
              to);
      Visible seen = own.at(first + g);
      require_slots(seen, std::min(keys.size(2), values.size(2)));
      if (own_hidden) {
        own_hidden[b * keys.size(2) + to] = false;  // what is new is not padding
        seen = without(seen, own_hidden + b * keys.size(2), sight.lists);
      }
      sight.slot.push_back(to);
      sight.own.push_back(seen);
      if (!shares) continue;
      Visible before = prompt->at(first + g);
      require_slots(before, std::min(shared_keys->size(2), shared_values->size(2)));
      if (prompt_hidden && !leads && sight.together[size_t(p)]) {
        before = sight.shared[size_t(p * copies * tokens + g)];
      } else if (prompt_hidden) {
        before = without(before, prompt_hidden + p * shared_keys->size(2), sight.lists);
      }
      sight.shared.push_back(before);
    }
  }

  const Rows q_rows(q), k_rows(k), v_rows(v), out_rows(out, true);
  const Slots cache(keys, values, scales, true);
  const Kernels& kernels = kernels_for(q.dtype(), scales.has_value());
  constexpr double kMost = std::numeric_limits<float>::max();
  const float cap = float(softcap.value_or(0)), slope = float(std::clamp(scale / softcap.value_or(1), -kMost, kMost));
  const int64_t queries = rows * heads;
  const auto write = [&](int64_t b, int64_t h, int64_t g) {
    const int64_t to = sight.slot[size_t(b * tokens + g)];
    const float key_scale = kernels.write(k_rows.at(b, h, g), int(width), cache.keys.at(b, h, to));
    const float value_scale = kernels.write(v_rows.at(b, h, g), int(width), cache.values.at(b, h, to));
    if (float* const its = cache.scales_at(b, h)) its[2 * to] = key_scale, its[2 * to + 1] = value_scale;
  };
  const auto grain = [&](int64_t items, int64_t count) {  // items that read 32 KB, or all of them in one
    return items ? std::max<int64_t>(1, 32768 / std::max<int64_t>(1, count * width * element * 2)) : 1;
  };
  int64_t most = 0, most_shared = 0;
  for (const Visible& visible : sight.own) most = std::max<int64_t>(most, entries(visible));
  for (const Visible& visible : sight.shared) most_shared = std::max<int64_t>(most_shared, entries(visible));
  // Few heads: the keys are cut into parts, as many as the shape says and never the number of threads.
  const int64_t cut =
      shares || tokens > 1 ? 1 : std::min<int64_t>(kMostParts / std::max<int64_t>(queries, 1), most / 64);
  const int64_t parts = std::clamp<int64_t>(cut, 1, kMostParts);
  const int64_t blocks = (copies + kMostQueries - 1) / kMostQueries, products = prompts * heads * tokens * blocks;
  const int64_t shared_parts =
      shares ? std::clamp<int64_t>(std::min(kMostSharedParts / std::max<int64_t>(products, 1), most_shared / 128), 1,
                                   kMostSharedParts)
             : 0;
  const int64_t stride = (width + kAlign - 1) / kAlign * kAlign, all = parts + shared_parts;
  std::vector<Part> results(size_t(queries * tokens * all));
  const Tensor sums = empty({queries * tokens * all, stride}, DType::float32);
  float* const sums_data = sums.data<float>();
  const auto at = [&](int64_t b, int64_t h, int64_t g) { return ((b * heads + h) * tokens + g) * all; };

  if (shares) {
    const Slots before(*shared_keys, *shared_values, shared_scales, false);
    parallel_for(0, products * shared_parts, grain(products, copies * most_shared / shared_parts),
                 [&](int64_t begin, int64_t end) {
                   float* const memory = static_cast<float*>(
                       thread_scratch(kMostQueries * (kMostQueries + 4 * stride) * int64_t(sizeof(float))));
                   for (int64_t i = begin; i < end; i++) {
                     const int64_t part = i % shared_parts, block = i / shared_parts % blocks;
                     const int64_t g = i / shared_parts / blocks % tokens, head = i / shared_parts / blocks / tokens;
                     const int64_t p = head / heads, h = head % heads, first = p * copies + block * kMostQueries;
                     const int64_t count = std::min<int64_t>(kMostQueries, (p + 1) * copies - first);
                     const Held prompt_held = before.at(p, h / group);
                     const auto range = [&](const Visible& visible, int64_t j) {
                       return int32_t(entries(visible) * j / shared_parts);
                     };
                     if (sight.together[size_t(p)] && count >= kFewestTogether) {
                       const void* at_once[kMostQueries];
                       for (int64_t j = 0; j < count; j++) at_once[j] = q_rows.at(first + j, h, g);
                       const Visible& visible = sight.shared[size_t(first * tokens + g)];
                       const int64_t to = at(first, h, g) + part;
                       kernels.attend_many(at_once, int(count), prompt_held, int(width), slope, cap, visible,
                                           range(visible, part), range(visible, part + 1), results.data() + to,
                                           sums_data + to * stride, heads * tokens * all, stride, memory);
                       continue;
                     }
                     for (int64_t b = first; b < first + count; b++) {
                       const Visible& visible = sight.shared[size_t(b * tokens + g)];
                       const int64_t to = at(b, h, g) + part;
                       results[size_t(to)] =
                           kernels.attend(q_rows.at(b, h, g), prompt_held, int(width), slope, cap, visible,
                                          range(visible, part), range(visible, part + 1), sums_data + to * stride);
                     }
                   }
                 });
  }

  if (parts > 1)
    for (int64_t b = 0; b < rows; b++)
      for (int64_t h = 0; h < own_heads; h++) write(b, h, 0);
  // A head's tokens one after another: a later one may take a slot that an earlier one reads.
  const int64_t items = rows * own_heads * parts;
  parallel_for(0, items, grain(items, most * tokens / parts), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t b = i / parts / own_heads, own_head = i / parts % own_heads, part = i % parts;
      const Held slots_held = cache.at(b, own_head);
      for (int64_t g = 0; g < tokens; g++) {
        if (parts == 1) write(b, own_head, g);
        const Visible& visible = sight.own[size_t(b * tokens + g)];
        const int64_t count = entries(visible);
        for (int64_t h = own_head * group; h < (own_head + 1) * group; h++) {
          const int64_t mine = at(b, h, g), to = mine + shared_parts + part;
          results[size_t(to)] = kernels.attend(q_rows.at(b, h, g), slots_held, int(width), slope, cap, visible,
                                               int32_t(count * part / parts), int32_t(count * (part + 1) / parts),
                                               sums_data + to * stride);
          if (parts == 1)
            kernels.combine(results.data() + mine, sums_data + mine * stride, stride, int(all), int(width),
                            out_rows.at(b, h, g));
        }
      }
    }
  });
  if (parts > 1)
    for (int64_t i = 0; i < queries; i++)
      kernels.combine(results.data() + i * parts, sums_data + i * parts * stride, stride, int(parts), int(width),
                      out_rows.at(i / heads, i % heads, 0));
  return out;
}

const Operators defined(
    "CPU",
    {{"decode_forward(Tensor q, Tensor k, Tensor v, Tensor(a!) keys, Tensor(b!) values, Tensor? shared_keys, "
      "Tensor? shared_values, Tensor(c!)? hidden, Tensor? shared_hidden, Tensor(d!)? scales, Tensor? shared_scales, "
      "int position, Tensor? positions, float scale, float? softcap, Tensor slot, "
      "Tensor prefix, Tensor offsets, Tensor slots, Tensor? shared_prefix, Tensor? shared_offsets, "
      "Tensor? shared_slots) -> Tensor",
      boxed<&decode_forward>}});

}  // namespace
}  // namespace dalle::decode
