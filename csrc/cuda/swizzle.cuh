// Matrices in shared memory as the copy engine writes and the warpgroup products read them.
//
// A panel is 64 columns of 16-bit elements: rows of 128 bytes, eight 16-byte pieces each, piece j of row i lying where
// piece j ^ (i % 8) would (the swizzle of 128 bytes), so that a column of pieces lies in all banks. It starts at a
// multiple of 1024 bytes.

#pragma once

#include "cuda/device.cuh"

constexpr int kPanelColumns = 64;
constexpr int kPanelPitch = 2 * kPanelColumns;

// Bytes from a panel's start to piece `piece` of row `row`.
DEVICE int swizzled(int row, int piece) { return row * kPanelPitch + (piece ^ row % 8) * 16; }

// Names a panel, or what is left of it from some row on (a multiple of 8) or from some column on (a multiple of 16), as
// operand B of a warpgroup's product (PTX ISA, "Matrix descriptor"): groups of eight rows are 1024 bytes apart. The
// other distance, between panels side by side, is never used.
DEVICE uint64_t panel_descriptor(const void* start) {
  constexpr uint64_t kSwizzle128 = 1;
  constexpr uint64_t kEightRows = 8 * kPanelPitch / 16;
  return kSwizzle128 << 62 | kEightRows << 32 | uint64_t{1} << 16 | (shared_address(start) & 0x3ffff) >> 4;
}
