// What the torch-facing files (csrc/*/cuda_op.cpp) share: from stable-ABI tensors to the raw pointers that the kernels
// take. The emulation has its own version of this file, which registers the same operations for CPU tensors.

#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

// csrc/cuda/build_cuda.py defines DALLE_LIBRARY, the namespace of the operations.
#define DALLE_DISPATCH_KEY CUDA

// Lives in libtorch_cuda. Weak, so that the library also loads (to be looked at, not used) beside a torch without it.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream) __attribute__((weak));

namespace dalle {

using torch::stable::Tensor;

template <class T>
T* device_pointer(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

inline void* current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  if (aoti_torch_get_current_cuda_stream == nullptr ||
      aoti_torch_get_current_cuda_stream(tensor.get_device(), &stream) != 0) {
    throw std::runtime_error("dalle_kernels: no CUDA stream; is this torch built with CUDA?");
  }
  return stream;
}

using DeviceGuard = torch::stable::accelerator::DeviceGuard;

}  // namespace dalle
