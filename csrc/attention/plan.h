// What the CPU kernels walk: a schedule's full tiles as they are, and its masked tiles resolved to short lists.
//
// The kernels keep 16 neighbouring positions (a group) in vector lanes. For every group the plan lists, over all masked
// tiles of its query tile at once, the pairs of neighbouring keys that at least one of the 16 queries sees, with one
// bit a query: nothing else of a masked tile is ever computed. `by_key` is the same with the roles swapped, for the
// backward pass. Built once per schedule.
#pragma once

#include <cstdint>
#include <vector>

namespace dalle::attention {

constexpr int kTile = 64;                // positions in a tile, queries and keys alike
constexpr int kGroup = 16;               // positions that share the lanes of a vector (two vectors with AVX2)
constexpr int kGroups = kTile / kGroup;  // groups in a tile

// A pair of positions (2 index, 2 index + 1) on the side that is walked; bit i of bits[j] says that lane i of the group
// and position 2 index + j see each other.
struct Pair {
  int32_t index;
  uint16_t bits[2];
};

struct Lists {
  const int32_t* full_offsets;  // [tiles + 1]
  const int32_t* full_tiles;    // full tiles of tile t: full_offsets[t] .. full_offsets[t + 1] - 1
  const int32_t* pair_offsets;  // [tiles kGroups + 1]
  const Pair* pairs;            // pairs of group g: pair_offsets[g] .. pair_offsets[g + 1] - 1, ascending
};

// Queries are all tokens, or a run of them: `query_order` then counts from its first.
struct Plan {
  int32_t length, tiles;
  const int32_t* order;  // [length]: the token at a position
  int32_t query_length, query_tiles;
  const int32_t* query_order;  // [query_length]: the row of q at a position
  Lists by_query, by_key;
};

// One direction of a schedule with 64 x 64 tiles: entries offsets[t] .. offsets[t + 1] - 1 of `others` and `mask_ids`
// belong to tile t, the first full_counts[t] full. masks[id] holds 64 rows of two words, one row for each position on
// the walked side, with bits over the lane side.
struct ScheduleSide {
  const int32_t *offsets, *others, *mask_ids, *full_counts, *masks;
};

struct ListStorage {
  std::vector<int32_t> full_offsets, full_tiles, pair_offsets;
  std::vector<Pair> pairs;
};

// Of `length` positions in the lanes and `walked` on the other side.
ListStorage build_lists(const ScheduleSide& side, int32_t length, int32_t walked);

// What of tile t's lists lies in tiles first .. last - 1 of the other side.
struct Seen {
  const int32_t *full, *full_end;
  const Pair *pairs[kGroups], *pairs_end[kGroups];

  bool any() const {
    bool some = full != full_end;
    for (int g = 0; g < kGroups; g++) some |= pairs[g] != pairs_end[g];
    return some;
  }
};
Seen seen_by(const Lists& lists, int32_t t, int32_t first, int32_t last);

// Where a range of queries puts what it finds for a tile of keys: another range has it all, this one has it all, or
// partial slot n >= 0.
constexpr int32_t kElsewhere = -2, kHere = -1;

// Ranges of query tiles cut at `cuts`: destinations [ranges, tiles of keys], and for tile t of them the partial slots
// slot_offsets[t] .. slot_offsets[t + 1] - 1 in the order of the ranges. Every tile has exactly one kHere, or slots.
struct Ranges {
  std::vector<int32_t> destinations, slot_offsets;
};
Ranges share_keys(const Plan& plan, const std::vector<int32_t>& cuts);

// Key (or query) positions that tile t computes against its 64 lanes, in units of 16 lanes: what work is balanced by.
inline int64_t tile_cost(const Lists& lists, int32_t t) {
  const int64_t full = lists.full_offsets[t + 1] - lists.full_offsets[t];
  const int64_t pairs = lists.pair_offsets[(t + 1) * kGroups] - lists.pair_offsets[t * kGroups];
  return full * kTile * kGroups + pairs * 2;
}

}  // namespace dalle::attention
