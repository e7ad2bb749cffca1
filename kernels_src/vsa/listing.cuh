// The list of a group: every box of keys that some of it select, once, and in which order.
#pragma once

#include "vsa/groups.cuh"

// What one warp knows of the list that it writes, of a window of the keys: as many words of bits as it has lanes.
struct Listing {
    static constexpr int kWindow = 32 * kittens::kWarpThreads;
    static constexpr int kFinds = 6 * kittens::kWarpThreads;

    uint32_t selected[kConsumers][kittens::kWarpThreads];  // a bit for each box of keys
    int total[kKinds];                                     // boxes of each kind in the list
    int counted[kKinds];                                   // those of them in the windows before
    int poisoned;                                          // bit i: row i names a key block that does not exist
    uint16_t before[kKinds][kittens::kWarpThreads];        // those of them in this window that come before a lane's
    struct {
        uint32_t box : 10, rank : 10, kind : kConsumers;  // the place in the window, and that among its kind there
    } found[kFinds];
};

// The keys of a word that are of a kind.
__device__ __forceinline__ uint32_t of_kind(int kind, const uint32_t (&selected)[kConsumers]) {
    uint32_t bits = kittens::kAllLanes;
#pragma unroll
    for (int i = 0; i < kConsumers; ++i) bits &= kind >> i & 1 ? selected[i] : ~selected[i];
    return bits;
}

// Whether a box of queries is of the same block as the one before.
__device__ __forceinline__ bool selects_as_before(const Group& group, int i) {
    return i > 0 && group.q_block[i] == group.q_block[i - 1];
}

// Sets the bits of those boxes in a window that a group's rows name and that have tokens.
//
// Rows are read side by side, and entries before it is known whether they count, since memory is far. What follows is not
// unrolled: other warps' loops share the cache of instructions.
__device__ __forceinline__ void select_boxes(const Map& map, const Order& keys, const Group& group, int64_t first_row, int first_box,
                                            Listing& listing) {
    const auto& row = group.q_block;
    const int lane = kittens::laneid();
    int length[kConsumers], upcoming[kConsumers], longest = 0;
#pragma unroll
    for (int i = 0; i < kConsumers; ++i) {
        listing.selected[i][lane] = 0;
        length[i] = upcoming[i] = 0;
        if (row[i] < 0 || selects_as_before(group, i)) continue;
        length[i] = map.length(first_row + row[i]);
        if (lane < map.width) upcoming[i] = map.row(first_row + row[i])[lane];
    }
#pragma unroll
    for (int i = 0; i < kConsumers; ++i) longest = max(longest, length[i]);
    __syncwarp();
#pragma unroll 1
    for (int entry = lane; entry < longest; entry += kittens::kWarpThreads) {
        int named[kConsumers];
#pragma unroll
        for (int i = 0; i < kConsumers; ++i) {
            named[i] = upcoming[i];
            const int next = entry + kittens::kWarpThreads;
            if (next < length[i]) upcoming[i] = map.row(first_row + row[i])[next];
        }
#pragma unroll 1
        for (int i = 0; i < kConsumers; ++i) {
            int block = 0, of_row = 0;
#pragma unroll
            for (int j = 0; j < kConsumers; ++j) {
                if (i == j) block = named[j], of_row = length[j];
            }
            if (entry >= of_row) continue;
            const bool exists = block >= 0 && block < map.num_kv_blocks;
            if (!exists) atomicOr(&listing.poisoned, 1 << i);
#pragma unroll 1
            for (int box = 0; exists && box < keys.boxes; ++box) {
                const uint32_t bit = block * keys.boxes + box - first_box;
                if (bit >= Listing::kWindow || (keys.partial && KeyTile::of(keys, block, box, 0).is_empty())) continue;
                atomicOr(&listing.selected[i][bit / 32], 1u << bit % 32);
            }
        }
    }
    __syncwarp();
}

// Tiles that several of the group share and tiles of one alone are spread evenly over the list, so that all consumers advance
// alike, and each kind is in ascending order, so that thread blocks that run at the same time read the same keys: box p of n
// of a kind has its place at (2p + 1) / 2n of the list, and follows as many boxes of every other kind as have a place before.
__device__ __forceinline__ int place_of(const int (&total)[kKinds], int kind, int rank) {
    const int of_kind = total[kind], twice = 2 * of_kind;
    const float inverse = 1.0f / twice;
    int place = rank;
#pragma unroll
    for (int other = 1; other < kKinds; ++other) {
        if (other == kind) continue;
        // Of equal places the lower kind's comes first. Up to 2^20 boxes the quotient in fp32 is at most one too high or low,
        // so that the rest is small, whatever overflows on the way to it.
        const uint32_t of_other = total[other];
        int quotient = static_cast<int>((float(2 * rank + 1) * of_other + of_kind) * inverse);
        const int rest = (2 * rank + 1) * of_other + of_kind - (other > kind) - uint32_t(quotient) * twice;
        quotient += rest < 0 ? -1 : rest >= twice ? 1 : 0;
        place += quotient;
    }
    return place;
}

