// Gumbel lookup forward: y = softmax((logits + g) / tau), latents = y codebook, indices = argmax(logits + g), and the
// KL of softmax(logits) from uniform, in one read of the logits.
//
// A block owns 64 rows, 16 to a warp, and walks over the codes with two online softmaxes in base 2, one of the noisy
// scores t = (x + g) / tau and one of the clean ones, whose mean logit gives the entropy:
//   KL = log K - H,  H = log l - sum p (x - m),  l = sum e^(x - m),  with sum e^(x - m) (x - m) kept beside l.
// Differences from the largest come first, exactly, and what is kept of a row is the largest and logarithms apart: rows
// may be so far from 0 that log K, and even the noise, are lost in their rounding.
// Where hard, the soft mixture goes to its own tensor for the backward pass, and latents are the sampled rows.

#pragma once

#include "codebook/codes.cuh"

namespace {

constexpr int kForwardThreads = 128;
constexpr int kForwardRows = kForwardThreads / 2;
constexpr float kLowest = -3.402823466e38f;  // the largest of no scores: finite, so that -inf less it is -inf
constexpr float kFar = -1e30f;               // an exponent of 0, and a number to multiply 0 with

template <class T, int kWidth>
__global__ void __launch_bounds__(kForwardThreads, kWidth <= 128 && sizeof(T) == 2 ? 2 : 1)
    gumbel_forward_kernel(const __grid_constant__ GumbelForward p) {
  constexpr int kCodes = kGroup<T, kWidth>;
  constexpr int kMine = kPer<T, kWidth>;
  constexpr int kTerms = Terms<T>::kCount;
  constexpr int kStepBytes = kTerms * kTileBytes<T, kWidth>;
  const int lane = threadIdx.x % 32;
  const int g = lane / 4;
  const int c = lane % 4;
  const int first_row = blockIdx.x * kForwardRows + threadIdx.x / 32 * 16 + g;
  const Quarters quarters(p.codes);
  const Noise draw(p.seed, 0);
  const float to_base_2 = kLog2E / load(p.temperature);
  const T* codebook = static_cast<const T*>(p.codebook);
  const bool whole = whole_pieces<T>(p.logits, p.logits_stride, p.codes);
  char* tiles = shared_memory();  // [2][terms][kStepCodes][kPitch]

  float acc[kWidth / 8][4] = {};
  float noisy_m[2] = {kLowest, kLowest};
  float noisy_l[2] = {};
  float clean_m[2] = {kLowest, kLowest};
  float clean_l[2] = {};
  float clean_x[2] = {};  // sum of 2^x x, x = log2(e) (logit - m)
  float best[2] = {-kInfinity, -kInfinity};
  int best_code[2] = {};

  const int steps = (quarters.quarter + kCodes - 1) / kCodes;
  copy_codes<T, kWidth, kForwardThreads>(tiles, p.codebook_terms, quarters, 0, place_for_sum<kMine>);
  copy_async_commit();
  for (int step = 0; step < steps; ++step) {
    const int first = step * kCodes + kMine * c;
    uint32_t weights[kMine][kTerms][4];  // operand A of the products: 16 codes each
    float old[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + 8 * half;
      const bool valid = row < p.rows;
      float score[4][kMine];
      float largest = clean_m[half];
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        load_logits<T>(score[q], static_cast<const T*>(p.logits) + (valid ? row : 0) * p.logits_stride, quarters, q,
                       first, whole);
#pragma unroll
        for (int j = 0; j < kMine; ++j) {
          largest = fmaxf(largest, score[q][j]);
        }
      }
      largest = largest_of_quad(largest);
      const float drop = fmaxf((clean_m[half] - largest) * kLog2E, kFar);
      const float clean_old = exp2_fast(drop);
      clean_m[half] = largest;
      clean_x[half] = (clean_x[half] + drop * clean_l[half]) * clean_old;
      clean_l[half] *= clean_old;
      float noisy_largest = noisy_m[half];
#pragma unroll
      for (int j = 0; j < kMine; ++j) {
        float noise[4] = {};
        if (p.noise) {
          draw(noise, first + j, row);
        }
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          const float x = (score[q][j] - clean_m[half]) * kLog2E;
          const float weight = exp2_fast(x);
          clean_l[half] += weight;
          clean_x[half] += weight > 0.0f ? weight * x : 0.0f;
          const float noisy = score[q][j] + noise[q];
          const int code = q * quarters.quarter + first + j;
          if (noisy > best[half] || (noisy == best[half] && code < best_code[half])) {
            best[half] = noisy;
            best_code[half] = code;
          }
          score[q][j] = noisy;
          noisy_largest = fmaxf(noisy_largest, score[q][j]);
        }
      }
      noisy_largest = largest_of_quad(noisy_largest);
      old[half] = exp2_fast((noisy_m[half] - noisy_largest) * to_base_2);
      noisy_m[half] = noisy_largest;
      noisy_l[half] *= old[half];
#pragma unroll
      for (int q = 0; q < 4; ++q) {
#pragma unroll
        for (int j = 0; j < kMine; ++j) {
          score[q][j] = exp2_fast((score[q][j] - noisy_largest) * to_base_2);
          noisy_l[half] += score[q][j];
        }
#pragma unroll
        for (int s = 0; s < kMine / 4; ++s) {
#pragma unroll
          for (int pair = 0; pair < 2; ++pair) {
            uint32_t words[kTerms];
            split<T>(words, score[q][4 * s + 2 * pair], score[q][4 * s + 2 * pair + 1]);
#pragma unroll
            for (int term = 0; term < kTerms; ++term) {
              weights[kMine / 4 * q + s][term][2 * pair + half] = words[term];
            }
          }
        }
      }
    }
#pragma unroll
    for (int n = 0; n < kWidth / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        acc[n][i] *= old[i / 2];
      }
    }

    copy_async_wait<0>();
    __syncthreads();  // this step's codes are there, and nobody reads the last step's
    if (step + 1 < steps) {
      copy_codes<T, kWidth, kForwardThreads>(tiles + (step + 1) % 2 * kStepBytes, p.codebook_terms, quarters,
                                             (step + 1) * kCodes, place_for_sum<kMine>);
      copy_async_commit();
    }
    const char* mine = tiles + step % 2 * kStepBytes + lane % 16 * kPitch<kWidth> + lane / 16 * 16;
