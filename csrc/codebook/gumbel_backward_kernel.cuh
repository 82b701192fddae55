// Gumbel lookup backward. With y = softmax((logits + g) / tau), p = softmax(logits), d = dL codebook^T and
// delta = dL . (y codebook):
//   dlogits = y (d - delta) / tau + dKL p (log p + H),  H = log K - KL,  dcodebook = y^T dL.
// Two kernels regenerate y from the logits, the seed and the saved log-sum-exps: one whose blocks own rows, for dlogits;
// one whose blocks own codes, for dcodebook, over a share of the rows each, so that sums are made in a fixed order.

#pragma once

#include "codebook/codes.cuh"

namespace {

constexpr int kLogitsThreads = 128;
constexpr int kLogitsRows = kLogitsThreads / 2;

template <class T, int kWidth>
__global__ void __launch_bounds__(kLogitsThreads, 2)
    gumbel_logits_kernel(const __grid_constant__ GumbelBackward p) {
  constexpr int kTileBytes = kStepCodes * kPitch<kWidth>;
  const int lane = threadIdx.x % 32;
  const int g = lane / 4;
  const int c = lane % 4;
  const int first_row = blockIdx.x * kLogitsRows + threadIdx.x / 32 * 16 + g;
  const Quarters quarters(p.codes);
  const Noise draw(load(p.seed), 0);
  const float inverse = 1.0f / load(p.temperature);
  const T* codebook = static_cast<const T*>(p.codebook);
  const bool whole = whole_pieces<T>(p.logits, p.logits_stride, p.codes);
  char* tiles = shared_memory();  // [2][kStepCodes][kPitch]

  int row[2];
  uint32_t grad[kWidth / 16][4] = {};
  float lse_noisy[2], lse_clean[2], entropy[2], delta[2], grad_kl[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    row[half] = first_row + 8 * half < p.rows ? first_row + 8 * half : -1;
    const int from = row[half] < 0 ? 0 : row[half];
    lse_noisy[half] = load(p.lse_noisy + from) * kLog2E;
    lse_clean[half] = load(p.lse_clean + from);
    entropy[half] = logf(static_cast<float>(p.codes)) - load(p.kl + from);
    delta[half] = p.grad_latents == nullptr ? 0.0f : load(p.delta + from);
    grad_kl[half] = p.grad_kl == nullptr ? 0.0f : load(p.grad_kl + from);
  }
  if (p.grad_latents != nullptr) {
    load_rows<T, kWidth>(grad, Table<T>{static_cast<const T*>(p.grad_latents), kWidth}, row, c);
  }

  const int steps = quarters.steps();
  copy_codes<T, kWidth, kLogitsThreads>(tiles, codebook, quarters, 0, place_for_dot);
  copy_async_commit();
  for (int step = 0; step < steps; ++step) {
    const int first = step * kCodes + 8 * c;
    copy_async_wait<0>();
    __syncthreads();
    if (step + 1 < steps) {
      copy_codes<T, kWidth, kLogitsThreads>(tiles + (step + 1) % 2 * kTileBytes, codebook, quarters,
                                            (step + 1) * kCodes, place_for_dot);
      copy_async_commit();
    }
    // dot[4 q + t]: rows g, g + 8 against codes 8 c + 2 t + (0, 1) of quarter q.
    const char* mine = tiles + step % 2 * kTileBytes + (lane / 16 * 8 + lane % 8) * kPitch<kWidth> + lane / 8 % 2 * 16;
    float dot[16][4] = {};
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int k = 0; k < kWidth / 16; ++k) {
        uint32_t b[4];
        load_matrix(b, mine + n * 16 * kPitch<kWidth> + k * 32);
        mma<T>(dot[2 * n], grad[k], b[0], b[1]);
        mma<T>(dot[2 * n + 1], grad[k], b[2], b[3]);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (row[half] < 0) {
        continue;
      }
      float logits[4][8];
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        load_logits<T>(logits[q], static_cast<const T*>(p.logits) + row[half] * p.logits_stride, quarters, q, first,
                       whole);
      }
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        float noise[4] = {};
        if (p.noise) {
          draw(noise, first + j, row[half]);
        }
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          const float x = logits[q][j];
          const float y = exp2_fast((x + noise[q]) * (inverse * kLog2E) - lse_noisy[half]);
          const float log_p = x - lse_clean[half];
          const float weight = exp2_fast(log_p * kLog2E);
          const float kl = weight > 0.0f ? grad_kl[half] * weight * (log_p + entropy[half]) : 0.0f;
          logits[q][j] = y * (dot[4 * q + j / 2][2 * half + j % 2] - delta[half]) * inverse + kl;
        }
      }
      T* to = static_cast<T*>(p.dlogits) + static_cast<int64_t>(row[half]) * p.codes;
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        if (p.codes % 32 == 0) {
          if (first < quarters.quarter) {
            store(reinterpret_cast<uint4*>(to + q * quarters.quarter + first),
                  make_uint4(pack<T>(logits[q][0], logits[q][1]), pack<T>(logits[q][2], logits[q][3]),
                             pack<T>(logits[q][4], logits[q][5]), pack<T>(logits[q][6], logits[q][7])));
          }
          continue;
        }
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const int code = quarters.code(q, first + j);
          if (code >= 0) {
            store(to + code, T{static_cast<uint16_t>(pack<T>(logits[q][j], 0.0f))});
          }
        }
      }
    }
  }
}

constexpr int kCodebookThreads = 256;
constexpr int kCodebookRows = 64;  // a step: a quad of threads to a row

