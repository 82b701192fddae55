// Memory of large outputs and workspaces, kept from call to call. A fresh table of gradients costs a page fault for
// every 4 KB, which takes longer than computing what is written there; malloc gives such blocks back to the system as
// soon as they are freed, so every training step would pay again.
#pragma once

#include "tensor.h"

namespace dalle {

// As torch.empty and torch.empty_like (the same strides), out of what was freed before where it fits. At most
// kept_limit() bytes of freed blocks are kept, the oldest leaves first; where nothing may be kept, all is torch's own.
Tensor new_tensor(const std::vector<int64_t>& sizes, DType dtype);
Tensor new_tensor_like(const Tensor& tensor, DType dtype);
inline Tensor new_tensor_like(const Tensor& tensor) { return new_tensor_like(tensor, tensor.dtype()); }

// The same, but with unit stride along the last dimension whatever the tensor's: rows that kernels can write.
Tensor new_rows_like(const Tensor& tensor);

// set_kept_limit's, or at first the environment variable DALLE_KERNELS_CPU_KEEP_MB, in bytes; 256 MB without it.
// Throws std::invalid_argument where that is no number.
int64_t kept_limit();
void set_kept_limit(int64_t bytes);
int64_t kept_bytes();
void release_kept();  // gives back to the system what is kept

}  // namespace dalle
