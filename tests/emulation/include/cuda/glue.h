// The emulation's glue: the same operations, registered for CPU tensors under another name. A tensor's elements become
// global memory of the machine for one call.

#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "../../emulator.h"

#define DALLE_LIBRARY dalle_kernels_emulated
#define DALLE_DISPATCH_KEY CPU

namespace dalle {

using torch::stable::Tensor;

template <class T>
T* device_pointer(const Tensor& tensor) {
  uint64_t elements = tensor.numel() == 0 ? 0 : 1;
  for (int64_t i = 0; elements > 0 && i < tensor.dim(); ++i) {
    elements += (tensor.size(i) - 1) * tensor.stride(i);
  }
  return reinterpret_cast<T*>(
      emulation::machine().register_array(tensor.data_ptr(), elements * tensor.element_size(), !std::is_const_v<T>));
}

inline void* current_stream(const Tensor&) { return nullptr; }

// Lives as long as an operation: what it made visible to kernels goes with it.
struct DeviceGuard {
  explicit DeviceGuard(int) { emulation::machine().forget_arrays(); }
  ~DeviceGuard() { emulation::machine().forget_arrays(); }
};

}  // namespace dalle
