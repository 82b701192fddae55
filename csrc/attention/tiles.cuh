// What the attention kernels share: fragments of row tiles, column tiles in shared memory, masks, and the walk.
//
// A block has kWarps warps and owns a tile of kRowTile = 16 kWarps rows at a time, 16 rows to a warp, kept in
// registers as operand A of m16n8k16. It walks over column tiles that lie in slots of shared memory. Which tile goes to
// which slot, and when, was planned on the host for the whole walk (the tile that is needed last makes room), so text
// keys stay where they are and a window of image keys slides along, without the kernel knowing of either.
// Loads run kAhead steps in front of the products.

#pragma once

#include "attention/cuda.h"
#include "cuda/fragments.cuh"

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kRowTile = 16 * kWarps;
constexpr int kAhead = 2;

// One head of one sample.
template <class T>
DEVICE Table<T> head_of(const Rows& rows, int batch, int head) {
  return {static_cast<const T*>(rows.data) + batch * rows.strides[0] + head * rows.strides[1], rows.strides[2]};
}

// Starts the copy of the `kColumns` rows at positions `first` on into a tile of shared memory, zeros past the end.
template <class T, int kWidth, int kColumns>
DEVICE void copy_tile(char* tile, const Table<T>& table, const int32_t* order, int first, int length) {
  constexpr int kPieces = kWidth / 8;
#pragma unroll 1  // unrolled, its addresses would take registers that the products need
  for (int i = threadIdx.x; i < kColumns * kPieces; i += kThreads) {
    const int row = static_cast<unsigned>(i) / kPieces;
    const int piece = static_cast<unsigned>(i) % kPieces;
    const bool valid = first + row < length;
    const int token = valid ? load(order + first + row) : 0;
    copy_async(tile + row * kPitch<kWidth> + 16 * piece, table.row(token) + 8 * piece, valid);
  }
}

// sums[n] += A B^T for the tile's rows 8 n to 8 n + 7: scores of the block's rows against the tile's.
template <class T, int kWidth, int kColumns>
DEVICE void multiply_transposed(float (&sums)[kColumns / 8][4], const uint32_t (&a)[kWidth / 16][4], const char* tile,
                                int lane) {
  const char* mine = tile + (lane / 16 * 8 + lane % 8) * kPitch<kWidth> + lane / 8 % 2 * 16;
#pragma unroll
  for (int n = 0; n < kColumns / 16; ++n) {
#pragma unroll
    for (int k = 0; k < kWidth / 16; ++k) {
      uint32_t b[4];
      load_matrix(b, mine + n * 16 * kPitch<kWidth> + k * 32);
      mma<T>(sums[2 * n], a[k], b[0], b[1]);
      mma<T>(sums[2 * n + 1], a[k], b[2], b[3]);
    }
  }
}

// sums[n] += weights B for columns 8 n to 8 n + 7 of the tile; weights are the block's rows against the tile's rows.
template <class T, int kWidth, int kColumns>
DEVICE void multiply(float (&sums)[kWidth / 8][4], const float (&weights)[kColumns / 8][4], const char* tile,
                     int lane) {
  const char* mine = tile + (lane / 8 % 2 * 8 + lane % 8) * kPitch<kWidth> + lane / 16 * 16;
#pragma unroll
  for (int k = 0; k < kColumns / 16; ++k) {
    const uint32_t a[4] = {pack<T>(weights[2 * k][0], weights[2 * k][1]), pack<T>(weights[2 * k][2], weights[2 * k][3]),
                           pack<T>(weights[2 * k + 1][0], weights[2 * k + 1][1]),
                           pack<T>(weights[2 * k + 1][2], weights[2 * k + 1][3])};
#pragma unroll
    for (int n = 0; n < kWidth / 16; ++n) {
      uint32_t b[4];
      load_matrix_transposed(b, mine + k * 16 * kPitch<kWidth> + n * 32);
      mma<T>(sums[2 * n], a, b[0], b[1]);
      mma<T>(sums[2 * n + 1], a, b[2], b[3]);
    }
  }
}

// The visible columns of rows g and g + 8 of a warp, one bit each.
template <int kColumns>
struct Visible {
  static constexpr int kWords = kColumns / 32;
  uint32_t words[2][kWords];

  // Row `row` and row + 8 of mask `id`.
  DEVICE void read(const int32_t* masks, int id, int row) {
    const int32_t* mask = masks + (static_cast<int64_t>(id) * kRowTile + row) * kWords;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        words[half][i] = static_cast<uint32_t>(load(mask + half * 8 * kWords + i));
      }
    }
  }

  DEVICE void remove_rows(const bool (&removed)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        words[half][i] = removed[half] ? 0u : words[half][i];
      }
    }
  }

  // Takes out the columns of the tile at `first` whose token is padding.
  DEVICE void remove_padding(const bool* padding, const int32_t* order, int first, int length, int lane) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const int position = first + 32 * i + lane;
      const bool seen = position < length && !load(padding + load(order + (position < length ? position : 0)));
      const uint32_t word = __ballot_sync(0xffffffffu, seen);
      words[0][i] &= word;
      words[1][i] &= word;
    }
  }

  DEVICE bool any_in_warp() const {
    uint32_t some = 0;
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      some |= words[0][i] | words[1][i];
    }
    return __any_sync(0xffffffffu, some != 0);
  }

  // Element i of fragment n of lane (g, c): column 8 n + 2 c + i % 2 of row g or g + 8.
  DEVICE bool sees(int n, int c, int i) const {
    return (words[i / 2][n / 4] >> (n % 4 * 8 + 2 * c + i % 2) & 1) != 0;
  }
};

// Where a walk stands. Runs `copy(column tile, slot)` for the step that lies kAhead steps in front.
struct Step {
  int tile, slot, mask;
  bool loads;
};

DEVICE Step read_step(const Walk& walk, int index) {
  const int32_t* step = walk.steps + 4 * static_cast<int64_t>(index);
  return {load(step), load(step + 1), load(step + 2), load(step + 3) != 0};
}

template <class Copy>
DEVICE void load_ahead(const Walk& walk, int index, int end, const Copy& copy) {
  if (index < end) {
    const Step step = read_step(walk, index);
    if (step.loads) {
      copy(step.tile, step.slot);
    }
  }
  copy_async_commit();  // one group a step, empty or not, so that waiting can count
}

// The tokens of rows g and g + 8 of this warp in row tile `tile`; -1 past the end.
DEVICE void tokens_of(int (&token)[2], const Walk& walk, int tile, int warp, int g) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int position = tile * kRowTile + warp * 16 + half * 8 + g;
    token[half] = position < walk.length ? load(walk.order + position) : -1;
  }
}
