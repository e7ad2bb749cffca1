// The list of a query group: every key box that some of its rows select, once, in the order in which it is loaded.
#pragma once

#include "kittens/instructions.cuh"
#include "vsa/block_index.cuh"
#include "vsa/layout.cuh"

// The blocks of a row group, -1: none, and the lengths of their rows.
template <int kConsumers>
struct RowGroup {
    int block[kConsumers];
    int length[kConsumers];
};

// Which row each consumer's query box belongs to. Consecutive boxes of one block have the same row, which the first of their
// consumers, the reader, reads for all of them.
template <int kConsumers>
struct RowReaders {
    RowGroup<kConsumers> rows;
    int reader[kConsumers];
    int length[kConsumers];  // entries that each consumer reads: 0 unless it is a reader
};

// The query boxes that are attended together, one for each consumer.
template <int kConsumers>
struct QueryGroup {
    int block[kConsumers];      // -1: none
    int box[kConsumers];        // of the block; where a consumer takes several, the first
    int num_tiles_of[kConsumers];  // tiles that each attends
    int num_tiles;              // tiles that are loaded for all of them
    int poisoned;               // bit i: the row of consumer i names a column that does not exist
};

// A warp reads the rows of a group together: this many lanes read one row, and a cache line holds this many entries.
template <int kConsumers>
constexpr int kLanesPerRow = kittens::kWarpThreads / kConsumers;
constexpr int kEntriesPerLine = 128 / sizeof(int);

// A key box of a list: which one, which of its tokens are valid, and which consumers attend it.
template <int kConsumers>
struct alignas(VSA_KEY_TILE_BYTES) KeyTile {
    static constexpr int kMaskShift = 32 - kConsumers;

    uint32_t box_and_mask;
    uint32_t valid;  // which of its tokens are, see layout.cuh

    // The box, counted over the blocks of a head.
    __device__ __forceinline__ int box() const { return box_and_mask & ((1u << kMaskShift) - 1); }
    // Bit i: consumer i attends the box.
    __device__ __forceinline__ int consumer_mask() const { return box_and_mask >> kMaskShift; }
    __device__ __forceinline__ bool is_empty() const { return ::is_empty(valid); }
    // Where its load starts.
    __device__ __forceinline__ BoxOrigin origin(const TokenLayout& col_tokens) const {
        return origin_of_load(col_tokens, box(), valid);
    }

    __device__ __forceinline__ static KeyTile of(const TokenLayout& col_tokens, int block, int box, int consumer_mask) {
        return {uint32_t(consumer_mask) << kMaskShift | uint32_t(block * col_tokens.boxes.value + box),
                valid_tokens(col_tokens, block, box)};
    }
};
static_assert(sizeof(KeyTile<1>) == VSA_KEY_TILE_BYTES);

// What the warp that writes a list needs in shared memory. It covers a slice of the key boxes at a time, a bit for each.
template <int kConsumers>
struct TileListScratch {
    static constexpr int kSlice = 32 * kittens::kWarpThreads;
    static constexpr int kMaxFound = 6 * kittens::kWarpThreads;
    static constexpr int kFieldBits = 10;
    // Boxes are sorted by consumer mask.
    static constexpr int kMasks = 1 << kConsumers;

    RowReaders<kConsumers> readers;
    uint32_t selected[kConsumers][kittens::kWarpThreads];    // the bits of the slice
    uint16_t prefix[kMasks / 2][kittens::kWarpThreads][2];  // boxes of each mask up to and including each lane's
    float total[kMasks];                                    // boxes of each mask
    // Fields of kFieldBits: the box within the slice, its mask, and its rank among those of its mask.
    uint32_t found[kMaxFound];
};

// The bits of those boxes of a word whose consumer mask is this one.
template <int kConsumers>
__device__ __forceinline__ uint32_t boxes_of_mask(int mask, const uint32_t (&selected)[kConsumers]) {
    uint32_t bits = kittens::kAllLanes;
#pragma unroll
    for (int i = 0; i < kConsumers; ++i) bits &= mask >> i & 1 ? selected[i] : ~selected[i];
    return bits;
}

// Sets the bits of those boxes of a block that are in a slice and have tokens.
template <int kConsumers>
__device__ __forceinline__ void select_block(const TokenLayout& col_tokens, int block, int first_box,
                                             uint32_t (&selected)[kittens::kWarpThreads]) {
#pragma unroll 1
    for (int box = 0; box < col_tokens.boxes.value; ++box) {
        const uint32_t bit = block * col_tokens.boxes.value + box - first_box;
        if (bit >= TileListScratch<kConsumers>::kSlice ||
            (col_tokens.partial && KeyTile<kConsumers>::of(col_tokens, block, box, 0).is_empty()))
            continue;
        atomicOr(&selected[bit / 32], 1u << bit % 32);
    }
}

