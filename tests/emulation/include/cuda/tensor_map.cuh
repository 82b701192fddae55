// The emulation's tensor maps, with the checks of the driver's encoder.

#pragma once

#include "cuda/device.cuh"

using TensorMap = emulation::TensorMap;

template <class T>
TensorMap tensor_map(const void* data, const uint64_t (&sizes)[4], const uint64_t (&strides)[3],
                     const uint32_t (&box)[4]) {
  constexpr int kSwizzle128 = 3;
  TensorMap map{reinterpret_cast<uint64_t>(data), {}, {2}, {}, kSwizzle128};
  std::copy_n(sizes, 4, map.sizes.begin());
  std::copy_n(strides, 3, map.strides.begin() + 1);
  std::copy_n(box, 4, map.box.begin());
  bool valid = map.data % 16 == 0 && 2 * box[0] == 128;
  for (int i = 0; i < 4; ++i) {
    valid = valid && sizes[i] > 0 && sizes[i] <= uint64_t{1} << 32 && box[i] > 0 && box[i] <= 256;
    valid = valid && (i == 0 || (map.strides[i] > 0 && map.strides[i] % 16 == 0 && map.strides[i] < uint64_t{1} << 40));
  }
  if (!valid) {
    throw emulation::Fault("a tensor that the driver's encoder refuses");
  }
  return map;
}
