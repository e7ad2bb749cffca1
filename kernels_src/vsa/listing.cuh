// The list of a group: every box of keys that some of it select, once, and in which order.
#pragma once

#include "vsa/groups.cuh"

// What one warp knows of the list that it writes, of a window of the keys: as many words of bits as it has lanes.
struct Listing {
    static constexpr int kWindow = 32 * kittens::kWarpThreads;
    static constexpr int kFinds = 6 * kittens::kWarpThreads;
    static constexpr int kFindBits = 10;

    Trio trio;
    // Boxes of queries that are of the same row of the map follow each other, and the first of them reads it for all.
    int reader[kConsumers];
    int length[kConsumers];  // entries that each reads

    uint32_t selected[kConsumers][kittens::kWarpThreads];       // a bit for each box of keys
    uint16_t up_to_lane[kKinds / 2][kittens::kWarpThreads][2];  // boxes of each kind, with those of the lanes before
    float total[kKinds];                                        // boxes of each kind
    uint32_t found[kFinds];  // a box's place in the window and, each kFindBits higher, its kind and its rank in that
};

// The keys of a word that are of a kind.
__device__ __forceinline__ uint32_t of_kind(int kind, const uint32_t (&selected)[kConsumers]) {
    uint32_t bits = kittens::kAllLanes;
#pragma unroll
    for (int i = 0; i < kConsumers; ++i) bits &= kind >> i & 1 ? selected[i] : ~selected[i];
    return bits;
}

// Sets the bits of those boxes in a window that rows name and that have tokens. Returns whether the lane has read the name of a
// key block that does not exist.
__device__ __forceinline__ bool select_boxes(const Map& map, const Order& keys, const Group& group, int64_t first_row,
                                             int first_box, Listing& listing) {
    const int lane = kittens::laneid(), i = lane / kLanesOfRow;
    const int length = i < kConsumers ? listing.length[i] : 0;
    const int* row = length > 0 ? map.row(first_row + group.q_block[i]) : nullptr;
    int entry = lane % kLanesOfRow;
    // An entry is read long before its turn, since memory is far.
    int next = entry < length ? row[entry] : 0;
#pragma unroll
    for (auto& of_row : listing.selected) of_row[lane] = 0;
    __syncwarp();
    bool poisoned = false;
#pragma unroll 1
    while (entry < length) {
        const int block = next;
        entry += kLanesOfRow;
        if (entry < length) next = row[entry];
        if (block < 0 || block >= map.num_kv_blocks) {
            poisoned = true;
            continue;
        }
#pragma unroll 1
        for (int box = 0; box < keys.boxes.value; ++box) {
            const uint32_t bit = block * keys.boxes.value + box - first_box;
            if (bit >= Listing::kWindow || (keys.partial && KeyTile::of(keys, block, box, 0).is_empty())) continue;
            atomicOr(&listing.selected[i][bit / 32], 1u << bit % 32);
        }
    }
    __syncwarp();
    return poisoned;
}

// Tiles that several of the group share and tiles of one alone are spread evenly over a window's part of the list, so that all
// consumers advance alike, and each kind is in ascending order, so that thread blocks that run at the same time read the same
// keys: box p of n of a kind has its place at (2p + 1) / 2n, and follows as many boxes of every kind as have a place before; of
// equal places the lower kind's comes first.
__device__ __forceinline__ int place_of(const float (&total)[kKinds], int kind, int rank) {
    // Exact: products of a window's numbers are less than 2^24, and with the half a quotient is further from integers than what
    // the inverse is rounded by.
    const float of_kind = total[kind], inverse = 1.0f / (2 * of_kind);
    int place = 0;
#pragma unroll
    for (int other = 1; other < kKinds; ++other) {
        place += static_cast<int>(((2 * rank + 1) * total[other] + (of_kind + (other < kind ? 0.5f : -0.5f))) * inverse);
    }
    return place;
}

// The sums over the lanes up to this one.
template <int n>
__device__ __forceinline__ void sum_up_to_lane(uint32_t (&x)[n]) {
#pragma unroll 1
    for (int step = 1; step < kittens::kWarpThreads; step *= 2) {
#pragma unroll
        for (int i = 0; i < n; ++i) {
            const uint32_t other = __shfl_up_sync(kittens::kAllLanes, x[i], step);
            if (kittens::laneid() >= step) x[i] += other;
        }
    }
}

