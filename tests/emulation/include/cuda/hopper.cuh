// The names of csrc/cuda/hopper.cuh for the emulation: what each does there is said there.

#pragma once

#include "cuda/tensor_map.cuh"

inline void barrier_init(uint64_t* barrier, int arrivals, emulation::Where where = emulation::Where::current()) {
  emulation::machine().phase_barrier_init(reinterpret_cast<uint64_t>(barrier), arrivals, where);
}

inline void barrier_arrive(uint64_t* barrier, emulation::Where where = emulation::Where::current()) {
  emulation::machine().phase_barrier_arrive(reinterpret_cast<uint64_t>(barrier), 0, where);
}

inline void barrier_arrive_expecting(uint64_t* barrier, int bytes,
                                     emulation::Where where = emulation::Where::current()) {
  emulation::machine().phase_barrier_arrive(reinterpret_cast<uint64_t>(barrier), bytes, where);
}

inline void barrier_wait(uint64_t* barrier, int parity, emulation::Where where = emulation::Where::current()) {
  emulation::machine().phase_barrier_wait(reinterpret_cast<uint64_t>(barrier), parity, where);
}

inline void fence_async() { emulation::machine().fence_async(); }

inline void copy_box(void* shared, const TensorMap& map, int x, int y, int z, int w, uint64_t* barrier,
                     emulation::Where where = emulation::Where::current()) {
  emulation::machine().copy_box(reinterpret_cast<uint64_t>(shared), map, {x, y, z, w},
                                reinterpret_cast<uint64_t>(barrier), where);
}

template <class... Fragments>
void warpgroup_fence(Fragments&...) {
  emulation::machine().warpgroup_fence(emulation::Where::current());
}

inline void warpgroup_commit(emulation::Where where = emulation::Where::current()) {
  emulation::machine().warpgroup_commit(where);
}

template <int pending, int n>
void warpgroup_wait(float (&)[n][4], emulation::Where where = emulation::Where::current()) {
  emulation::machine().warpgroup_wait(pending, where);
}

template <class T, int kColumns, bool kTransposed>
void warpgroup_multiply(float (*sums)[4], const uint32_t (&a)[4], uint64_t b_descriptor, bool adds,
                        emulation::Where where = emulation::Where::current()) {
  emulation::machine().warpgroup_multiply({kColumns, kTransposed, adds, &emulation::widen<T>}, sums[0], a, b_descriptor,
                                          where);
}

template <int count>
void registers_release() {}

template <int count>
void registers_claim() {}
