#include "tensor.h"

#include <algorithm>

namespace dalle {
namespace {

// torch's numbers of the dtypes, asked for once.
struct Codes {
  const int32_t of[6] = {aoti_torch_dtype_float32(), aoti_torch_dtype_bfloat16(), aoti_torch_dtype_int8(),
                         aoti_torch_dtype_int32(),   aoti_torch_dtype_int64(),    aoti_torch_dtype_bool()};
};

const Codes& codes() {
  static const Codes codes;
  return codes;
}

std::vector<int64_t> contiguous_strides(int64_t dimensions, const int64_t* sizes) {
  std::vector<int64_t> strides(static_cast<size_t>(dimensions));
  int64_t stride = 1;
  for (int64_t i = dimensions - 1; i >= 0; i--) {
    strides[size_t(i)] = stride;
    stride *= std::max<int64_t>(sizes[i], 1);
  }
  return strides;
}

Tensor copied(const Tensor& tensor, DType dtype) {
  const std::vector<int64_t> strides = contiguous_strides(tensor.dim(), tensor.sizes());
  Tensor copy = empty_strided(tensor.dim(), tensor.sizes(), strides.data(), dtype);
  succeeded(aoti_torch_copy_(copy.get(), tensor.get(), 0), "copy a tensor");
  return copy;
}

}  // namespace

void torch_failed(const char* to_do) {
  std::string text = std::string("dalle_kernels: torch failed to ") + to_do;
  if (&torch_exception_get_what_without_backtrace != nullptr)
    text += std::string(": ") + torch_exception_get_what_without_backtrace();
  throw std::runtime_error(text);
}

const char* dtype_name(DType dtype) {
  constexpr const char* names[] = {"float32", "bfloat16", "int8", "int32", "int64", "bool", "another"};
  return names[int(dtype)];
}

int64_t dtype_size(DType dtype) {
  constexpr int64_t sizes[] = {4, 2, 1, 4, 8, 1, 0};
  return sizes[int(dtype)];
}

int32_t torch_dtype(DType dtype) { return codes().of[int(dtype)]; }

void Tensor::look() {
  int32_t code = 0;
  succeeded(aoti_torch_get_dim(handle_, &dim_), "tell a tensor's dimensions");
  succeeded(aoti_torch_get_sizes(handle_, &sizes_), "tell a tensor's sizes");
  succeeded(aoti_torch_get_strides(handle_, &strides_), "tell a tensor's strides");
  succeeded(aoti_torch_get_dtype(handle_, &code), "tell a tensor's dtype");
  for (int i = 0; i < int(DType::other); i++)
    if (codes().of[i] == code) dtype_ = DType(i);
}

bool Tensor::is_contiguous() const {
  int64_t stride = 1;
  for (int64_t i = dim_ - 1; i >= 0; i--) {
    if (sizes_[i] != 1 && strides_[i] != stride && numel() != 0) return false;
    stride *= sizes_[i];
  }
  return true;
}

bool Tensor::same_shape(const Tensor& other) const {
  return dim_ == other.dim_ && std::equal(sizes_, sizes_ + dim_, other.sizes_);
}

Tensor empty_strided(int64_t dimensions, const int64_t* sizes, const int64_t* strides, DType dtype) {
  AtenTensorHandle handle = nullptr;
  succeeded(aoti_torch_empty_strided(dimensions, sizes, strides, torch_dtype(dtype), aoti_torch_device_type_cpu(), 0,
                                     &handle),
            "allocate a tensor");
  return Tensor(handle);
}

Tensor empty(const std::vector<int64_t>& sizes, DType dtype) {
  const int64_t dimensions = int64_t(sizes.size());
  return empty_strided(dimensions, sizes.data(), contiguous_strides(dimensions, sizes.data()).data(), dtype);
}

Tensor contiguous(const Tensor& tensor) { return tensor.is_contiguous() ? tensor : copied(tensor, tensor.dtype()); }

Tensor contiguous_float32(const Tensor& tensor) {
  return tensor.dtype() == DType::float32 && tensor.is_contiguous() ? tensor : copied(tensor, DType::float32);
}

std::string shape_of(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t i = 0; i < tensor.dim(); i++) text += (i ? ", " : "") + std::to_string(tensor.size(i));
  return text + "]";
}

}  // namespace dalle
