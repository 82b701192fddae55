// torch.ops.dalle_kernels_cuda.decode_attention: unpacks tensors for csrc/decode/decode.cu, and tells its
// shape.

#include <tuple>

#include "cuda/tensors.h"
#include "decode/cuda.h"

namespace dalle {

static std::tuple<int64_t, int64_t, int64_t> shape() { return {kPiece, kMostBytes, kSoftmaxState}; }

static void decode(Tensor q, Tensor k, Tensor v, Tensor keys, Tensor values, Tensor slot, Tensor prefix, Tensor offsets,
                   Tensor slots, Tensor position, Tensor partial, Tensor out, double scale, int64_t splits) {
  const DeviceGuard guard(q.get_device());
  DecodeParameters p;
  p.q = device_pointer<const void>(q);
  p.k = device_pointer<const void>(k);
  p.v = device_pointer<const void>(v);
  p.keys = device_pointer<void>(keys);
  p.values = device_pointer<void>(values);
  p.out = device_pointer<void>(out);
  p.partial = device_pointer<float>(partial);
  p.slot = device_pointer<const int32_t>(slot);
  p.prefix = device_pointer<const int32_t>(prefix);
  p.offsets = device_pointer<const int64_t>(offsets);
  p.slots = device_pointer<const int32_t>(slots);
  p.position = device_pointer<const int64_t>(position);
  copy_strides(p.q_strides, q);
  copy_strides(p.k_strides, k);
  copy_strides(p.v_strides, v);
  copy_strides(p.keys_strides, keys);
  copy_strides(p.values_strides, values);
  p.batch = static_cast<int>(q.size(0));
  p.heads = static_cast<int>(q.size(1));
  p.width = static_cast<int>(q.size(3));
  p.splits = static_cast<int>(splits);
  p.scale = static_cast<float>(scale);
  decode_attention(element_of(q), p, current_stream(q));
}

}  // namespace dalle

STABLE_TORCH_LIBRARY_FRAGMENT(DALLE_LIBRARY, m) {
  m.def("decode_shape() -> (int piece, int most_bytes, int softmax_state)");
  m.def(
      "decode_attention(Tensor q, Tensor k, Tensor v, Tensor(a!) keys, Tensor(b!) values, Tensor slot, Tensor prefix,"
      " Tensor offsets, Tensor slots, Tensor position, Tensor(c!) partial, Tensor(d!) out, float scale, int splits)"
      " -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(DALLE_LIBRARY, CompositeExplicitAutograd, m) {
  m.impl("decode_shape", TORCH_BOX(&dalle::shape));
}

STABLE_TORCH_LIBRARY_IMPL(DALLE_LIBRARY, DALLE_DISPATCH_KEY, m) {
  m.impl("decode_attention", TORCH_BOX(&dalle::decode));
}
