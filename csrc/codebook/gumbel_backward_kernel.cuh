// Gumbel lookup backward. With y = softmax((logits + g) / tau), p = softmax(logits), d = dL codebook^T and
// delta = dL . (y codebook):
//   dlogits = y (d - delta) / tau + dKL p (log p + H),  H = log K - KL,  dcodebook = y^T dL,
// where hard with the one-hot rows of the sampled codes in the place of y in dcodebook.
// A block owns a group of codes of every quarter, whose rows of the codebook it keeps in shared memory, and walks over
// a share of the table's rows: y is made again from the logits, the seed and what was kept of the sums, once for both
// gradients, so the logits are read once. Sums over rows are made in a fixed order; the host adds up the shares. Of a
// gradient that is not asked for neither product nor result is made.

#pragma once

#include "codebook/codes.cuh"

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kRows = 16 * kWarps;  // a step; 16 to a warp

template <class T, int kWidth>
struct Backward {
  static constexpr int kTerms = Terms<T>::kCount;
  static constexpr int kStages = kWidth <= 128 && kTerms == 1 ? 2 : 1;        // of dL's rows
  static constexpr int kGradBytes = kRows * kPitch<kWidth>;                   // a term of dL's rows
  static constexpr int kWeightBytes = kRows * kPitch<kStepCodes<T, kWidth>>;  // a term of what weighs dL
  static constexpr int kSharedBytes = kTerms * (kTileBytes<T, kWidth> + kStages * kGradBytes + kWeightBytes);
};

// Gradients of codes `column` on of every quarter, of two rows before `end`.
template <class T, int kMine>
DEVICE void store_logits(T* dlogits, const float (&x)[2][4][kMine], const int (&row)[2], int end,
                         const Quarters& quarters, int column) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (row[half] >= end) {
      continue;
    }
    T* to = dlogits + static_cast<int64_t>(row[half]) * quarters.codes;
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      if (quarters.codes % 32 == 0) {  // as whole_pieces() has it; dlogits are contiguous
        if (column < quarters.quarter) {
          T* at = to + q * quarters.quarter + column;
          uint32_t words[kMine * sizeof(T) / 4];
#pragma unroll
          for (int i = 0; i < static_cast<int>(kMine * sizeof(T) / 4); ++i) {
            if constexpr (sizeof(T) == 4) {
              words[i] = __float_as_uint(x[half][q][i]);
            } else {
              words[i] = pack<T>(x[half][q][2 * i], x[half][q][2 * i + 1]);
            }
          }
          if constexpr (kMine * sizeof(T) == 16) {
            store(reinterpret_cast<uint4*>(at), make_uint4(words[0], words[1], words[2], words[3]));
          } else {
            store(reinterpret_cast<uint2*>(at), make_uint2(words[0], words[1]));
          }
        }
        continue;
      }
