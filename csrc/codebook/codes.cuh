// What the Gumbel kernels share: which codes a lane holds, and their logits and noise.
//
// One Philox counter yields the noise of four codes, one in each quarter of the codebook, so a step covers kCodes = 32
// neighbouring codes of every quarter. Lane (g, c) holds codes 8 c to 8 c + 7 of the 32 (16 bytes of logits) of rows g
// and g + 8, in all quarters. The tensor cores' operands want other codes in a lane: for sums over codes their order
// does not matter, so the codebook's rows are permuted as they are copied to shared memory, and no logit moves.

#pragma once

#include "codebook/cuda.h"
#include "cuda/fragments.cuh"
#include "cuda/launch.cuh"
#include "cuda/philox.cuh"

namespace {

constexpr int kCodes = 32;
constexpr int kStepCodes = 4 * kCodes;

struct Quarters {
  int codes, quarter;
  DEVICE explicit Quarters(int codes) : codes(codes), quarter((codes + 3) / 4) {}
  DEVICE int steps() const { return (quarter + kCodes - 1) / kCodes; }
  // Code `column` of quarter q, or -1 past the quarter's or the codebook's end.
  DEVICE int code(int q, int column) const {
    const int code = q * quarter + column;
    return column < quarter && code < codes ? code : -1;
  }
};

// Where row r of 32 codes lies in shared memory, so that 16 rows in a row are the k index of a product whose operand A
// holds codes 8 c to 8 c + 7 in lane c: product s takes 8 c + 4 s + (0, 1) as its columns 2 c and 2 c + 8 + (0, 1).
DEVICE int place_for_sum(int r) {
  return r % 8 / 4 * 16 + r % 4 / 2 * 8 + r / 8 * 2 + r % 2;
}

// The same, so that 8 rows in a row are the n index of a product t whose result holds codes 8 c + 2 t + (0, 1).
DEVICE int place_for_dot(int r) {
  return r % 8 / 2 * 8 + r / 8 * 2 + r % 2;
}

// Starts the copy of a step's codebook rows; `place` says where in its 32 a row goes. Zeros past the end.
template <class T, int kWidth, int kThreads, class Place>
DEVICE void copy_codes(char* tile, const T* codebook, const Quarters& quarters, int first, const Place& place) {
  constexpr int kPieces = kWidth / 8;
#pragma unroll 1
  for (int i = threadIdx.x; i < kStepCodes * kPieces; i += kThreads) {
    const int row = static_cast<unsigned>(i) / kPieces;
    const int piece = static_cast<unsigned>(i) % kPieces;
    const int code = quarters.code(row / kCodes, first + row % kCodes);
    const T* from = codebook + static_cast<int64_t>(code < 0 ? 0 : code) * kWidth + 8 * piece;
    copy_async(tile + (row / kCodes * kCodes + place(row % kCodes)) * kPitch<kWidth> + 16 * piece, from, code >= 0);
  }
}

// Logits of codes first to first + 7 of one row and quarter, -inf past the end. `whole`: rows and quarters are
// multiples of 16 bytes, so that eight logits are one load.
template <class T>
DEVICE void load_logits(float (&logits)[8], const T* row, const Quarters& quarters, int q, int first, bool whole) {
  if (whole) {
    if (first < quarters.quarter) {
      widen<T>(load_once(reinterpret_cast<const uint4*>(row + q * quarters.quarter + first)), logits);
    } else {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        logits[j] = -kInfinity;
      }
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const int code = quarters.code(q, first + j);
    logits[j] = code < 0 ? -kInfinity : unpack<T>(load(row + code).bits).x;
  }
}

template <class T>
DEVICE bool whole_pieces(const void* logits, int64_t stride, int codes) {
  return codes % 32 == 0 && stride % 8 == 0 && reinterpret_cast<uint64_t>(logits) % 16 == 0;
}

}  // namespace
