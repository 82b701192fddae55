// Tensor maps: what the copy engine of sm_90 knows of a tensor. The emulation has its own version of this file.

#pragma once

#include <cuda.h>

#include <cstdint>
#include <string>
#include <type_traits>

#include "cuda/device.cuh"
#include "cuda/launch.cuh"

using TensorMap = CUtensorMap;

// The driver's encoder, found at run time: nothing links against libcuda, which a machine without a GPU lacks.
inline auto tensor_map_encoder() {
  static const auto encoder = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    const cudaError_t status =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
#else
    const cudaError_t status = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
    check(status, "looking for cuTensorMapEncodeTiled");
    if (found != cudaDriverEntryPointSuccess) {
      throw std::runtime_error("the CUDA driver has no cuTensorMapEncodeTiled; it is older than CUDA 12");
    }
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  return encoder;
}

// A tensor of 16-bit elements with `sizes`, innermost first and contiguous, the others `strides` bytes apart (multiples
// of 16), to be copied in boxes of `box` elements, 64 innermost, with the swizzle of 128 bytes.
template <class T>
TensorMap tensor_map(const void* data, const uint64_t (&sizes)[4], const uint64_t (&strides)[3],
                     const uint32_t (&box)[4]) {
  const uint32_t steps[4] = {1, 1, 1, 1};
  TensorMap map;
  const CUresult status = tensor_map_encoder()(
      &map, std::is_same_v<T, Bfloat16> ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4,
      const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    throw std::runtime_error("cuTensorMapEncodeTiled refused a tensor, error " + std::to_string(status));
  }
  return map;
}
