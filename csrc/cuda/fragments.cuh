// Rows of matrices as operands of the tensor cores' products.
//
// Sixteen rows make operand A of m16n8k16; lane (g, c) = (lane / 4, lane % 4) holds elements of rows g and g + 8.

#pragma once

#include "cuda/vectors.cuh"

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kInfinity = INFINITY;

// A head's contiguous rows, `stride` elements apart.
template <class T>
struct HeadRows {
  const T* data;
  int64_t stride;
  DEVICE const T* row(int index) const { return data + index * stride; }
};

// Transposes a 4 x 4 matrix of words held by the four lanes of a quad, lane c having column c: afterwards word i of
// lane c is what word c of lane i was.
DEVICE void transpose_quad(uint32_t (&words)[4], int c) {
#pragma unroll
  for (int distance = 1; distance <= 2; distance *= 2) {
    const bool high = (c & distance) != 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if ((i & distance) == 0) {
        const uint32_t sent = high ? words[i] : words[i + distance];
        const uint32_t got = __shfl_xor_sync(0xffffffffu, sent, distance);
        (high ? words[i] : words[i + distance]) = got;
      }
    }
  }
}

// Sixteen rows as operand A, one fragment for each 16 columns. Lane (g, c) reads pieces c, c + 4, ... of rows g and
// g + 8; a quad's transposition then gives it words c of all pieces, which is the fragment.
template <class T, int kWidth>
DEVICE void load_rows(uint32_t (&fragments)[kWidth / 16][4], const HeadRows<T>& rows, const int (&token)[2], int c) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int first = 0; first < kWidth / 8; first += 4) {
      uint4 piece = make_uint4(0, 0, 0, 0);
      if (token[half] >= 0 && first + c < kWidth / 8) {
        piece = load(reinterpret_cast<const uint4*>(rows.row(token[half])) + first + c);
      }
      uint32_t words[4] = {piece.x, piece.y, piece.z, piece.w};
      transpose_quad(words, c);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (first + i < kWidth / 8) {
          fragments[(first + i) / 2][(first + i) % 2 * 2 + half] = words[i];
        }
      }
    }
  }
}

// Turns the signs of 16-bit elements where `sign` has their bits.
template <int kFragments>
DEVICE void flip_signs(uint32_t (&fragments)[kFragments][4], uint32_t sign) {
#pragma unroll
  for (int k = 0; k < kFragments; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      fragments[k][i] ^= sign;
    }
  }
}

// Sixteen rows of sums (operand C, one fragment for each 8 columns) times `factor` of their row, rounded to T.
template <class T, int kWidth>
DEVICE void store_rows(T* data, int64_t stride, const float (&sums)[kWidth / 8][4], const float (&factor)[2],
                       const int (&token)[2], int c) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int first = 0; first < kWidth / 8; first += 4) {
      uint32_t words[4] = {};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (first + i < kWidth / 8) {
          const float (&sum)[4] = sums[first + i];
          words[i] = pack<T>(sum[2 * half] * factor[half], sum[2 * half + 1] * factor[half]);
        }
      }
      transpose_quad(words, c);
      if (token[half] >= 0 && first + c < kWidth / 8) {
        store(reinterpret_cast<uint4*>(data + token[half] * stride) + first + c,
              make_uint4(words[0], words[1], words[2], words[3]));
      }
    }
  }
}

// The largest (or the sum) over the four lanes of a quad, which hold one row.
DEVICE float largest_of_quad(float value) {
  value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, 1));
  return fmaxf(value, __shfl_xor_sync(0xffffffffu, value, 2));
}

DEVICE float sum_of_quad(float value) {
  value += __shfl_xor_sync(0xffffffffu, value, 1);
  return value + __shfl_xor_sync(0xffffffffu, value, 2);
}
