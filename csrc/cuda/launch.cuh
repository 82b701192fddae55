// Host side of a launch. The emulation has its own version of this file.

#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
  }
}

// Runs `kernel(parameters)` on `grid` blocks of `threads` with `shared_bytes` of dynamic shared memory.
template <class Parameters>
void launch(void (*kernel)(Parameters), dim3 grid, int threads, int shared_bytes, void* stream,
            const Parameters& parameters) {
  if (grid.x == 0) {
    return;  // no row or no head: CUDA refuses a grid without blocks
  }
  if (shared_bytes > 48 * 1024) {
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               shared_bytes),
          "raising a kernel's shared memory");
  }
  kernel<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(parameters);
  check(cudaGetLastError(), "launching a kernel");
}