// Sets the bits of the boxes in a slice that the rows of a group name and that have tokens. Returns whether this lane has read
// a column that does not exist.
template <int kConsumers>
__device__ __forceinline__ bool select_boxes(const IndexTable& rows, const TokenLayout& col_tokens,
                                             const QueryGroup<kConsumers>& group, int head, int first_box,
                                             TileListScratch<kConsumers>& scratch) {
    const int lane = kittens::laneid(), i = lane / kLanesPerRow<kConsumers>;
    const int length = i < kConsumers ? scratch.readers.length[i] : 0;
    const int* row = length > 0 ? rows.row(head, group.block[i]) : nullptr;
    int entry = lane % kLanesPerRow<kConsumers>;
    // Entries are read one step ahead, to hide the latency of global memory.
    int next = entry < length ? row[entry] : 0;
#pragma unroll
    for (auto& of_row : scratch.selected) of_row[lane] = 0;
    __syncwarp();
    bool poisoned = false;
#pragma unroll 1
    while (entry < length) {
        const int block = next;
        entry += kLanesPerRow<kConsumers>;
        if (entry < length) next = row[entry];
        if (block < 0 || block >= rows.num_cols) {
            poisoned = true;
            continue;
        }
        select_block<kConsumers>(col_tokens, block, first_box, scratch.selected[i]);
    }
    __syncwarp();
    return poisoned;
}

// Where a box goes in a slice's part of the list. The boxes of each mask are spread evenly, so that all consumers advance at
// the same rate, and are in ascending order, so that thread blocks that run at the same time read the same col_tokens. Box p of
// the n of its mask is at (2p + 1) / 2n of the list; its position is the number of boxes of all masks that come before that,
// the lower mask first where they are equal.
template <int kMasks>
__device__ __forceinline__ int position_of(const float (&total)[kMasks], int mask, int rank) {
    // Exact: the products are below 2^24, and adding a half keeps each quotient further from an integer than the rounding of
    // the reciprocal can move it.
    const float of_mask = total[mask], inverse = 1.0f / (2 * of_mask);
    int position = 0;
#pragma unroll
    for (int other = 1; other < kMasks; ++other) {
        position += static_cast<int>(((2 * rank + 1) * total[other] + (of_mask + (other < mask ? 0.5f : -0.5f))) * inverse);
    }
    return position;
}

