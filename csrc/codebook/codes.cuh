// What the Gumbel kernels share: which codes a lane holds, and their logits and noise.
//
// One Philox counter yields the noise of four codes, one in each quarter of the codebook, so a step covers a group of
// kGroup neighbouring codes of every quarter. Lane (g, c) holds codes kPer c to kPer c + kPer - 1 of the group, 16
// bytes of logits where the group has 32, of rows g and g + 8, in all quarters. The tensor cores' operands want other
// codes in a lane: for sums over codes their order does not matter, so the codebook's rows are permuted as they are
// copied to shared memory, and no logit moves.

#pragma once

#include "codebook/cuda.h"
#include "cuda/fragments.cuh"
#include "cuda/launch.cuh"
#include "cuda/philox.cuh"

namespace {

// What a product's operands are made of. float32 values are sums of three bfloat16 terms, exactly but for their last
// bit, and a product of two is the six products of terms that are not below float32's rounding.
template <class T>
struct Terms {
  using Element = T;
  static constexpr int kCount = 1;
};
template <>
struct Terms<float> {
  using Element = Bfloat16;
  static constexpr int kCount = 3;
};

// Two values as the words of their terms.
template <class T>
DEVICE void split(uint32_t (&words)[Terms<T>::kCount], float low, float high) {
  using Element = typename Terms<T>::Element;
#pragma unroll
  for (int i = 0; i < Terms<T>::kCount; ++i) {
    words[i] = pack<Element>(low, high);
    const float2 rounded = unpack<Element>(words[i]);
    low -= rounded.x;
    high -= rounded.y;
  }
}

// c += A B, of operands in terms; `half` says which two words of b are B.
template <class T>
DEVICE void multiply_terms(float (&c)[4], const uint32_t (&a)[Terms<T>::kCount][4],
                           const uint32_t (&b)[Terms<T>::kCount][4], int half) {
#pragma unroll
  for (int i = 0; i < Terms<T>::kCount; ++i) {
#pragma unroll
    for (int j = 0; i + j < Terms<T>::kCount; ++j) {
      mma<typename Terms<T>::Element>(c, a[i], b[j][2 * half], b[j][2 * half + 1]);
    }
  }
}

// Wide rows and terms take the registers that a large group's scores would need.
template <class T, int kWidth>
constexpr int kGroup = kWidth <= 128 && sizeof(T) == 2 ? 32 : 16;
template <class T, int kWidth>
constexpr int kPer = kGroup<T, kWidth> / 4;  // codes of a group in a lane
template <class T, int kWidth>
constexpr int kStepCodes = 4 * kGroup<T, kWidth>;
template <class T, int kWidth>
constexpr int kTileBytes = kStepCodes<T, kWidth> * kPitch<kWidth>;  // a term of a step's rows of the codebook

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

// Starts the copy of the codebook rows of a group of every quarter, term after term; `place` says where in its group a
// row goes. Zeros past the end.
template <class T, int kWidth, int kThreads, class Place>
DEVICE void copy_codes(char* tiles, const void* codebook_terms, const Quarters& quarters, int first,
                       const Place& place) {
  using Element = typename Terms<T>::Element;
  constexpr int kPieces = kWidth / 8;
  constexpr int kCodes = kGroup<T, kWidth>;
#pragma unroll 1
  for (int i = threadIdx.x; i < kStepCodes<T, kWidth> * kPieces; i += kThreads) {
    const int row = static_cast<unsigned>(i) / kPieces;
    const int piece = static_cast<unsigned>(i) % kPieces;
    const int code = quarters.code(row / kCodes, first + row % kCodes);
    const Element* from =
        static_cast<const Element*>(codebook_terms) + static_cast<int64_t>(code < 0 ? 0 : code) * kWidth + 8 * piece;
    char* to = tiles + (row / kCodes * kCodes + place(row % kCodes)) * kPitch<kWidth> + 16 * piece;
#pragma unroll
    for (int term = 0; term < Terms<T>::kCount; ++term) {
      copy_async(to + term * kTileBytes<T, kWidth>, from + static_cast<int64_t>(term) * quarters.codes * kWidth,
                 code >= 0);
    }
  }
}

// A matrix of each term, `bytes` apart.
template <class T>
DEVICE void load_terms(uint32_t (&words)[Terms<T>::kCount][4], const char* row, int bytes) {
#pragma unroll
  for (int term = 0; term < Terms<T>::kCount; ++term) {
    load_matrix(words[term], row + term * bytes);
  }
}

template <class T>
DEVICE void load_terms_transposed(uint32_t (&words)[Terms<T>::kCount][4], const char* row, int bytes) {
#pragma unroll
  for (int term = 0; term < Terms<T>::kCount; ++term) {
    load_matrix_transposed(words[term], row + term * bytes);
  }
}

template <class T>
DEVICE float as_float(T value) {
  if constexpr (sizeof(T) == 4) {
    return value;
  } else {
    return unpack<T>(value.bits).x;
  }
}

// Logits of codes first to first + kCount - 1 of one row and quarter, -inf past the end. `whole`: rows and quarters are
// multiples of 16 bytes, so that they are one load.
template <class T, int kCount>
DEVICE void load_logits(float (&logits)[kCount], const T* row, const Quarters& quarters, int q, int first, bool whole) {
  if (whole && first < quarters.quarter) {
    const T* from = row + q * quarters.quarter + first;
    if constexpr (kCount * sizeof(T) == 16) {
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
    logits[j] = code < 0 ? -kInfinity : as_float(load(row + code));
  }
}

template <class T>
DEVICE bool whole_pieces(const void* logits, int64_t stride, int codes) {
  return codes % 32 == 0 && stride % kVector<T> == 0 && reinterpret_cast<uint64_t>(logits) % 16 == 0;
}

}  // namespace
