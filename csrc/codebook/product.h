// Small matrix products out of registers: c += a b for tiles that fit the cache.
//
// Everything is addressed in 32-bit words: a float, or a pair of bf16 values that lie next to each other along the
// depth (PairProduct: one instruction multiplies both and adds in float32). A block of 6 x 4 vectors of c stays in
// registers while its depth runs: per step 4 loads of b and 6 broadcasts of a feed 24 multiply-adds.
#pragma once

#include "codebook/kernels.h"
#include "multiply.h"

DALLE_TARGET_BEGIN
namespace dalle::DALLE_ISA {

using Word = uint32_t __attribute__((may_alias));

constexpr int kBlockRows = kLanes == 4 ? 4 : 6, kBlockVectors = kLanes == 8 ? 2 : 4;

struct Left {  // a: element (row, step) at data[row * row_stride + step * step_stride]
  static constexpr Adjacent kAdjacent = Adjacent::nothing;
  const Word* data;
  ptrdiff_t row_stride, step_stride;

  DALLE_METHOD const Word* at(int i) const { return data + i * row_stride; }
  DALLE_METHOD void advance(ptrdiff_t steps) { data += steps * step_stride; }
};

// b is packed in blocks of kBlockColumns columns (the last one narrower), each with its rows one after the other: a
// block's rows then fall into all sets of the first-level cache, which rows a power of two apart would not.
constexpr int64_t kBlockColumns = kBlockVectors * kLanes;

// Where (step, column) of a packed table of `depth` steps lies.
DALLE_INLINE int64_t packed_at(int64_t step, int64_t column, int64_t columns, int64_t depth) {
  const int64_t start = column / kBlockColumns * kBlockColumns;
  const int64_t width = columns - start < kBlockColumns ? columns - start : kBlockColumns;
  return start * depth + step * width + (column - start);
}

template <class P, int Rows, int Vectors>
__attribute__((noinline)) static void block_product(Left a, const Word* b, ptrdiff_t b_stride, float* c,
                                                    ptrdiff_t c_stride, int depth, bool add) {
  F total[Rows][Vectors];
  DALLE_UNROLL for (int i = 0; i < Rows; i++)
    DALLE_UNROLL for (int j = 0; j < Vectors; j++)
      total[i][j] = add ? load(c + i * c_stride + j * kLanes) : zero();
  multiply<P, Rows, Vectors>(total, depth, a, Lines{(const float*)b, b_stride});
  DALLE_UNROLL for (int i = 0; i < Rows; i++)
    DALLE_UNROLL for (int j = 0; j < Vectors; j++) store(c + i * c_stride + j * kLanes, total[i][j]);
}

template <class P, int Vectors>
static void column_product(Left a, const Word* b, ptrdiff_t b_stride, float* c, ptrdiff_t c_stride, int64_t rows,
                           int depth, bool add) {
  int64_t i = 0;
  const auto at = [&] { return Left{a.data + i * a.row_stride, a.row_stride, a.step_stride}; };
  // Eight rows are two blocks of four: one by one, rows take twice as long.
  for (; i + kBlockRows <= rows && rows - i != 8; i += kBlockRows)
    block_product<P, kBlockRows, Vectors>(at(), b, b_stride, c + i * c_stride, c_stride, depth, add);
  for (; i + 4 <= rows; i += 4)
    block_product<P, 4, Vectors>(at(), b, b_stride, c + i * c_stride, c_stride, depth, add);
  for (; i < rows; i++) block_product<P, 1, Vectors>(at(), b, b_stride, c + i * c_stride, c_stride, depth, add);
}

// c [rows, columns] (+)= a [rows, depth words] b [depth words, columns]; columns in whole vectors. Every element of c
// adds up in the order of the depth, whichever block it falls into: results do not depend on how rows are shared out.
template <class P>
static void product(Left a, const Word* b, float* c, ptrdiff_t c_stride, int64_t rows, int64_t columns, int depth,
                    bool add) {
  int64_t j = 0;
  for (; j + kBlockColumns <= columns; j += kBlockColumns)
    column_product<P, kBlockVectors>(a, b + j * depth, kBlockColumns, c + j, c_stride, rows, depth, add);
  const int64_t rest = columns - j;
  b += j * depth;
  for (; j + 2 * kLanes <= columns; j += 2 * kLanes, b += 2 * kLanes)
    column_product<P, 2>(a, b, rest, c + j, c_stride, rows, depth, add);
  if (j < columns) column_product<P, 1>(a, b, rest, c + j, c_stride, rows, depth, add);
}

// Writes values at .. of a left-hand side: float32, or bfloat16 that pairs of neighbours are made of.
template <class P>
DALLE_INLINE void put_word(float* table, int64_t at, F values) {
  if constexpr (P::kDepth == 1) store(table + at, values);
  else store((bf16*)table + at, values);
}

// The words j .. of a row of `width` values, 0 past its end.
template <class P, class T>
DALLE_INLINE F load_words(const T* row, int64_t j, int64_t width) {
  const T* from = row + j * P::kDepth;
  const int64_t left = width - j * P::kDepth;
  if constexpr (P::kDepth == 1) {
    return left >= kLanes ? load(from) : left > 0 ? load(from, int(left)) : zero();
  } else {
    if (left >= 2 * kLanes) return load((const float*)from);
    uint32_t words[kLanes] = {};
    if (left > 0) std::memcpy(words, from, size_t(left) * sizeof(T));
    return load((const float*)words);
  }
}

// Packs `count` rows of a dense table as columns first_column .. first_column + size - 1 of b, whose `columns` come in
// whole blocks; columns past the last row become 0. Both are multiples of kLanes.
template <class P, class T>
static void pack_columns(const T* table, int64_t count, int64_t width, Word* packed, int64_t first_column, int64_t size,
                         int64_t columns) {
  const int64_t depth = round_up(width, kPad) / P::kDepth;
  for (int64_t c = 0; c < size; c += kLanes)
    for (int64_t step = 0; step < depth; step += kLanes) {
      F words[kLanes];
      DALLE_UNROLL for (int i = 0; i < kLanes; i++)
        words[i] = c + i < count ? load_words<P>(table + (c + i) * width, step, width) : zero();
      transpose(words);
      float* to = (float*)packed + packed_at(step, first_column + c, columns, depth);
      DALLE_UNROLL for (int i = 0; i < kLanes; i++)
        if (step + i < depth) store(to + i * kBlockColumns, words[i]);
    }
}

// Packs `count` rows of a table, `stride` apart, into steps first .. first + steps - 1 of b: as floats, or as pairs of rows. Rows past
// the last, and columns past `width`, become 0.
template <class P, class T>
static void pack_rows(const T* table, int64_t count, int64_t width, int64_t stride, Word* packed, int64_t first_step,
                      int64_t steps, int64_t depth) {
  const int64_t columns = round_up(width, kPad);
  for (int64_t step = 0; step < steps; step++)
    for (int64_t j = 0; j < columns; j += kLanes) {
      const int64_t i = step * P::kDepth;
      const int n = int(width - j < 0 ? 0 : width - j < kLanes ? width - j : kLanes);
      const T* from = table + i * stride + j;
      uint32_t* to = (uint32_t*)packed + packed_at(first_step + step, j, columns, depth);
      const F first = i >= count ? zero() : n == kLanes ? load(from) : load(from, n);
      if constexpr (P::kDepth == 1) {
        store(to, as_words(first));
      } else {
        const F second = i + 1 >= count ? zero() : n == kLanes ? load(from + stride) : load(from + stride, n);
        store(to, P::pack(first, second));
      }
    }
}

}  // namespace dalle::DALLE_ISA
DALLE_TARGET_END
