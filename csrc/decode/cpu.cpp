// decode_attention on tensors and torch's threads: torch.ops.dalle_kernels_cpu.decode_forward.
#include <torch/library.h>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "decode/kernels.h"
#include "isa.h"
#include "memory.h"

namespace dalle::decode {
namespace {

using at::Tensor;

const Kernels& kernels_for(at::ScalarType dtype) {
  if (dtype == at::kFloat) return for_isa(kAvx2Float32, kAvx512Float32, kAvx512Float32);
  TORCH_CHECK(dtype == at::kBFloat16, "q: got dtype ", dtype, ", wanted float32 or bfloat16");
  return for_isa(kAvx2Bfloat16, kAvx512Bfloat16, kAvx512Bfloat16);
}

const char* row_of(const Tensor& tensor, int64_t b, int64_t h, int64_t row) {
  return static_cast<const char*>(tensor.const_data_ptr()) +
         (b * tensor.stride(0) + h * tensor.stride(1) + row * tensor.stride(2)) * int64_t(tensor.element_size());
}

// slot [S], prefix [S], offsets [S + 1], slots: a DecodeTable. Writes k and v into their slot first.
Tensor decode_forward(const Tensor& q, const Tensor& k, const Tensor& v, Tensor& keys, Tensor& values,
                      const Tensor& position, double scale, const Tensor& slot, const Tensor& prefix,
                      const Tensor& offsets, const Tensor& slots) {
  const int64_t batch = q.size(0), heads = q.size(1), width = q.size(3), element = int64_t(q.element_size());
  TORCH_CHECK(width % 8 == 0 && width <= 256, "q: got D = ", width, ", wanted a multiple of 8 up to 256");
  for (const Tensor& tensor : {k, v, keys, values})
    TORCH_CHECK(tensor.scalar_type() == q.scalar_type(), "got dtype ", tensor.scalar_type(), ", wanted that of q");
  for (const Tensor& tensor : {q, k, v, keys, values})
    TORCH_CHECK(tensor.dim() == 4 && tensor.size(0) == batch && tensor.size(1) == heads && tensor.size(3) == width &&
                    tensor.stride(3) == 1,
                "got shape ", tensor.sizes(), ", wanted the B, H and D of q, ", q.sizes(), ", and unit stride along D");
  const int64_t here = *position.const_data_ptr<int64_t>();
  TORCH_CHECK(here >= 0 && here < slot.numel(), "position: got ", here, ", wanted 0 to ", slot.numel() - 1);
  Tensor out = new_rows_like(q);
  const int64_t to = slot.const_data_ptr<int32_t>()[here];
  const int64_t* ends = offsets.const_data_ptr<int64_t>() + here;
  const Visible visible{prefix.const_data_ptr<int32_t>()[here], int32_t(ends[1] - ends[0]),
                        slots.const_data_ptr<int32_t>() + ends[0]};
  const int64_t last = std::max<int64_t>({to, visible.prefix - 1, visible.listed ? visible.slots[visible.listed - 1] : 0});
  for (const Tensor& cache : {keys, values})
    TORCH_CHECK(last < cache.size(2), "cache: got ", cache.size(2), " slots, wanted at least ", last + 1);
  for (int64_t b = 0; b < batch; b++)
    for (int64_t h = 0; h < heads; h++) {
      std::memcpy(const_cast<char*>(row_of(keys, b, h, to)), row_of(k, b, h, 0), size_t(width * element));
      std::memcpy(const_cast<char*>(row_of(values, b, h, to)), row_of(v, b, h, 0), size_t(width * element));
    }

  const int32_t count = visible.prefix + visible.listed;
  // Few heads: the keys are cut into parts, as many as the shape says and never the number of threads.
  const int64_t queries = batch * heads;
  const int32_t parts = int32_t(std::clamp<int64_t>(std::min<int64_t>(kMostParts / std::max<int64_t>(queries, 1), count / 64),
                                                    1, kMostParts));
  const int64_t stride = (width + kAlign - 1) / kAlign * kAlign;
  const Kernels& kernels = kernels_for(q.scalar_type());
  std::vector<Part> results(size_t(queries * parts));
  Tensor sums = at::empty({queries * parts, stride}, q.options().dtype(at::kFloat));
  float* sums_data = sums.mutable_data_ptr<float>();
  const int64_t bytes = std::max<int64_t>(1, count / parts * width * element * 2);  // that an item reads
  at::parallel_for(0, queries * parts, std::max<int64_t>(1, 32768 / bytes), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t b = i / parts / heads, h = i / parts % heads, part = i % parts;
      results[size_t(i)] = kernels.attend(row_of(q, b, h, 0), row_of(keys, b, h, 0), row_of(values, b, h, 0),
                                          keys.stride(2), int(width), float(scale), visible,
                                          int32_t(count * part / parts), int32_t(count * (part + 1) / parts),
                                          sums_data + i * stride);
    }
  });
  for (int64_t i = 0; i < queries; i++)
    kernels.combine(results.data() + i * parts, sums_data + i * parts * stride, stride, parts, int(width),
                    const_cast<char*>(row_of(out, i / heads, i % heads, 0)));
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(dalle_kernels_cpu, m) {
  m.def(
      "decode_forward(Tensor q, Tensor k, Tensor v, Tensor(a!) keys, Tensor(b!) values, Tensor position, float scale, "
      "Tensor slot, Tensor prefix, Tensor offsets, Tensor slots) -> Tensor");
}
TORCH_LIBRARY_IMPL(dalle_kernels_cpu, CPU, m) { m.impl("decode_forward", &decode_forward); }

}  // namespace dalle::decode
