// decode_attention on tensors and torch's threads: torch.ops.dalle_kernels_cpu.decode_forward.
#include <algorithm>
#include <cstring>
#include <vector>

#include "decode/kernels.h"
#include "isa.h"
#include "memory.h"
#include "operators.h"
#include "parallel.h"
#include "tensor.h"

namespace dalle::decode {
namespace {

const Kernels& kernels_for(DType dtype) {
  if (dtype == DType::float32) return for_isa(kAvx2Float32, kAvx512Float32, kAvx512Float32);
  require(dtype == DType::bfloat16, "q: got dtype ", dtype, ", wanted float32 or bfloat16");
  return for_isa(kAvx2Bfloat16, kAvx512Bfloat16, kAvx512Bfloat16);
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

// slot [S], prefix [S], offsets [S + 1], slots: a DecodeTable. Writes k and v into their slot first.
Tensor decode_forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& keys, const Tensor& values,
                      const Tensor& position, double scale, const Tensor& slot, const Tensor& prefix,
                      const Tensor& offsets, const Tensor& slots) {
  const int64_t batch = q.size(0), heads = q.size(1), width = q.size(3), element = q.element_size();
  require(width % 8 == 0 && width <= 256, "q: got D = ", width, ", wanted a multiple of 8 up to 256");
  for (const Tensor* tensor : {&k, &v, &keys, &values})
    require(tensor->dtype() == q.dtype(), "got dtype ", tensor->dtype(), ", wanted that of q");
  for (const Tensor* tensor : {&q, &k, &v, &keys, &values})
    require(tensor->dim() == 4 && tensor->size(0) == batch && tensor->size(1) == heads && tensor->size(3) == width &&
                tensor->stride(3) == 1,
            "got shape ", shape_of(*tensor), ", wanted the B, H and D of q, ", shape_of(q),
            ", and unit stride along D");
  const int64_t here = *position.data<const int64_t>();
  require(here >= 0 && here < slot.numel(), "position: got ", here, ", wanted 0 to ", slot.numel() - 1);
  Tensor out = new_rows_like(q);
  const int64_t to = slot.data<const int32_t>()[here];
  const int64_t* ends = offsets.data<const int64_t>() + here;
  const Visible visible{prefix.data<const int32_t>()[here], int32_t(ends[1] - ends[0]),
                        slots.data<const int32_t>() + ends[0]};
  const int64_t last = std::max<int64_t>({to, visible.prefix - 1, visible.listed ? visible.slots[visible.listed - 1] : 0});
  for (const Tensor* cache : {&keys, &values})
    require(last < cache->size(2), "cache: got ", cache->size(2), " slots, wanted at least ", last + 1);
  const Rows q_rows(q), k_rows(k), v_rows(v), key_rows(keys, true), value_rows(values, true), out_rows(out, true);
  for (int64_t b = 0; b < batch; b++)
    for (int64_t h = 0; h < heads; h++) {
      std::memcpy(key_rows.at(b, h, to), k_rows.at(b, h, 0), size_t(width * element));
      std::memcpy(value_rows.at(b, h, to), v_rows.at(b, h, 0), size_t(width * element));
    }

  const int32_t count = visible.prefix + visible.listed;
  // Few heads: the keys are cut into parts, as many as the shape says and never the number of threads.
  const int64_t queries = batch * heads;
  const int32_t parts = int32_t(std::clamp<int64_t>(std::min<int64_t>(kMostParts / std::max<int64_t>(queries, 1), count / 64),
                                                    1, kMostParts));
  const int64_t stride = (width + kAlign - 1) / kAlign * kAlign;
  const Kernels& kernels = kernels_for(q.dtype());
  std::vector<Part> results(size_t(queries * parts));
  const Tensor sums = empty({queries * parts, stride}, DType::float32);
  float* sums_data = sums.data<float>();
  const int64_t bytes = std::max<int64_t>(1, count / parts * width * element * 2);  // that an item reads
  parallel_for(0, queries * parts, std::max<int64_t>(1, 32768 / bytes), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t b = i / parts / heads, h = i / parts % heads, part = i % parts;
      results[size_t(i)] = kernels.attend(q_rows.at(b, h, 0), key_rows.at(b, h, 0), value_rows.at(b, h, 0),
                                          keys.stride(2), int(width), float(scale), visible,
                                          int32_t(count * part / parts), int32_t(count * (part + 1) / parts),
                                          sums_data + i * stride);
    }
  });
  for (int64_t i = 0; i < queries; i++)
    kernels.combine(results.data() + i * parts, sums_data + i * parts * stride, stride, parts, int(width),
                    out_rows.at(i / heads, i % heads, 0));
  return out;
}

const Operators operators(
    "CPU",
    {{"decode_forward(Tensor q, Tensor k, Tensor v, Tensor(a!) keys, Tensor(b!) values, Tensor position, float scale, "
      "Tensor slot, Tensor prefix, Tensor offsets, Tensor slots) -> Tensor",
      boxed<&decode_forward>}});

}  // namespace
}  // namespace dalle::decode
