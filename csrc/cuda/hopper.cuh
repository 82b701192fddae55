// What sm_90a adds to the vocabulary of device.cuh: barriers in shared memory that count arrivals and bytes (mbarrier),
// the engine that copies boxes of a tensor (TMA), and products by whole warpgroups (wgmma). tests/emulation has its own
// version of this file.
//
// The copy engine and the warpgroup products reach shared memory by a path of their own (PTX: the async proxy). What
// threads wrote by ordinary stores or copy_async() is theirs to read only after fence_async() and a barrier.

#pragma once

#include <type_traits>

#include "cuda/device.cuh"
#include "cuda/tensor_map.cuh"

// ---------------------------------------------------------------------------------------------------------------
// Barriers in shared memory. One runs through phases 0, 1, 2, ...; a phase is over when `arrivals` threads have arrived
// and every byte that was announced has been copied. Thread 0 makes it, then come fence_async() and __syncthreads().

DEVICE void barrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

DEVICE void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrives, and announces `bytes` that copies will bring in this phase.
DEVICE void barrier_arrive_expecting(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

// Returns when the latest phase of this parity is over: at once for parity 1 of a new barrier.
DEVICE void barrier_wait(uint64_t* barrier, int parity) {
  uint32_t over = 0;
  while (over == 0) {
    asm volatile(
        "{ .reg .pred over; mbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2; selp.u32 %0, 1, 0, over; }"
        : "=r"(over)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  }
}

DEVICE void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---------------------------------------------------------------------------------------------------------------
// Copies

// One thread starts the copy of the box at (x, y, z, w), innermost first, to `shared`, zeros where the box leaves the
// tensor; its bytes, all of the box, count towards the present phase of `barrier`.
DEVICE void copy_box(void* shared, const TensorMap& map, int x, int y, int z, int w, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], "
      "[%6];" ::"r"(shared_address(shared)),
      "l"(&map), "r"(x), "r"(y), "r"(z), "r"(w), "r"(shared_address(barrier))
      : "memory");
}

// ---------------------------------------------------------------------------------------------------------------
// Products by a warpgroup: four warps, the first a multiple of four. Warp w holds rows 16 w to 16 w + 15 of A and of
// the sums in the fragments of m16n8k16 (device.cuh); B lies in shared memory. They run by themselves until the
// warpgroup_wait() for the group that warpgroup_commit() closed: so long their registers and B must be left alone.

// Fragments as they stand here: the compiler moves no change of them past this point.
template <int n>
DEVICE void pin(float (&fragments)[n][4]) {
#pragma unroll
  for (int i = 0; i < n; ++i) {
    asm volatile("" : "+f"(fragments[i][0]), "+f"(fragments[i][1]), "+f"(fragments[i][2]), "+f"(fragments[i][3]));
  }
}

template <int n>
DEVICE void pin(uint32_t (&fragments)[n][4]) {
#pragma unroll
  for (int i = 0; i < n; ++i) {
    asm volatile("" : "+r"(fragments[i][0]), "+r"(fragments[i][1]), "+r"(fragments[i][2]), "+r"(fragments[i][3]));
  }
}

// Every warp calls it before its first product, and when it has touched registers that the next product uses: these.
template <class... Fragments>
DEVICE void warpgroup_fence(Fragments&... used) {
  (pin(used), ...);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

DEVICE void warpgroup_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most `pending` of the latest groups still run; `sums` may be used then, if none of these adds to it.
template <int pending, int n>
DEVICE void warpgroup_wait(float (&sums)[n][4]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
  pin(sums);
}

#define SUMS1(i) "+f"(sums[i][0]), "+f"(sums[i][1]), "+f"(sums[i][2]), "+f"(sums[i][3])
#define SUMS2(i) SUMS1(i), SUMS1(i + 1)
#define SUMS4(i) SUMS2(i), SUMS2(i + 2)
#define SUMS8(i) SUMS4(i), SUMS4(i + 4)
#define WORDS2 "%0, %1, %2, %3, %4, %5, %6, %7"
#define WORDS4 WORDS2 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define WORDS8 WORDS4 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define PRODUCT(element, columns, sum_words, sum_operands, a0, a1, a2, a3, b, adding, transposed)               \
  asm volatile("{ .reg .pred adds; setp.ne.b32 adds, %" adding ", 0; wgmma.mma_async.sync.aligned.m64n" columns \
               "k16.f32." element "." element " {" sum_words "}, {%" a0 ", %" a1 ", %" a2 ", %" a3 "}, %" b     \
               ", adds, 1, 1, %" transposed "; }"                                                               \
               : sum_operands                                                                                   \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_descriptor), "r"(adds ? 1 : 0),              \
                 "n"(kTransposed ? 1 : 0))
#define PRODUCTS(element)                                                               \
  if constexpr (kColumns == 64) {                                                       \
    PRODUCT(element, "64", WORDS8, SUMS8(0), "32", "33", "34", "35", "36", "37", "38"); \
  } else if constexpr (kColumns == 32) {                                                \
    PRODUCT(element, "32", WORDS4, SUMS4(0), "16", "17", "18", "19", "20", "21", "22"); \
  } else {                                                                              \
    PRODUCT(element, "16", WORDS2, SUMS2(0), "8", "9", "10", "11", "12", "13", "14");   \
  }

// sums = A B, or where `adds` sums += A B, for 16 columns of A and kColumns (16, 32 or 64) of B. `b_descriptor` names
// kColumns rows of 16, B's transpose, or where kTransposed 16 rows of kColumns.
template <class T, int kColumns, bool kTransposed>
DEVICE void warpgroup_multiply(float (*sums)[4], const uint32_t (&a)[4], uint64_t b_descriptor, bool adds) {
  static_assert(kColumns == 16 || kColumns == 32 || kColumns == 64);
  if constexpr (std::is_same_v<T, Bfloat16>) {
    PRODUCTS("bf16")
  } else {
    PRODUCTS("f16")
  }
}

#undef PRODUCTS
#undef PRODUCT
#undef WORDS8
#undef WORDS4
#undef WORDS2
#undef SUMS8
#undef SUMS4
#undef SUMS2
#undef SUMS1

// ---------------------------------------------------------------------------------------------------------------
// Registers a thread, a multiple of 8, for all warps of a warpgroup: some release what others then claim.

template <int count>
DEVICE void registers_release() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
}

template <int count>
DEVICE void registers_claim() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
}