#pragma unroll
    for (int k = 0; k < kMine; ++k) {
#pragma unroll
      for (int n = 0; n < kWidth / 16; ++n) {
        uint32_t b[kTerms][4];
        load_terms_transposed<T>(b, mine + k * 16 * kPitch<kWidth> + n * 32, kTileBytes<T, kWidth>);
        multiply_terms<T>(acc[2 * n], weights[k], b, 0);
        multiply_terms<T>(acc[2 * n + 1], weights[k], b, 1);
      }
    }
  }

  int row[2];
  float inverse[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    row[half] = first_row + 8 * half < p.rows ? first_row + 8 * half : -1;
    noisy_l[half] = sum_of_quad(noisy_l[half]);
    clean_l[half] = sum_of_quad(clean_l[half]);
    clean_x[half] = sum_of_quad(clean_x[half]);
    inverse[half] = 1.0f / noisy_l[half];
#pragma unroll
    for (int distance = 1; distance <= 2; distance *= 2) {
      const float other = __shfl_xor_sync(0xffffffffu, best[half], distance);
      const int other_code = __shfl_xor_sync(0xffffffffu, best_code[half], distance);
      if (other > best[half] || (other == best[half] && other_code < best_code[half])) {
        best[half] = other;
        best_code[half] = other_code;
      }
    }
    if (row[half] >= 0 && c == 0) {
      const float clean_log = log2f(clean_l[half]);
      store(p.indices + row[half], static_cast<int64_t>(best_code[half]));
      store(p.maximum + row[half], noisy_m[half]);
      store(p.log_noisy + row[half], kLn2 * log2f(noisy_l[half]));
      store(p.log_clean + row[half], clean_m[half] - noisy_m[half] + kLn2 * clean_log);
      store(p.kl + row[half], logf(static_cast<float>(p.codes)) + kLn2 * (clean_x[half] / clean_l[half] - clean_log));
    }
  }
  T* latents = static_cast<T*>(p.latents);
  if constexpr (sizeof(T) == 2) {
    if (!p.hard) {
      store_rows<T, kWidth>(latents, kWidth, acc, inverse, row, c);
      return;
    }
  }
  float* mixture = p.mixture;
  if constexpr (sizeof(T) == 4) {
    mixture = p.hard ? p.mixture : latents;
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (row[half] < 0) {
      continue;
    }
    const int64_t from = static_cast<int64_t>(best_code[half]) * kWidth;
    const int64_t to = static_cast<int64_t>(row[half]) * kWidth;
    if (p.hard) {
#pragma unroll 1
      for (int piece = c; piece < kWidth / kVector<T>; piece += 4) {
        store(reinterpret_cast<uint4*>(latents + to) + piece,
              load(reinterpret_cast<const uint4*>(codebook + from) + piece));
      }
    }
#pragma unroll
    for (int n = 0; n < kWidth / 8; ++n) {
      store(reinterpret_cast<float2*>(mixture + to + 8 * n + 2 * c),
            make_float2(acc[n][2 * half] * inverse[half], acc[n][2 * half + 1] * inverse[half]));
    }
  }
}

template <class T, int kWidth>
void run(const GumbelForward& p, void* stream) {
  const auto blocks = static_cast<unsigned>((p.rows + kForwardRows - 1) / kForwardRows);
  launch(gumbel_forward_kernel<T, kWidth>, dim3{blocks, 1, 1}, kForwardThreads,
         2 * Terms<T>::kCount * kTileBytes<T, kWidth>, stream, p);
}

template <class T>
void choose_width(const GumbelForward& p, void* stream) {
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
