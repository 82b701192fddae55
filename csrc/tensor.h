// Tensors as the torch-facing files (csrc/*/cpu.cpp) handle them, over torch_abi.h.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "torch_abi.h"

namespace dalle {

enum class DType { float32, bfloat16, int8, int32, int64, boolean, other };

const char* dtype_name(DType dtype);
int64_t dtype_size(DType dtype);
int32_t torch_dtype(DType dtype);  // torch's number for it

[[noreturn]] void torch_failed(const char* to_do);

// Throws what Python sees as RuntimeError where a call into torch failed.
inline void succeeded(AOTITorchError error, const char* to_do) {
  if (error != 0) torch_failed(to_do);
}

// Owns a reference to a tensor of torch. Sizes and strides are torch's own arrays: they live as long as it does.
class Tensor {
 public:
  Tensor() = default;
  explicit Tensor(AtenTensorHandle owned) : handle_(owned) { look(); }
  Tensor(const Tensor& other) {
    if (other.handle_ == nullptr) return;
    succeeded(aoti_torch_new_tensor_handle(other.handle_, &handle_), "share a tensor");
    look();
  }
  Tensor(Tensor&& other) noexcept { swap(other); }
  Tensor& operator=(Tensor other) noexcept {
    swap(other);
    return *this;
  }
  ~Tensor() {
    if (handle_ != nullptr) aoti_torch_delete_tensor_object(handle_);
  }

  bool defined() const { return handle_ != nullptr; }
  AtenTensorHandle get() const { return handle_; }
  AtenTensorHandle release() { return std::exchange(handle_, nullptr); }

  int64_t dim() const { return dim_; }
  const int64_t* sizes() const { return sizes_; }
  const int64_t* strides() const { return strides_; }
  int64_t size(int64_t i) const { return sizes_[i < 0 ? i + dim_ : i]; }
  int64_t stride(int64_t i) const { return strides_[i < 0 ? i + dim_ : i]; }
  int64_t numel() const {
    int64_t count = 1;
    for (int64_t i = 0; i < dim_; i++) count *= sizes_[i];
    return count;
  }
  DType dtype() const { return dtype_; }
  int64_t element_size() const { return dtype_size(dtype_); }
  bool is_contiguous() const;
  bool same_shape(const Tensor& other) const;

  // Elements to read (T const) or to write, which makes a lazy copy real.
  template <class T>
  T* data() const {
    if constexpr (std::is_const_v<T>) {
      const void* data = nullptr;
      succeeded(torch_get_const_data_ptr(handle_, &data), "tell where a tensor's elements are");
      return static_cast<T*>(data);
    } else {
      void* data = nullptr;
      succeeded(torch_get_mutable_data_ptr(handle_, &data), "tell where a tensor's elements are");
      return static_cast<T*>(data);
    }
  }

 private:
  void look();
  void swap(Tensor& other) noexcept {
    std::swap(handle_, other.handle_);
    std::swap(dim_, other.dim_);
    std::swap(sizes_, other.sizes_);
    std::swap(strides_, other.strides_);
    std::swap(dtype_, other.dtype_);
  }

  AtenTensorHandle handle_ = nullptr;
  int64_t dim_ = 0, *sizes_ = nullptr, *strides_ = nullptr;
  DType dtype_ = DType::other;
};

// A fresh tensor of torch's own, uninitialised, contiguous or with strides.
Tensor empty(const std::vector<int64_t>& sizes, DType dtype);
Tensor empty_strided(int64_t dimensions, const int64_t* sizes, const int64_t* strides, DType dtype);

// The tensor itself where it is contiguous, otherwise a copy.
Tensor contiguous(const Tensor& tensor);
Tensor contiguous_float32(const Tensor& tensor);

std::string shape_of(const Tensor& tensor);  // "[2, 3]"

// Rows that lie one element after another; where a row has one element, or there is none, strides say nothing.
inline bool has_rows(const Tensor& tensor) {
  return tensor.stride(-1) == 1 || tensor.size(-1) == 1 || tensor.numel() == 0;
}

namespace message {
inline std::string text(const char* part) { return part; }
inline std::string text(const std::string& part) { return part; }
inline std::string text(DType part) { return dtype_name(part); }
inline std::string text(int64_t part) { return std::to_string(part); }
}  // namespace message

// Throws what Python sees as RuntimeError, with the parts as its message, unless `holds`. (Of other types torch makes
// RuntimeErrors too, from 2.15 on.)
template <class... Parts>
void require(bool holds, const Parts&... parts) {
  if (!holds) throw std::runtime_error((message::text(parts) + ...));
}

}  // namespace dalle
