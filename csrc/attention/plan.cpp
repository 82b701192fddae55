#include "attention/plan.h"

#include <algorithm>

namespace dalle::attention {

ListStorage build_lists(const ScheduleSide& side, int32_t length) {
  ListStorage lists;
  const int32_t tiles = (length + kTile - 1) / kTile;
  lists.full_offsets.push_back(0);
  lists.pair_offsets.push_back(0);
  std::vector<int32_t> masked;
  for (int32_t t = 0; t < tiles; t++) {
    const int32_t begin = side.offsets[t], middle = begin + side.full_counts[t], end = side.offsets[t + 1];
    lists.full_tiles.insert(lists.full_tiles.end(), side.others + begin, side.others + middle);
    lists.full_offsets.push_back(int32_t(lists.full_tiles.size()));
    for (int g = 0; g < kGroups; g++) {
      // Lanes past the end see nothing, whatever the schedule's bits say there.
      const int lanes = std::clamp(length - t * kTile - g * kGroup, 0, kGroup);
      const uint32_t alive = (1u << lanes) - 1u;
      for (int32_t entry = middle; entry < end; entry++) {
        const int32_t other = side.others[entry];
        const int32_t* rows = side.masks + int64_t(side.mask_ids[entry]) * kTile * 2 + g / 2;
        for (int p = 0; p < kTile; p += 2) {
          Pair pair{(other * kTile + p) / 2, {0, 0}};
          for (int j = 0; j < 2; j++)
            if (other * kTile + p + j < length)
              pair.bits[j] = uint16_t((uint32_t(rows[(p + j) * 2]) >> (g % 2 * kGroup)) & alive);
          if (pair.bits[0] | pair.bits[1]) lists.pairs.push_back(pair);
        }
      }
      lists.pair_offsets.push_back(int32_t(lists.pairs.size()));
    }
  }
  return lists;
}

}  // namespace dalle::attention
