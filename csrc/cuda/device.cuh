// The vocabulary of the CUDA kernels: every memory access and every PTX instruction that they use goes through one
// of the functions below. tests/emulation/include/cuda/device.cuh declares the same names for a processor without a
// GPU and comes first on its include path, so that a kernel's source compiles unchanged for both.
//
// Two rules make that possible. Memory is touched only through load() and store() (and the copies), never by
// dereferencing a pointer. Shared memory is one dynamic array, shared_memory(), that a kernel divides itself.

#pragma once

#include <cuda_runtime.h>

#include <cstdint>

// Storage of the half types; arithmetic on them goes through unpack() and pack().
struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

#define DEVICE __device__ __forceinline__

DEVICE char* shared_memory() {
  extern __shared__ __align__(16) char dynamic_shared_memory[];
  return dynamic_shared_memory;
}

DEVICE uint32_t shared_address(const void* shared) { return static_cast<uint32_t>(__cvta_generic_to_shared(shared)); }

// ---------------------------------------------------------------------------------------------------------------
// Memory

template <class T>
DEVICE T load(const T* address) {
  return *address;
}

template <class T>
DEVICE void store(T* address, T value) {
  *address = value;
}

// 16 bytes from global to shared memory, asynchronously; zeros where not `valid` (nothing is read then).
DEVICE void copy_async(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}

DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `pending` of this thread's latest groups are still under way.
template <int pending>
DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// ---------------------------------------------------------------------------------------------------------------
// Matrix fragments (PTX ISA, "Matrix fragments for mma.m16n8k16"). With g = lane / 4 and c = lane % 4:
//   A 16 x 16: a0 (g, 2c), a1 (g + 8, 2c), a2 (g, 2c + 8), a3 (g + 8, 2c + 8), two neighbouring columns in a word;
//   B 16 x 8:  b0 (2c, g), b1 (2c + 8, g), two neighbouring rows in a word;
//   C 16 x 8:  c0, c1 (g, 2c), (g, 2c + 1), c2, c3 the same of row g + 8.

// Four 8 x 8 matrices of 16-bit elements; lane 8 i + j names row j of matrix i and gets word `lane` of each.
DEVICE void load_matrix(uint32_t (&words)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(shared_address(row))
               : "memory");
}

DEVICE void load_matrix_transposed(uint32_t (&words)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(shared_address(row))
               : "memory");
}

template <class T>
DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
DEVICE void mma<Bfloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
DEVICE void mma<Float16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---------------------------------------------------------------------------------------------------------------
// Numbers

// Two floats to one word, the first in its low half, rounded to nearest even.
template <class T>
DEVICE uint32_t pack(float low, float high);

template <>
DEVICE uint32_t pack<Bfloat16>(float low, float high) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

template <>
DEVICE uint32_t pack<Float16>(float low, float high) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

template <class T>
DEVICE float2 unpack(uint32_t word);

template <>
DEVICE float2 unpack<Bfloat16>(uint32_t word) {
  return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
}

template <>
DEVICE float2 unpack<Float16>(uint32_t word) {
  float2 value;
  asm("{ .reg .b16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high; }"
      : "=f"(value.x), "=f"(value.y)
      : "r"(word));
  return value;
}

// 2 ** x and log2(x) by the special function unit (about 2 ulp).
DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

DEVICE float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
