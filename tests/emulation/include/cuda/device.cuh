// The names of csrc/cuda/device.cuh for the emulation: what each does there is said there.

#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "../../emulator.h"

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define DEVICE inline

#define threadIdx (emulation::machine().thread().index)
#define blockIdx (emulation::machine().block_index())
#define blockDim (emulation::machine().block_size())

struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
struct uint4 {
  uint32_t x, y, z, w;
};
struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};

inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

inline char* shared_memory() { return reinterpret_cast<char*>(emulation::kSharedBase); }

template <class T>
T load(const T* address, emulation::Where where = emulation::Where::current()) {
  T value;
  std::memcpy(&value, emulation::machine().read(reinterpret_cast<uint64_t>(address), sizeof(T), where), sizeof(T));
  return value;
}

template <class T>
void store(T* address, T value, emulation::Where where = emulation::Where::current()) {
  std::memcpy(emulation::machine().write(reinterpret_cast<uint64_t>(address), sizeof(T), where), &value, sizeof(T));
}

inline void copy_async(void* shared, const void* global, bool valid,
                       emulation::Where where = emulation::Where::current()) {
  emulation::machine().copy_async(reinterpret_cast<uint64_t>(shared), reinterpret_cast<uint64_t>(global), valid, where);
}

inline void copy_async_commit() { emulation::machine().copy_async_commit(); }

template <int pending>
void copy_async_wait() {
  emulation::machine().copy_async_wait(pending);
}

template <class T>
T atomicAdd(T* address, T value, emulation::Where where = emulation::Where::current()) {
  char* at = emulation::machine().update(reinterpret_cast<uint64_t>(address), sizeof(T), where);
  T old;
  std::memcpy(&old, at, sizeof(T));
  value = static_cast<T>(old + value);
  std::memcpy(at, &value, sizeof(T));
  return old;
}

// ---------------------------------------------------------------------------------------------------------------
// Matrix fragments

namespace emulation {

inline void load_matrix(uint32_t (&words)[4], const void* row, bool transposed, Where where) {
  const auto address = reinterpret_cast<uint64_t>(row);
  if (address % 16 != 0) {
    machine().fault("ldmatrix: a row address that is no multiple of 16", where);
  }
  // Each lane reads the row it names, as the checks see it; the words then go to where the layout has them.
  std::array<uint16_t, 8> elements;
  for (int i = 0; i < 4; ++i) {
    std::memcpy(&elements[2 * i], machine().read(address + 4 * i, 4, where), 4);
  }
  struct Exchange {
    std::array<uint16_t, 8>* row;
    uint32_t* words;
  } exchange{&elements, words};
  machine().meet(
      kFullMask, transposed ? "ldmatrix.trans" : "ldmatrix", &exchange,
      [transposed](std::array<void*, kLanes>& lanes) {
        auto element = [&](int matrix, int r, int c) -> uint32_t {
          return (*static_cast<Exchange*>(lanes[8 * matrix + r])->row)[c];
        };
        for (int lane = 0; lane < kLanes; ++lane) {
          const int r = lane / 4;
          const int c = lane % 4 * 2;
          for (int matrix = 0; matrix < 4; ++matrix) {
            static_cast<Exchange*>(lanes[lane])->words[matrix] =
                transposed ? element(matrix, c, r) | element(matrix, c + 1, r) << 16
                           : element(matrix, r, c) | element(matrix, r, c + 1) << 16;
          }
        }
      },
      where);
}

template <class T>
float widen(uint16_t bits);
template <>
inline float widen<Bfloat16>(uint16_t bits) {
  return from_bfloat16(bits);
}
template <>
inline float widen<Float16>(uint16_t bits) {
  return from_half(bits);
}

struct Product {
  float* c;
  const uint32_t* a;
  uint32_t b0, b1;
};

template <class T>
void multiply(std::array<void*, kLanes>& lanes) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < kLanes; ++lane) {
    const auto& operand = *static_cast<Product*>(lanes[lane]);
    const int g = lane / 4;
    const int c = lane % 4 * 2;
    for (int half = 0; half < 2; ++half) {
      auto part = [half](uint32_t word) { return widen<T>(static_cast<uint16_t>(word >> (16 * half))); };
      a[g][c + half] = part(operand.a[0]);
      a[g + 8][c + half] = part(operand.a[1]);
      a[g][c + 8 + half] = part(operand.a[2]);
      a[g + 8][c + 8 + half] = part(operand.a[3]);
      b[c + half][g] = part(operand.b0);
      b[c + 8 + half][g] = part(operand.b1);
    }
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    float* out = static_cast<Product*>(lanes[lane])->c;
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + 8 * (i / 2);
      const int column = lane % 4 * 2 + i % 2;
      float sum = out[i];
      for (int k = 0; k < 16; ++k) {
        sum += a[row][k] * b[k][column];
      }
      out[i] = sum;
    }
  }
}

}  // namespace emulation

