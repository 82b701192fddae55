// Small questions that the torch-facing files ask of a tensor; the same for hardware and for the emulation.

#pragma once

#include <stdexcept>

#include "cuda/glue.h"
#include "cuda/types.h"

namespace dalle {

inline Element element_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case torch::headeronly::ScalarType::Float:
      return Element::float32;
    case torch::headeronly::ScalarType::BFloat16:
      return Element::bfloat16;
    case torch::headeronly::ScalarType::Half:
      return Element::float16;
    default:
      throw std::runtime_error("dalle_kernels: the CUDA kernels take float32, bfloat16 and float16");
  }
}

// The strides of the first `count` dimensions, in elements.
template <size_t count>
void copy_strides(int64_t (&strides)[count], const Tensor& tensor) {
  for (size_t i = 0; i < count; ++i) {
    strides[i] = tensor.stride(static_cast<int64_t>(i));
  }
}

}  // namespace dalle
