// Memory of large outputs and workspaces, kept from call to call. A fresh table of gradients costs a page fault for
// every 4 KB, which takes longer than computing what is written there; malloc gives such blocks back to the system as
// soon as they are freed, so every training step would pay again.
#pragma once

#include <ATen/ATen.h>

#include <optional>

namespace dalle {

// As at::empty and at::empty_like (the same shapes, dtypes and strides), out of what was freed before where it fits.
// At most kept_limit() bytes of freed blocks are kept, the oldest leaves first.
at::Tensor new_tensor(at::IntArrayRef sizes, at::TensorOptions options);
at::Tensor new_tensor_like(const at::Tensor& tensor, std::optional<at::ScalarType> dtype = std::nullopt);

// The same, but with unit stride along the last dimension whatever the tensor's: rows that kernels can write.
at::Tensor new_rows_like(const at::Tensor& tensor);

// Rows that lie one element after another; where a row has one element, or there is none, strides say nothing.
inline bool has_rows(const at::Tensor& tensor) {
  return tensor.stride(-1) == 1 || tensor.size(-1) == 1 || tensor.numel() == 0;
}

// The environment variable DALLE_KERNELS_CPU_KEEP_MB, in bytes; 256 MB without it.
// Throws std::invalid_argument where it is no number.
int64_t kept_limit();
int64_t kept_bytes();
void release_kept();  // gives back to the system what is kept

}  // namespace dalle