inline void load_matrix(uint32_t (&words)[4], const void* row, emulation::Where where = emulation::Where::current()) {
  emulation::load_matrix(words, row, false, where);
}

inline void load_matrix_transposed(uint32_t (&words)[4], const void* row,
                                   emulation::Where where = emulation::Where::current()) {
  emulation::load_matrix(words, row, true, where);
}

template <class T>
void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
         emulation::Where where = emulation::Where::current()) {
  emulation::Product mine{c, a, b0, b1};
  emulation::machine().meet(emulation::kFullMask, "mma.m16n8k16", &mine, emulation::multiply<T>, where);
}

// ---------------------------------------------------------------------------------------------------------------
// Numbers

template <class T>
uint32_t pack(float low, float high);
template <>
inline uint32_t pack<Bfloat16>(float low, float high) {
  return emulation::to_bfloat16(low) | static_cast<uint32_t>(emulation::to_bfloat16(high)) << 16;
}
template <>
inline uint32_t pack<Float16>(float low, float high) {
  return emulation::to_half(low) | static_cast<uint32_t>(emulation::to_half(high)) << 16;
}

template <class T>
float2 unpack(uint32_t word) {
  return {emulation::widen<T>(static_cast<uint16_t>(word)), emulation::widen<T>(static_cast<uint16_t>(word >> 16))};
}

inline float exp2_fast(float x) { return std::exp2(x); }
inline float log2_fast(float x) { return std::log2(x); }
inline float __uint_as_float(uint32_t bits) { return std::bit_cast<float>(bits); }
inline uint32_t __float_as_uint(float value) { return std::bit_cast<uint32_t>(value); }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint32_t>(static_cast<uint64_t>(a) * b >> 32); }

// ---------------------------------------------------------------------------------------------------------------
// Threads

inline void __syncthreads() { emulation::machine().barrier(); }

inline void __syncwarp(uint32_t mask = emulation::kFullMask, emulation::Where where = emulation::Where::current()) {
  emulation::machine().sync_warp(mask, where);
}

namespace emulation {

// Every lane of `mask` gives a value and gets the one that lane `source` gave.
template <class T>
T shuffle(uint32_t mask, T value, int source, const char* instruction, Where where) {
  struct Slot {
    T given, taken;
    int source;
  } slot{value, value, source};
  if (source < 0 || source >= kLanes || (mask >> source & 1) == 0) {
    machine().fault(std::string(instruction) + ": lane " + std::to_string(source) + " is not in the mask", where);
  }
  machine().meet(
      mask, instruction, &slot,
      [mask](std::array<void*, kLanes>& lanes) {
        for (int lane = 0; lane < kLanes; ++lane) {
          if (mask >> lane & 1) {
            auto* mine = static_cast<Slot*>(lanes[lane]);
            mine->taken = static_cast<Slot*>(lanes[mine->source])->given;
          }
        }
      },
      where);
  return slot.taken;
}

inline uint32_t ballot(uint32_t mask, bool vote, Where where) {
  struct Slot {
    bool vote;
    uint32_t result;
  } slot{vote, 0};
  machine().meet(
      mask, "a vote", &slot,
      [mask](std::array<void*, kLanes>& lanes) {
        uint32_t result = 0;
        for (int lane = 0; lane < kLanes; ++lane) {
          if (mask >> lane & 1) {
            result |= static_cast<uint32_t>(static_cast<Slot*>(lanes[lane])->vote) << lane;
          }
        }
        for (int lane = 0; lane < kLanes; ++lane) {
          if (mask >> lane & 1) {
            static_cast<Slot*>(lanes[lane])->result = result;
          }
        }
      },
      where);
  return slot.result;
}

}  // namespace emulation

template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int bits, emulation::Where where = emulation::Where::current()) {
  return emulation::shuffle(mask, value, emulation::machine().thread().lane ^ bits, "__shfl_xor_sync", where);
}

// Lanes below `distance` keep their own value.
template <class T>
T __shfl_up_sync(uint32_t mask, T value, int distance, emulation::Where where = emulation::Where::current()) {
  const int lane = emulation::machine().thread().lane;
  return emulation::shuffle(mask, value, lane >= distance ? lane - distance : lane, "__shfl_up_sync", where);
}

inline uint32_t __ballot_sync(uint32_t mask, bool vote, emulation::Where where = emulation::Where::current()) {
  return emulation::ballot(mask, vote, where);
}

inline bool __any_sync(uint32_t mask, bool vote, emulation::Where where = emulation::Where::current()) {
  return emulation::ballot(mask, vote, where) != 0;
}