// The sum over the lanes up to this one.
__device__ __forceinline__ uint32_t sum_up_to_lane(uint32_t x) {
#pragma unroll
    for (int step = 1; step < kittens::kWarpThreads; step *= 2) {
        const uint32_t other = __shfl_up_sync(kittens::kAllLanes, x, step);
        if (kittens::laneid() >= step) x += other;
    }
    return x;
}

// Writes the list of a group whose query blocks are given, and in the group how much that is. One warp.
__device__ __forceinline__ void write_list(const Map& map, const Order& keys, int64_t first_row, Listing& listing, Group& group,
                                           KeyTile* tiles) {
    const int lane = kittens::laneid();
    const int num_boxes = map.num_kv_blocks * keys.boxes;
    // Every lane looks at so many boxes of a window.
    const int span_log2 = num_boxes > Listing::kWindow / 2 ? 5 : 32 - __clz((num_boxes - 1) / kittens::kWarpThreads);
    const int first_bit = lane << span_log2;
    if (lane < kKinds) listing.total[lane] = listing.counted[lane] = 0;
    if (lane == 0) listing.poisoned = 0;
    __syncwarp();

    // Every window is looked at twice, to count and to list, but for one that is alone.
    const int windows = (num_boxes + Listing::kWindow - 1) / Listing::kWindow;
    uint32_t own[kConsumers], place = 0, num_found = 0;
#pragma unroll 1
    for (int turn = 0; turn < 2 * windows; ++turn) {
        const bool counts = turn < windows;
        const int first_box = (counts ? turn : turn - windows) * Listing::kWindow;
        if (counts || windows > 1) {
            select_boxes(map, keys, group, first_row, first_box, listing);
            uint32_t selected = 0;
#pragma unroll
            for (int i = 0; i < kConsumers; ++i) {
                const uint32_t word = listing.selected[i][first_bit / 32];
                const uint32_t of_lane = word >> first_bit % 32 & ((2u << ((1 << span_log2) - 1)) - 1);
                own[i] = selects_as_before(group, i) ? own[i - 1] : of_lane;
                selected |= own[i];
            }
            // The sums of two counts at once, each less than 2^16: of all kinds together and of the first, and so on.
#pragma unroll
            for (int kind = 0; kind < kKinds; kind += 2) {
                const uint32_t low = __popc(kind == 0 ? selected : of_kind(kind, own)), high = __popc(of_kind(kind + 1, own));
                const uint32_t sums = sum_up_to_lane(high << 16 | low), sum_low = sums & 0xffff, sum_high = sums >> 16;
                if (kind == 0) {
                    place = sum_low - low;
                    num_found = __shfl_sync(kittens::kAllLanes, sum_low, kittens::kWarpThreads - 1);
                }
                listing.before[kind][lane] = sum_low - low;
                listing.before[kind + 1][lane] = sum_high - high;
                if (counts && lane == kittens::kWarpThreads - 1) {
                    listing.total[kind] += sum_low;
                    listing.total[kind + 1] += sum_high;
                }
            }
            __syncwarp();
        }
        if (counts) continue;

        // Some lanes find many boxes, others none: the finds are gathered, so that each lane then has as many to write.
        uint32_t left = 0;
#pragma unroll
        for (uint32_t bits : own) left |= bits;
#pragma unroll 1
        for (uint32_t gathered = 0; gathered < num_found; gathered += Listing::kFinds) {
            const uint32_t end = min(gathered + Listing::kFinds, num_found);
#pragma unroll 1
            for (; left != 0 && place < end; left &= left - 1, ++place) {
                const int bit = __ffs(left) - 1;
                uint32_t kind = 0;
#pragma unroll
                for (int i = 0; i < kConsumers; ++i) kind |= (own[i] >> bit & 1) << i;
                const uint32_t rank = listing.before[kind][lane]++;
                listing.found[place - gathered] = {uint32_t(first_bit + bit), rank, kind};
            }
            __syncwarp();
#pragma unroll 1
            for (uint32_t i = gathered + lane; i < end; i += kittens::kWarpThreads) {
                const auto find = listing.found[i - gathered];
                const int kind = find.kind, box = first_box + find.box, block = box / keys.boxes;
                const int place_in_list = place_of(listing.total, kind, listing.counted[kind] + find.rank);
                tiles[place_in_list] = KeyTile::of(keys, block, box - block * keys.boxes, kind);
            }
            __syncwarp();
        }
        // The last lane has counted all of the window.
        if (lane > 0 && lane < kKinds) listing.counted[lane] += listing.before[lane][kittens::kWarpThreads - 1];
        __syncwarp();
    }

    if (lane < kConsumers) {
        int tiles_of_box = 0;
#pragma unroll
        for (int kind = 1; kind < kKinds; ++kind) tiles_of_box += kind >> lane & 1 ? listing.total[kind] : 0;
        group.tiles_of[lane] = tiles_of_box;
    }
    if (lane == 0) {
        int poisoned = 0;
#pragma unroll
        for (int i = 0; i < kConsumers; ++i) {
            poisoned |= (selects_as_before(group, i) ? poisoned << 1 : listing.poisoned) & 1 << i;
        }
        group.poisoned = poisoned;
        group.num_tiles = listing.total[0];
    }
    __syncwarp();
}
