// Attention backward in one pass over a head: dq, dk and dv together, with five products a tile where two passes need
// seven, and one read of q, k, v and dout where they need two.
//
// A block owns a whole head. For each tile of queries, kept in registers and in shared memory, it walks the key tiles;
// each warp makes p and ds of its 16 queries, adds ds k to their dq, and leaves p and ds in shared memory, where the
// warps, now each with a share of the keys, add p^T dout and ds^T q to the tile's sums. Those lie in shared memory from
// a key tile's first visit to its last: the text's along the whole walk, the image's while the window passes. The host
// planned that (cuda_plan.py) and takes the two passes where the sums do not fit. A warp always holds the same elements
// of a slot's sums, so they need no barrier and are added up in the same order every time.

#pragma once

#include "attention/statistics.cuh"

namespace {

template <int kWidth>
struct OnePass {
  static constexpr int kColumns = 32;                               // keys a tile
  static constexpr int kShare = kWidth >= 32 ? kWidth / 2 : 16;     // columns of dk or dv that a warp sums, for 16 keys
  static constexpr int kRowBytes = kRowTile * kPitch<kWidth>;       // queries, or dout
  static constexpr int kWeightBytes = kRowTile * kPitch<kColumns>;  // p, or ds
  static constexpr int kTileBytes = kColumns * kPitch<kWidth>;      // keys, or values
  static constexpr int kSumBytes = kShare / 8 * kThreads * 16;      // dk and dv of a key tile
  static constexpr int kFixedBytes = 2 * (kRowBytes + kWeightBytes + 2 * kTileBytes) + kWarps * 4;
};

// Sixteen rows of a tile in shared memory as operand A.
template <int kWidth>
DEVICE void load_fragments(uint32_t (&fragments)[kWidth / 16][4], const char* rows, int lane) {
#pragma unroll
  for (int k = 0; k < kWidth / 16; ++k) {
    load_matrix(fragments[k], rows + lane % 16 * kPitch<kWidth> + lane / 16 * 16 + 32 * k);
  }
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads, 1) one_pass_kernel(const __grid_constant__ AttentionBackward p) {
  using Shape = OnePass<kWidth>;
  constexpr int kColumns = Shape::kColumns;
  constexpr int kShare = Shape::kShare;
  const Place place(p.heads);
  const Walk& walk = p.by_query;
  char* rows = shared_memory();                                      // queries, dout [kRowTile][kPitch<kWidth>]
  char* weights = rows + 2 * Shape::kRowBytes;                       // p, ds [kRowTile][kPitch<kColumns>]
  char* ring = weights + 2 * Shape::kWeightBytes;                    // [2]: keys, values [kColumns][kPitch<kWidth>]
  int* seen = reinterpret_cast<int*>(ring + 4 * Shape::kTileBytes);  // [kWarps]: whether a warp's rows see anything
  float4* slots = reinterpret_cast<float4*>(seen + kWarps);          // [slots][kShare / 8][kThreads]
  const auto copy = [&](int index) {
    copy_tiles<T, kWidth, kColumns>(ring + index % 2 * 2 * Shape::kTileBytes, head_of<T>(p.k, place),
                                    head_of<T>(p.v, place), walk, read_step(walk, index).tile);
    copy_async_commit();
  };

  // What this warp adds up of a key tile: dv (warps 0 to 3) or dk, of 16 of its keys and kShare columns.
  const int which = place.warp / 4;
  const int first_key = place.warp / 2 % 2 * 16;
  const int first_column = place.warp % 2 * kShare;
  const bool adds = first_column < kWidth;

  const int tiles = (walk.length + kRowTile - 1) / kRowTile;
  const int last_step = load(walk.tile_steps + tiles);
  copy(0);
  const float to_base_2 = p.scale * kLog2E;
  for (int tile = 0; tile < tiles; ++tile) {
    __syncthreads();  // nobody reads the last tile's rows
    copy_tiles<T, kWidth, kRowTile>(rows, head_of<T>(p.q, place), head_of<T>(p.grad_out, place), walk, tile);
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
    uint32_t query[kWidth / 16][4];
    uint32_t grad[kWidth / 16][4];
    load_fragments<kWidth>(query, rows + place.warp * 16 * kPitch<kWidth>, place.lane);
    load_fragments<kWidth>(grad, rows + Shape::kRowBytes + place.warp * 16 * kPitch<kWidth>, place.lane);
    float lse[2];
    float delta[2];
    read_statistics(lse, delta, p, tile, place);
    float dq[kWidth / 8][4] = {};

    const int end = load(walk.tile_steps + tile + 1);
    for (int index = load(walk.tile_steps + tile); index < end; ++index) {
      const Step step = read_step(walk, index);
      copy_async_wait<0>();
      __syncthreads();  // the tile is whole, and nobody reads the other tile of the ring, p or ds
      if (index + 1 < last_step) {
        copy(index + 1);
      }
      const char* keys = ring + index % 2 * 2 * Shape::kTileBytes;
      Visible<kColumns> visible;
      const bool masked = step.mask != 0 || p.padding != nullptr;
      const bool some = !masked || visible.read_keys(walk, step, p.padding, place);
      if (place.lane == 0) {
        store(seen + place.warp, static_cast<int>(some));
      }
      if (some) {
        float score[kColumns / 8][4] = {};
        float dp[kColumns / 8][4] = {};
        multiply_transposed<T, kWidth, kColumns>(score, query, keys, place.lane);
        multiply_transposed<T, kWidth, kColumns>(dp, grad, keys + Shape::kTileBytes, place.lane);
        char* to = weights + (place.warp * 16 + place.g) * kPitch<kColumns> + 4 * place.c;
#pragma unroll
        for (int n = 0; n < kColumns / 8; ++n) {
          float weight[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const bool sees = !masked || visible.sees(n, place.c, i);
            weight[i] = sees ? exp2_fast(score[n][i] * to_base_2 - lse[i / 2]) : 0.0f;
            score[n][i] = weight[i] * (dp[n][i] - delta[i / 2]);
          }
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            char* at = to + 8 * half * kPitch<kColumns> + 16 * n;
            store(reinterpret_cast<uint32_t*>(at), pack<T>(weight[2 * half], weight[2 * half + 1]));
            store(reinterpret_cast<uint32_t*>(at + Shape::kWeightBytes),
                  pack<T>(score[n][2 * half], score[n][2 * half + 1]));
          }
        }
        multiply<T, kWidth, kColumns>(dq, score, keys, place.lane);
      }
      __syncthreads();  // p and ds are whole
      if (!adds) {
        continue;
      }
      const int visit = load(walk.steps + 4 * static_cast<int64_t>(index) + 3);  // 1: the first, 2: the last, 3: both
      float4* mine = slots + step.slot * (kShare / 8) * kThreads + threadIdx.x;
      float sums[kShare / 8][4] = {};
      if ((visit & 1) == 0) {
#pragma unroll
        for (int n = 0; n < kShare / 8; ++n) {
          const float4 sum = load(mine + n * kThreads);
          sums[n][0] = sum.x;
          sums[n][1] = sum.y;
          sums[n][2] = sum.z;
          sums[n][3] = sum.w;
        }
      }
      // Operand A is p^T or ds^T, whose rows are keys, so its matrices are read transposed.
      const char* a_from = weights + which * Shape::kWeightBytes +
                           (place.lane / 16 * 8 + place.lane % 8) * kPitch<kColumns> +
                           2 * (first_key + place.lane / 8 % 2 * 8);
      const char* b_from = rows + (1 - which) * Shape::kRowBytes + place.lane % 16 * kPitch<kWidth> + 2 * first_column +
                           place.lane / 16 * 16;
#pragma unroll
      for (int k = 0; k < kWarps; ++k) {
        if (load(seen + k) == 0) {
          continue;
        }
        uint32_t a[4];
        load_matrix_transposed(a, a_from + k * 16 * kPitch<kColumns>);
#pragma unroll
        for (int n = 0; n < kShare / 16; ++n) {
          uint32_t b[4];
          load_matrix_transposed(b, b_from + k * 16 * kPitch<kWidth> + n * 32);
          mma<T>(sums[2 * n], a, b[0], b[1]);
          mma<T>(sums[2 * n + 1], a, b[2], b[3]);
        }
      }
      if ((visit & 2) == 0) {
#pragma unroll
        for (int n = 0; n < kShare / 8; ++n) {
          store(mine + n * kThreads, make_float4(sums[n][0], sums[n][1], sums[n][2], sums[n][3]));
        }
        continue;
      }
      int token[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int position = step.tile * kColumns + first_key + 8 * half + place.g;
        token[half] = position < walk.length ? load(walk.order + position) : -1;
      }
      const Rows& to = which == 0 ? p.dv : p.dk;
      const float scale = which == 0 ? 1.0f : p.scale;
      const float factor[2] = {scale, scale};
      store_rows<T, kShare>(head_data<T>(to, place) + first_column, to.strides[2], sums, factor, token, place.c);
    }
    int token[2];
    tokens_of(token, walk, tile, place);
    const float factor[2] = {p.scale, p.scale};
    store_rows<T, kWidth>(head_data<T>(p.dq, place), p.dq.strides[2], dq, factor, token, place.c);
  }
}

template <class T, int kWidth>
void run_one_pass(const AttentionBackward& p, void* stream) {
  const int shared_bytes = OnePass<kWidth>::kFixedBytes + p.by_query.slots * OnePass<kWidth>::kSumBytes;
  launch(one_pass_kernel<T, kWidth>, dim3{static_cast<unsigned>(p.batch * p.heads), 1, 1}, kThreads, shared_bytes,
         stream, p);
}

}  // namespace
