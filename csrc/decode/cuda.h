// Host interface of the CUDA decoding kernel.

#pragma once

#include <cstdint>

#include "cuda/types.h"

constexpr int kPiece = 16;               // bytes of a row that a lane reads at once
constexpr int kMostBytes = 32 * kPiece;  // of a row: a warp's
constexpr int kSoftmaxState = 2;  // numbers that a split leaves beside a row's sums: largest score, sum of weights

struct DecodeParameters {
  const void* q;  // [B, H, 1, D], as k and v: contiguous rows at multiples of 16 bytes
  const void* k;
  const void* v;
  void* keys;  // [B, H, L, D]
  void* values;
  void* out;            // [B, H, 1, D], contiguous
  float* partial;       // [B * H, splits, D + kSoftmaxState], where splits > 1
  const int32_t* slot;  // DecodeTable
  const int32_t* prefix;
  const int64_t* offsets;
  const int32_t* slots;
  const int64_t* position;  // one element
  int64_t q_strides[2];     // elements between batches and between heads
  int64_t k_strides[2];
  int64_t v_strides[2];
  int64_t keys_strides[3];  // batches, heads, slots
  int64_t values_strides[3];
  int batch, heads, width, splits;
  float scale;
};

void decode_attention(Element element, const DecodeParameters& parameters, void* stream);