// Writes the list of a query group and, into the group, how many tiles there are. One warp.
//
// Loops are unrolled only where that is needed: the first list of a thread block waits for every instruction to be fetched, and
// other warps' loops need the instruction cache.
template <int kConsumers>
__device__ __forceinline__ void write_list(const IndexTable& rows, const TokenLayout& col_tokens, int head,
                                           TileListScratch<kConsumers>& scratch, QueryGroup<kConsumers>& group,
                                           KeyTile<kConsumers>* tiles) {
    using Scratch = TileListScratch<kConsumers>;
    static_assert(kConsumers >= 1 && kConsumers <= 4);
    constexpr int kMasks = Scratch::kMasks, kFieldBits = Scratch::kFieldBits;
    const int lane = kittens::laneid();
    const int num_boxes = rows.num_cols * col_tokens.boxes.value;
    // Each lane looks at 2^span_log2 consecutive boxes of a slice: the bits `bits` of word `word`.
    const int span_log2 = num_boxes > Scratch::kSlice / 2 ? 5 : 32 - __clz(uint32_t(num_boxes - 1) / kittens::kWarpThreads);
    const int word = (lane << span_log2) / 32;
    const uint32_t bits = ((2u << ((1 << span_log2) - 1)) - 1) << (lane << span_log2) % 32;
    bool poisoned = false;
    int num_tiles = 0, own_tiles = 0;
#pragma unroll 1
    for (int first_box = 0; first_box < num_boxes; first_box += Scratch::kSlice) {
        poisoned |= select_boxes(rows, col_tokens, group, head, first_box, scratch);
        uint32_t selected[kConsumers], left = 0;
#pragma unroll
        for (int i = 0; i < kConsumers; ++i) {
            selected[i] = scratch.selected[scratch.readers.reader[i]][word] & bits;
            left |= selected[i];
            const int tiles = __reduce_add_sync(kittens::kAllLanes, __popc(selected[i]));
            if (lane == i) own_tiles += tiles;
        }
        // Counts of two masks in each word, below 2^16 each. Mask 0 stands for all masks together.
        uint32_t counts[kMasks / 2];
#pragma unroll
        for (int mask = 0; mask < kMasks; mask += 2) {
            counts[mask / 2] =
                __popc(mask == 0 ? left : boxes_of_mask(mask, selected)) | __popc(boxes_of_mask(mask + 1, selected)) << 16;
        }
        kittens::prefix_sums(counts);
#pragma unroll
        for (int i = 0; i < kMasks / 2; ++i) {
            scratch.prefix[i][lane][0] = counts[i];
            scratch.prefix[i][lane][1] = counts[i] >> 16;
        }
        __syncwarp();
        if (lane < kMasks) scratch.total[lane] = scratch.prefix[lane / 2][kittens::kWarpThreads - 1][lane % 2];
        const uint32_t end = counts[0] & 0xffff, num_found = __shfl_sync(kittens::kAllLanes, end, kittens::kWarpThreads - 1);
        __syncwarp();

        // Lanes find very different numbers of boxes. They gather them in shared memory, from the last to the first, so that
        // then every lane writes as many tiles.
        uint32_t slot = end;
#pragma unroll 1
        for (uint32_t gathered = num_found; gathered > 0;) {
            const uint32_t begin = gathered - min(gathered, uint32_t(Scratch::kMaxFound));
#pragma unroll 1
            while (slot > begin && left != 0) {
                const int bit = 31 - __clz(left);
                left ^= 1u << bit;
                uint32_t mask = 0;
#pragma unroll
                for (int i = 0; i < kConsumers; ++i) mask |= (selected[i] >> bit & 1) << i;
                const uint32_t rank = --scratch.prefix[mask / 2][lane][mask % 2];
                scratch.found[--slot - begin] = (rank << kFieldBits | mask) << kFieldBits | (word * 32 + bit);
            }
            __syncwarp();
#pragma unroll 1
            for (uint32_t i = begin + lane; i < gathered; i += kittens::kWarpThreads) {
                const uint32_t found = scratch.found[i - begin];
                const int rank = found >> 2 * kFieldBits, mask = found >> kFieldBits & (kMasks - 1);
                const int box = first_box + (found & (Scratch::kSlice - 1)), block = col_tokens.boxes.quotient(box);
                tiles[num_tiles + position_of(scratch.total, mask, rank)] =
                    KeyTile<kConsumers>::of(col_tokens, block, box - block * col_tokens.boxes.value, mask);
            }
            __syncwarp();
            gathered = begin;
        }
        num_tiles += num_found;
    }

    const uint32_t poisoned_lanes = __ballot_sync(kittens::kAllLanes, poisoned);
    const bool is_poisoned = lane < kConsumers && poisoned_lanes >> scratch.readers.reader[lane] * kLanesPerRow<kConsumers> &
                                                      kittens::kAllLanes >> (32 - kLanesPerRow<kConsumers>);
    const uint32_t poisoned_consumers = __ballot_sync(kittens::kAllLanes, is_poisoned);
    if (lane < kConsumers) group.num_tiles_of[lane] = own_tiles;
    if (lane == 0) {
        group.poisoned = poisoned_consumers;
        group.num_tiles = num_tiles;
    }
    __syncwarp();
}

// The list of a single row that is bits already; its columns all exist. Of every 32 columns the first boxes come first.
__device__ __forceinline__ void write_list(const IndexBits& rows, const TokenLayout& col_tokens, int head, TileListScratch<1>&,
                                           QueryGroup<1>& group, KeyTile<1>* tiles) {
    constexpr int kWordBits = 32;
    const int lane = kittens::laneid();
    int num_tiles = 0;
#pragma unroll 1
    for (int first = 0; first < rows.num_words; first += kittens::kWarpThreads) {
        const uint32_t own = rows.word(head, group.block[0], first + lane);
        // Words in turn, in which each lane looks at one column.
#pragma unroll 1
        for (uint32_t left = __ballot_sync(kittens::kAllLanes, own != 0); left != 0; left &= left - 1) {
            const int word = __popc((left & -left) - 1);
            const bool is_selected = __shfl_sync(kittens::kAllLanes, own, word) >> lane & 1;
#pragma unroll 1
            for (int box = 0; box < col_tokens.boxes.value; ++box) {
                KeyTile<1> tile = {};
                if (is_selected) tile = KeyTile<1>::of(col_tokens, (first + word) * kWordBits + lane, box, 1);
                const bool is_listed = is_selected && !tile.is_empty();
                const uint32_t listed = __ballot_sync(kittens::kAllLanes, is_listed);
                if (is_listed) tiles[num_tiles + __popc(listed & ((1u << lane) - 1))] = tile;
                num_tiles += __popc(listed);
            }
        }
    }
    if (lane == 0) {
        group.num_tiles_of[0] = group.num_tiles = num_tiles;
        group.poisoned = 0;
    }
    __syncwarp();
}