// Writes the list of a group, and in the group how much that is. One warp.
//
// Loops are not unrolled where that is not needed: the first list of a thread block waits for every instruction, and other
// warps' loops share their cache.
__device__ __forceinline__ void write_list(const Map& map, const Order& keys, int64_t first_row, Listing& listing, Group& group,
                                           KeyTile* tiles) {
    const int lane = kittens::laneid();
    const int num_boxes = map.num_kv_blocks * keys.boxes.value;
    // Every lane looks at so many boxes of a window, which are these bits of a word.
    const int span_log2 = num_boxes > Listing::kWindow / 2 ? 5 : 32 - __clz(uint32_t(num_boxes - 1) / kittens::kWarpThreads);
    const int word = (lane << span_log2) / 32;
    const uint32_t bits = ((2u << ((1 << span_log2) - 1)) - 1) << (lane << span_log2) % 32;
    bool poisoned = false;
    int num_tiles = 0, own_tiles = 0;
#pragma unroll 1
    for (int first_box = 0; first_box < num_boxes; first_box += Listing::kWindow) {
        poisoned |= select_boxes(map, keys, group, first_row, first_box, listing);
        uint32_t selected[kConsumers], left = 0;
#pragma unroll
        for (int i = 0; i < kConsumers; ++i) {
            selected[i] = listing.selected[listing.reader[i]][word] & bits;
            left |= selected[i];
            const int tiles = __reduce_add_sync(kittens::kAllLanes, __popc(selected[i]));
            if (lane == i) own_tiles += tiles;
        }
        // Two counts at once, each less than 2^16: of all kinds together and of the first, and so on.
        uint32_t counts[kKinds / 2];
#pragma unroll
        for (int kind = 0; kind < kKinds; kind += 2) {
            counts[kind / 2] = __popc(kind == 0 ? left : of_kind(kind, selected)) | __popc(of_kind(kind + 1, selected)) << 16;
        }
        sum_up_to_lane(counts);
#pragma unroll
        for (int i = 0; i < kKinds / 2; ++i) {
            listing.up_to_lane[i][lane][0] = counts[i];
            listing.up_to_lane[i][lane][1] = counts[i] >> 16;
        }
        __syncwarp();
        if (lane < kKinds) listing.total[lane] = listing.up_to_lane[lane / 2][kittens::kWarpThreads - 1][lane % 2];
        const uint32_t end = counts[0] & 0xffff, num_found = __shfl_sync(kittens::kAllLanes, end, kittens::kWarpThreads - 1);
        __syncwarp();

        // Some lanes find many boxes, others none: the finds are gathered, from the last to the first, so that each lane then
        // has as many to write.
        uint32_t place = end;
#pragma unroll 1
        for (uint32_t gathered = num_found; gathered > 0;) {
            const uint32_t begin = gathered - min(gathered, uint32_t(Listing::kFinds));
#pragma unroll 1
            while (place > begin && left != 0) {
                const int bit = 31 - __clz(left);
                left ^= 1u << bit;
                uint32_t kind = 0;
#pragma unroll
                for (int i = 0; i < kConsumers; ++i) kind |= (selected[i] >> bit & 1) << i;
                const uint32_t rank = --listing.up_to_lane[kind / 2][lane][kind % 2];
                listing.found[--place - begin] = (rank << Listing::kFindBits | kind) << Listing::kFindBits | (word * 32 + bit);
            }
            __syncwarp();
#pragma unroll 1
            for (uint32_t i = begin + lane; i < gathered; i += kittens::kWarpThreads) {
                const uint32_t find = listing.found[i - begin];
                const int rank = find >> 2 * Listing::kFindBits, kind = find >> Listing::kFindBits & (kKinds - 1);
                const int box = first_box + (find & (Listing::kWindow - 1)), block = keys.boxes.quotient(box);
                tiles[num_tiles + place_of(listing.total, kind, rank)] =
                    KeyTile::of(keys, block, box - block * keys.boxes.value, kind);
            }
            __syncwarp();
            gathered = begin;
        }
        num_tiles += num_found;
    }

    const uint32_t poisoned_lanes = __ballot_sync(kittens::kAllLanes, poisoned);
    const bool is_poisoned =
        lane < kConsumers && (poisoned_lanes >> listing.reader[lane] * kLanesOfRow) % (1 << kLanesOfRow) != 0;
    const uint32_t poisoned_boxes = __ballot_sync(kittens::kAllLanes, is_poisoned);
    if (lane < kConsumers) group.tiles_of[lane] = own_tiles;
    if (lane == 0) {
        group.poisoned = poisoned_boxes;
        group.num_tiles = num_tiles;
    }
    __syncwarp();
}