#pragma unroll
      for (int j = 0; j < kMine; ++j) {
        const int code = quarters.code(q, column + j);
        if (code >= 0) {
          if constexpr (sizeof(T) == 4) {
            store(to + code, x[half][q][j]);
          } else {
            store(to + code, T{static_cast<uint16_t>(pack<T>(x[half][q][j], 0.0f))});
          }
        }
      }
    }
  }
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads, 1) gumbel_backward_kernel(const __grid_constant__ GumbelBackward p) {
  using Shape = Backward<T, kWidth>;
  constexpr int kCodes = kGroup<T, kWidth>;
  constexpr int kMine = kPer<T, kWidth>;
  constexpr int kBlock = kStepCodes<T, kWidth>;
  constexpr int kTerms = Shape::kTerms;
  constexpr int kShare = kWidth * kBlock / 128;  // columns of dcodebook that a warp sums, of 16 codes
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int g = lane / 4;
  const int c = lane % 4;
  const Quarters quarters(p.codes);
  const Noise draw(p.seed, 0);
  const float inverse = 1.0f / load(p.temperature);
  const bool whole = whole_pieces<T>(p.logits, p.logits_stride, p.codes);
  const bool with_latents = p.grad_terms != nullptr;
  const bool with_logits = p.dlogits != nullptr;
  const bool with_codebook = p.dcodebook != nullptr;
  char* codes = shared_memory();                         // [terms][kBlock][kPitch<kWidth>], placed for d
  char* grads = codes + kTerms * kTileBytes<T, kWidth>;  // [kStages][terms][kRows][kPitch<kWidth>]
  char* weights =
      grads + Shape::kStages * kTerms * Shape::kGradBytes;  // [terms][kRows][kPitch<kBlock>], what weighs dL
  const int first_code = blockIdx.x * kCodes;               // of each quarter
  const int column = first_code + kMine * c;
  const int share = (p.rows + p.parts - 1) / p.parts;
  const int begin = blockIdx.y * share;
  const int end = begin + share < p.rows ? begin + share : p.rows;
  const auto copy_grads = [&](int first) {
    using Element = typename Terms<T>::Element;
    char* to = grads + (first - begin) / kRows % Shape::kStages * kTerms * Shape::kGradBytes;
#pragma unroll 1
    for (int i = threadIdx.x; i < kRows * kWidth / 8; i += kThreads) {
      const int row = static_cast<unsigned>(i) / (kWidth / 8);
      const int piece = static_cast<unsigned>(i) % (kWidth / 8);
      const bool valid = first + row < end;
      const int64_t at = static_cast<int64_t>(valid ? first + row : 0) * kWidth + 8 * piece;
#pragma unroll
      for (int term = 0; term < kTerms; ++term) {
        const int64_t before = static_cast<int64_t>(term) * p.rows * kWidth;
        copy_async(to + term * Shape::kGradBytes + row * kPitch<kWidth> + 16 * piece,
                   static_cast<const Element*>(p.grad_terms) + before + at, valid);
      }
    }
    copy_async_commit();
  };

  if (with_latents) {
    copy_codes<T, kWidth, kThreads>(codes, p.codebook_terms, quarters, first_code, place_for_dot<kMine>);
    copy_grads(begin);
  }
  float sums[kShare / 8][4] = {};
  for (int first = begin; first < end; first += kRows) {
    copy_async_wait<0>();
    __syncthreads();  // this step's rows are there, and nobody reads the last step's, or its weights
    if (with_latents && Shape::kStages == 2 && first + kRows < end) {
      copy_grads(first + kRows);
    }
    const char* grad = grads + (first - begin) / kRows % Shape::kStages * kTerms * Shape::kGradBytes;

    int row[2];
    float x[2][4][kMine];  // logits, then their gradients
    float maximum[2], log_noisy[2], log_clean[2], entropy[2], delta[2], grad_kl[2];
    int sampled[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      row[half] = first + warp * 16 + 8 * half + g;
      const int from = row[half] < end ? row[half] : begin;
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        load_logits<T>(x[half][q], static_cast<const T*>(p.logits) + from * p.logits_stride, quarters, q, column,
                       whole);
      }
      maximum[half] = load(p.maximum + from);
      log_noisy[half] = load(p.log_noisy + from) * kLog2E;
      log_clean[half] = load(p.log_clean + from);
      entropy[half] = logf(static_cast<float>(p.codes)) - load(p.kl + from);
      delta[half] = with_latents ? load(p.delta + from) : 0.0f;
      grad_kl[half] = p.grad_kl == nullptr ? 0.0f : load(p.grad_kl + from);
      sampled[half] = p.indices != nullptr && row[half] < end ? static_cast<int>(load(p.indices + from)) : -1;
    }
    // Four codes of each quarter at a time, so that d needs few registers.
#pragma unroll
    for (int t = 0; t < kMine / 4; ++t) {
      float dot[4][2][4] = {};  // [quarter][u]: rows g, g + 8 against the lane's codes 4 t + 2 u + (0, 1)
      if (with_latents && with_logits) {
        const char* a_from = grad + (warp * 16 + lane % 16) * kPitch<kWidth> + lane / 16 * 16;
        const char* b_from = codes + (16 * t + lane / 16 * 8 + lane % 8) * kPitch<kWidth> + lane / 8 % 2 * 16;
#pragma unroll
        for (int k = 0; k < kWidth / 16; ++k) {
          uint32_t a[kTerms][4];
          load_terms<T>(a, a_from + 32 * k, Shape::kGradBytes);
#pragma unroll
          for (int q = 0; q < 4; ++q) {
            uint32_t b[kTerms][4];
            load_terms<T>(b, b_from + q * kCodes * kPitch<kWidth> + 32 * k, kTileBytes<T, kWidth>);
            multiply_terms<T>(dot[q][0], a, b, 0);
            multiply_terms<T>(dot[q][1], a, b, 1);
          }
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float y[4][4];  // [quarter][code]
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          float noise[4] = {};
          if (p.noise) {
            draw(noise, column + 4 * t + j, row[half]);
          }
#pragma unroll
          for (int q = 0; q < 4; ++q) {
            float& logit = x[half][q][4 * t + j];
            const float weight = exp2_fast((logit + noise[q] - maximum[half]) * (inverse * kLog2E) - log_noisy[half]);
            const float log_p = logit - maximum[half] - log_clean[half];
            const float clean = exp2_fast(log_p * kLog2E);
            const float kl = clean > 0.0f ? grad_kl[half] * clean * (log_p + entropy[half]) : 0.0f;
            logit = weight * (dot[q][j / 2][2 * half + j % 2] - delta[half]) * inverse + kl;
            y[q][j] = row[half] < end ? weight : 0.0f;
          }
        }
        if (p.indices != nullptr) {
#pragma unroll
          for (int q = 0; q < 4; ++q) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {  // a column past the quarter's end is stored nowhere
              y[q][j] = q * quarters.quarter + column + 4 * t + j == sampled[half] ? 1.0f : 0.0f;
            }
          }
        }
        if (with_codebook) {
          char* to = weights + (warp * 16 + 8 * half + g) * kPitch<kBlock> + 2 * (kMine * c + 4 * t);
#pragma unroll
          for (int q = 0; q < 4; ++q) {
            uint32_t low[kTerms];
            uint32_t high[kTerms];
            split<T>(low, y[q][0], y[q][1]);
            split<T>(high, y[q][2], y[q][3]);
#pragma unroll
            for (int term = 0; term < kTerms; ++term) {
              store(reinterpret_cast<uint2*>(to + term * Shape::kWeightBytes + 2 * q * kCodes),
                    make_uint2(low[term], high[term]));
            }
          }
        }
      }
    }
    if (with_logits) {
      store_logits<T>(static_cast<T*>(p.dlogits), x, row, end, quarters, column);
    }
    if (with_codebook) {
      __syncthreads();  // what weighs dL is whole
      // Operand A is transposed: codes are its rows, so its matrices are read transposed.
      const int codes_at = warp * 16 % kBlock;
      const int columns_at = warp * 16 / kBlock * kShare;
      const char* a_from = weights + (lane / 16 * 8 + lane % 8) * kPitch<kBlock> + 2 * (codes_at + lane / 8 % 2 * 8);
      const char* b_from = grad + lane % 16 * kPitch<kWidth> + 2 * columns_at + lane / 16 * 16;
#pragma unroll
      for (int k = 0; k < kRows / 16; ++k) {
        uint32_t a[kTerms][4];
        load_terms_transposed<T>(a, a_from + k * 16 * kPitch<kBlock>, Shape::kWeightBytes);
#pragma unroll
        for (int n = 0; n < kShare / 16; ++n) {
          uint32_t b[kTerms][4];
          load_terms_transposed<T>(b, b_from + k * 16 * kPitch<kWidth> + n * 32, Shape::kGradBytes);
          multiply_terms<T>(sums[2 * n], a, b, 0);
          multiply_terms<T>(sums[2 * n + 1], a, b, 1);
        }
      }
    }
    if (!with_latents) {
      continue;
    }
    if (Shape::kStages == 1 && first + kRows < end) {
      __syncthreads();  // nobody reads the rows that are overwritten
      copy_grads(first + kRows);
    }
  }
  if (!with_codebook) {
    return;
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int within = warp * 16 % kBlock + 8 * half + g;  // of the block's codes
    const int code = quarters.code(within / kCodes, first_code + within % kCodes);
    if (code < 0) {
      continue;
    }
    float* to = p.dcodebook + (static_cast<int64_t>(blockIdx.y) * p.codes + code) * kWidth;
    to += warp * 16 / kBlock * kShare + 2 * c;
#pragma unroll
    for (int n = 0; n < kShare / 8; ++n) {
      store(reinterpret_cast<float2*>(to + 8 * n), make_float2(sums[n][2 * half], sums[n][2 * half + 1]));
    }
  }
}

template <class T, int kWidth>
void run(const GumbelBackward& p, void* stream) {
  const int groups = ((p.codes + 3) / 4 + kGroup<T, kWidth> - 1) / kGroup<T, kWidth>;
  launch(gumbel_backward_kernel<T, kWidth>, dim3{static_cast<unsigned>(groups), static_cast<unsigned>(p.parts), 1},
         kThreads, Backward<T, kWidth>::kSharedBytes, stream, p);
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
    case 256:
      if constexpr (sizeof(T) == 2) {
        run<T, 256>(p, stream);
      }
      return;
  }
}

}  // namespace
