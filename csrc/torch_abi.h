// What the CPU library calls of PyTorch: a part of its stable C interface, with which a library built once loads in
// every later torch. Declared here, the library builds without a torch at hand; tests/test_abi.py holds these
// declarations against the headers of the torch that is installed.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dalle {

// What the declarations below, and the meaning of a StableIValue, are taken from: torch 2.11, the oldest with
// torch_from_blob. torch converts arguments as this version would.
constexpr uint64_t kTorchAbi = uint64_t(2) << 56 | uint64_t(11) << 48;

}  // namespace dalle

using StableIValue = uint64_t;  // an argument or result: a number's bits, a handle, or what an optional points to
using AOTITorchError = int32_t;
using AtenTensorHandle = struct AtenTensorOpaque*;
using TorchLibraryHandle = class TorchLibraryOpaque*;

extern "C" {

AOTITorchError aoti_torch_library_init_fragment(const char* name, const char* file, uint32_t line,
                                                TorchLibraryHandle* library);
AOTITorchError aoti_torch_library_init_impl(const char* name, const char* dispatch_key, const char* file, uint32_t line,
                                            TorchLibraryHandle* library);
AOTITorchError aoti_torch_library_def(TorchLibraryHandle library, const char* schema);
AOTITorchError torch_library_impl(TorchLibraryHandle library, const char* name,
                                  void (*function)(StableIValue* stack, uint64_t inputs, uint64_t outputs),
                                  uint64_t abi);

AOTITorchError aoti_torch_new_tensor_handle(AtenTensorHandle tensor, AtenTensorHandle* handle);
AOTITorchError aoti_torch_delete_tensor_object(AtenTensorHandle tensor);
AOTITorchError aoti_torch_get_dim(AtenTensorHandle tensor, int64_t* dimensions);
AOTITorchError aoti_torch_get_sizes(AtenTensorHandle tensor, int64_t** sizes);
AOTITorchError aoti_torch_get_strides(AtenTensorHandle tensor, int64_t** strides);
AOTITorchError aoti_torch_get_dtype(AtenTensorHandle tensor, int32_t* dtype);
AOTITorchError torch_get_const_data_ptr(AtenTensorHandle tensor, const void** data);
AOTITorchError torch_get_mutable_data_ptr(AtenTensorHandle tensor, void** data);
AOTITorchError aoti_torch_copy_(AtenTensorHandle to, AtenTensorHandle from, int32_t non_blocking);
AOTITorchError aoti_torch_empty_strided(int64_t dimensions, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                                        int32_t device_type, int32_t device_index, AtenTensorHandle* tensor);
AOTITorchError torch_from_blob(void* data, int64_t dimensions, const int64_t* sizes, const int64_t* strides,
                               int64_t storage_offset, int32_t dtype, int32_t device_type, int32_t device_index,
                               AtenTensorHandle* tensor, int32_t layout, const uint8_t* metadata, int64_t metadata_size,
                               void (*deleter)(void* data, void* context), void* context);

int32_t aoti_torch_device_type_cpu();
int32_t aoti_torch_layout_strided();
int32_t aoti_torch_dtype_float32();
int32_t aoti_torch_dtype_bfloat16();
int32_t aoti_torch_dtype_int8();
int32_t aoti_torch_dtype_int32();
int32_t aoti_torch_dtype_int64();
int32_t aoti_torch_dtype_bool();

AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t grain,
                                  void (*body)(int64_t begin, int64_t end, void* context), void* context);
AOTITorchError torch_get_num_threads(uint32_t* threads);

// What was wrong when a call last failed on this thread. From torch 2.13 on, so that it may be absent.
const char* torch_exception_get_what_without_backtrace() __attribute__((weak));
}
