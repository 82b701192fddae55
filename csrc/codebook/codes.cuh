// What the Gumbel kernels share: which codes a lane holds, and their logits and noise.
//
// One Philox counter yields the noise of four codes, one in each quarter of the codebook, so a step covers a group of
// kGroup neighbouring codes of every quarter. Lane (g, c) holds codes kPer c to kPer c + kPer - 1 of the group, 16 bytes
// of logits where the group has 32, of rows g and g + 8, in all quarters. The tensor cores' operands want other codes
// in a lane: for sums over codes their order does not matter, so the codebook's rows are permuted as they are copied to
// shared memory, and no logit moves.

#pragma once

#include "codebook/cuda.h"
#include "cuda/fragments.cuh"
#include "cuda/launch.cuh"
#include "cuda/philox.cuh"

namespace {

// Wide rows take the registers that a large group's scores would need.
template <int kWidth>
constexpr int kGroup = kWidth <= 128 ? 32 : 16;
template <int kWidth>
constexpr int kPer = kGroup<kWidth> / 4;  // codes of a group in a lane
template <int kWidth>
constexpr int kStepCodes = 4 * kGroup<kWidth>;

struct Quarters {
  int codes, quarter;
  DEVICE explicit Quarters(int codes) : codes(codes), quarter((codes + 3) / 4) {}
  // Code `column` of quarter q, or -1 past the quarter's or the codebook's end.
  DEVICE int code(int q, int column) const {
    const int code = q * quarter + column;
    return column < quarter && code < codes ? code : -1;
  }
};

// Where code r of a group lies in shared memory, so that 16 rows in a row are the k index of a product whose operand A
// holds codes kPer c + j in lane c: product s takes j = 4 s + (0, 1) and 4 s + (2, 3) as its columns 2 c + (0, 1) and
// 2 c + 8 + (0, 1).
template <int kPer>
DEVICE int place_for_sum(int r) {
  return r % kPer / 4 * 16 + r % 4 / 2 * 8 + r / kPer * 2 + r % 2;
}

// The same, so that 8 rows in a row are the n index of a product t whose result holds codes kPer c + 2 t + (0, 1).
template <int kPer>
DEVICE int place_for_dot(int r) {
  return r % kPer / 2 * 8 + r / kPer * 2 + r % 2;
}

// Starts the copy of the codebook rows of a group of every quarter; `place` says where in its group a row goes. Zeros
// past the end.
template <class T, int kWidth, int kThreads, class Place>
DEVICE void copy_codes(char* tile, const T* codebook, const Quarters& quarters, int first, const Place& place) {
  constexpr int kPieces = kWidth / 8;
  constexpr int kCodes = kGroup<kWidth>;
#pragma unroll 1
  for (int i = threadIdx.x; i < kStepCodes<kWidth> * kPieces; i += kThreads) {
    const int row = static_cast<unsigned>(i) / kPieces;
    const int piece = static_cast<unsigned>(i) % kPieces;
    const int code = quarters.code(row / kCodes, first + row % kCodes);
    const T* from = codebook + static_cast<int64_t>(code < 0 ? 0 : code) * kWidth + 8 * piece;
    copy_async(tile + (row / kCodes * kCodes + place(row % kCodes)) * kPitch<kWidth> + 16 * piece, from, code >= 0);
  }
}

// Logits of codes first to first + kCount - 1 of one row and quarter, -inf past the end. `whole`: rows and quarters are
// multiples of 16 bytes, so that they are one load.
template <class T, int kCount>
DEVICE void load_logits(float (&logits)[kCount], const T* row, const Quarters& quarters, int q, int first,
                        bool whole) {
  if (whole && first < quarters.quarter) {
    const T* from = row + q * quarters.quarter + first;
    if constexpr (kCount == 8) {
      widen<T>(load_once(reinterpret_cast<const uint4*>(from)), logits);
    } else {
      const uint2 piece = load(reinterpret_cast<const uint2*>(from));
      const float2 low = unpack<T>(piece.x);
      const float2 high = unpack<T>(piece.y);
      logits[0] = low.x;
      logits[1] = low.y;
      logits[2] = high.x;
      logits[3] = high.y;
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    const int code = whole ? -1 : quarters.code(q, first + j);
    logits[j] = code < 0 ? -kInfinity : unpack<T>(load(row + code).bits).x;
  }
}

template <class T>
DEVICE bool whole_pieces(const void* logits, int64_t stride, int codes) {
  return codes % 32 == 0 && stride % 8 == 0 && reinterpret_cast<uint64_t>(logits) % 16 == 0;
}

}  // namespace
