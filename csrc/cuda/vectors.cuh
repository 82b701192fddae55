// Rows of a tensor in 16-byte pieces, and their elements as floats.

#pragma once

#include "cuda/device.cuh"

// Elements of T in 16 bytes.
template <class T>
constexpr int kVector = 16 / sizeof(T);

template <class T>
DEVICE void widen(const uint4& piece, float (&values)[kVector<T>]) {
  const uint32_t words[4] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      values[i] = __uint_as_float(words[i]);
    } else {
      const float2 pair = unpack<T>(words[i]);
      values[2 * i] = pair.x;
      values[2 * i + 1] = pair.y;
    }
  }
}

// Two neighbouring elements; `address` is a multiple of twice their size.
template <class T>
DEVICE void store_pair(T* address, float first, float second) {
  if constexpr (sizeof(T) == 4) {
    store(reinterpret_cast<float2*>(address), make_float2(first, second));
  } else {
    store(reinterpret_cast<uint32_t*>(address), pack<T>(first, second));
  }
}