// dcodebook of 32 codes of every quarter, 16 codes to a warp, from a share of the rows.
template <class T, int kWidth>
__global__ void __launch_bounds__(kCodebookThreads, 1)
    gumbel_codebook_kernel(const __grid_constant__ GumbelBackward p) {
  constexpr int kGradBytes = kCodebookRows * kPitch<kWidth>;
  constexpr int kWeightBytes = kCodebookRows * kPitch<kStepCodes>;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int g = lane / 4;
  const int c = lane % 4;
  const Quarters quarters(p.codes);
  const Noise draw(load(p.seed), 0);
  const float to_base_2 = kLog2E / load(p.temperature);
  const bool whole = whole_pieces<T>(p.logits, p.logits_stride, p.codes);
  char* grads = shared_memory();     // [2][kCodebookRows][kPitch<kWidth>]
  char* weights = grads + 2 * kGradBytes;  // [2][kCodebookRows][kPitch<kStepCodes>]
  const int first_code = blockIdx.x * kCodes;  // of each quarter
  const int share = (p.rows + p.parts - 1) / p.parts;
  const int begin = blockIdx.y * share;
  const int end = begin + share < p.rows ? begin + share : p.rows;

  float sums[kWidth / 8][4] = {};
  for (int first = begin; first < end; first += kCodebookRows) {
    const int stage = (first - begin) / kCodebookRows % 2;
    char* grad = grads + stage * kGradBytes;
    char* weight = weights + stage * kWeightBytes;
#pragma unroll 1
    for (int i = threadIdx.x; i < kCodebookRows * kWidth / 8; i += kCodebookThreads) {
      const int row = static_cast<unsigned>(i) / (kWidth / 8);
      const int piece = static_cast<unsigned>(i) % (kWidth / 8);
      const bool valid = first + row < end;
      const T* from = static_cast<const T*>(p.grad_latents) + static_cast<int64_t>(valid ? first + row : 0) * kWidth;
      copy_async(grad + row * kPitch<kWidth> + 16 * piece, from + 8 * piece, valid);
    }
    copy_async_commit();
    // A quad of threads makes one row of weights, eight codes of each quarter to a thread.
    const int mine = threadIdx.x / 4;
    const int row = first + mine;
    const int column = first_code + 8 * c;
    float y[4][8];
    const float lse = load(p.lse_noisy + (row < end ? row : begin)) * kLog2E;
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      load_logits<T>(y[q], static_cast<const T*>(p.logits) + (row < end ? row : begin) * p.logits_stride, quarters, q,
                     column, whole);
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      float noise[4] = {};
      if (p.noise) {
        draw(noise, column + j, row);
      }
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        y[q][j] = row < end ? exp2_fast((y[q][j] + noise[q]) * to_base_2 - lse) : 0.0f;
      }
    }
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      store(reinterpret_cast<uint4*>(weight + mine * kPitch<kStepCodes> + 2 * (q * kCodes + 8 * c)),
            make_uint4(pack<T>(y[q][0], y[q][1]), pack<T>(y[q][2], y[q][3]), pack<T>(y[q][4], y[q][5]),
                       pack<T>(y[q][6], y[q][7])));
    }
    copy_async_wait<0>();
    __syncthreads();  // two stages: the next step's writes cannot meet this step's reads
    // Operand A is weights^T: codes are its rows, so its matrices are read transposed.
    const char* a_from = weight + (lane / 16 * 8 + lane % 8) * kPitch<kStepCodes> + 2 * (16 * warp + lane / 8 % 2 * 8);
    const char* b_from = grad + lane % 16 * kPitch<kWidth> + lane / 16 * 16;
#pragma unroll
    for (int k = 0; k < kCodebookRows / 16; ++k) {
      uint32_t a[4];
      load_matrix_transposed(a, a_from + k * 16 * kPitch<kStepCodes>);
#pragma unroll
      for (int n = 0; n < kWidth / 16; ++n) {
        uint32_t b[4];
        load_matrix_transposed(b, b_from + k * 16 * kPitch<kWidth> + n * 32);
        mma<T>(sums[2 * n], a, b[0], b[1]);
        mma<T>(sums[2 * n + 1], a, b[2], b[3]);
      }
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int within = 16 * warp + 8 * half + g;  // of the block's 128 codes
    const int code = quarters.code(within / kCodes, first_code + within % kCodes);
    if (code < 0) {
      continue;
    }
    float* to = p.dcodebook + (static_cast<int64_t>(blockIdx.y) * p.codes + code) * kWidth + 2 * c;
#pragma unroll
    for (int n = 0; n < kWidth / 8; ++n) {
      store(reinterpret_cast<float2*>(to + 8 * n), make_float2(sums[n][2 * half], sums[n][2 * half + 1]));
    }
  }
}

template <class T, int kWidth>
void run(const GumbelBackward& p, void* stream) {
  const auto blocks = static_cast<unsigned>((p.rows + kLogitsRows - 1) / kLogitsRows);
  launch(gumbel_logits_kernel<T, kWidth>, dim3{blocks, 1, 1}, kLogitsThreads, 2 * kStepCodes * kPitch<kWidth>, stream,
         p);
  if (p.dcodebook != nullptr) {
    const auto steps = static_cast<unsigned>(((p.codes + 3) / 4 + kCodes - 1) / kCodes);
    launch(gumbel_codebook_kernel<T, kWidth>, dim3{steps, static_cast<unsigned>(p.parts), 1}, kCodebookThreads,
           2 * kCodebookRows * (kPitch<kWidth> + kPitch<kStepCodes>), stream, p);
  }
}

template <class T>
void choose_width(const GumbelBackward& p, void* stream) {
  switch (p.width) {
    case 32:
      return run<T, 32>(p, stream);
    case 64:
      return run<T, 64>(p, stream);
    case 128:
      return run<T, 128>(p, stream);
  }
}

}  // namespace
