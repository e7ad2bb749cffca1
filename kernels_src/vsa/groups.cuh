// What a thread block attends together: a group of boxes of queries, and the tiles of keys that it loads for them, every one
// once for all of the group that selected it.
#pragma once

#include "kittens/instructions.cuh"
#include "vsa/tokens.cuh"

// Boxes of queries in a group: one for each consumer warpgroup.
constexpr int kConsumers = 3;

// The key blocks that query blocks select.
struct Map {
    const int* q2k_idx;  // [rows, width]
    const int* q2k_num;  // [rows]
    int width;
    int num_q_blocks, num_kv_blocks;

    // The row of a query block of some head, of which so many entries count.
    __device__ __forceinline__ const int* row(int64_t index) const { return q2k_idx + index * width; }
    __device__ __forceinline__ int length(int64_t index) const { return max(0, min(q2k_num[index], width)); }
};

// The rows of a head are cut into trios, whose boxes, row after row, are dealt to as many groups as a block has boxes. Rows
// that follow each other select alike, but a group ends with its longest: so the trios of a window, which follow each other,
// get its rows from the longest to the shortest, those that are nearly as long as they follow each other.
constexpr int kTrioRows = kConsumers;
struct Cut {
    Divisor groups;                    // of a head
    int trio_rows, longer_trios;       // rows of a trio, and how many of the trios have one more
    Divisor windows;                   // of a head
    int window_trios, longer_windows;  // trios of a window, and how many of the windows have one more
};

// The query blocks of a trio, -1: none, and how many entries of their rows count.
struct Trio {
    int q_block[kTrioRows];
    int length[kTrioRows];
};

struct Group {
    int q_block[kConsumers];   // -1: none
    int q_box[kConsumers];     // which box of it
    int tiles_of[kConsumers];  // how many tiles each attends
    int num_tiles;
    int poisoned;  // bit i: query block i names a key block that does not exist
};

// A third of a warp's lanes reads a row of the map.
constexpr int kLanesOfRow = kittens::kWarpThreads / kTrioRows, kEntriesOfLine = 128 / sizeof(int);

// Finds the query blocks of a trio. Where `index` counts up, the longer trios of all windows come first. One warp.
__device__ __forceinline__ void find_trio(const Map& map, const Cut& cut, int64_t first_row, int index, Trio& trio) {
    const auto first_row_of = [&](int i) { return min(i * cut.trio_rows + min(i, cut.longer_trios), map.num_q_blocks); };
    const int in_window = cut.windows.quotient(index), window = index - in_window * cut.windows.value;
    const int first_trio = window * cut.window_trios + min(window, cut.longer_windows);
    const int end_trio = first_trio + cut.window_trios + (window < cut.longer_windows);
    const int first = first_row_of(first_trio), num_rows = first_row_of(end_trio) - first;
    const int begin = first_row_of(first_trio + in_window) - first, end = first_row_of(first_trio + in_window + 1) - first;

    // Where all of the window are alike, these are the rows: they are on their way before it is known.
    const int lane = kittens::laneid(), row = begin + lane / kLanesOfRow, entry = lane % kLanesOfRow * kEntriesOfLine;
    if (row < end && entry < map.width) kittens::prefetch(map.row(first_row + first + row) + entry);
    // A lane ranks a row of the window. Lengths are nearly the same where exponent and three bits behind it are.
    const int length = lane < num_rows ? map.length(first_row + first + lane) : 0;
    const int work = lane < num_rows ? __float_as_int(float(length)) >> 20 : -1;
    const int work_of_first = kittens::uniform(work);
    int rank = lane;
    if (__builtin_expect(__any_sync(kittens::kAllLanes, work >= 0 && work != work_of_first), 0)) {
        rank = 0;
#pragma unroll 1
        for (int other = 0; other < kittens::kWarpThreads; ++other) {
            const int work_of_other = __shfl_sync(kittens::kAllLanes, work, other);
            rank += work_of_other > work || (work_of_other == work && other < lane);
        }
    }
    const int of_trio = rank - begin;
    if (of_trio >= 0 && of_trio < kTrioRows) {
        trio.q_block[of_trio] = rank < end ? first + lane : -1;
        trio.length[of_trio] = rank < end ? length : 0;
    }
    __syncwarp();
}

// Which of a group attend a box of keys, a bit each: its kind.
constexpr int kKinds = 1 << kConsumers;

// A box of keys in a group's list, as it is loaded: where it lies, which of its tokens are valid, and its kind.
struct alignas(16) KeyTile {
    static constexpr int kMembersShift = 32 - kConsumers;
    static constexpr uint32_t kWhole = 0;  // every token is valid

    int w, h;
    uint32_t t_and_members;
    uint32_t valid;  // the first valid token, and the extents along t, h and w that are inside the video, a byte each

    __device__ __forceinline__ int t() const { return t_and_members & ((1u << kMembersShift) - 1); }
    __device__ __forceinline__ int members() const { return t_and_members >> kMembersShift; }
    __device__ __forceinline__ bool is_empty() const {
        if (valid == kWhole) return false;
        return (valid & 255) == kBoxTokens || (valid >> 8 & 255) == 0 || (valid >> 16 & 255) == 0 || valid >> 24 == 0;
    }

    __device__ __forceinline__ static KeyTile of(const Order& keys, int block, int box, int members) {
        Video origin = origin_of_box(keys, block, box);
        Video inside = keys.box;
        int first = 0;
        if (keys.sizes != nullptr) {
            // Valid tokens move to the end of their box: what is before the start of its row arrives as zeros.
            first = kBoxTokens - valid_tokens_of_box(keys, block, box);
            origin.w = -first;
        } else {
            inside = inside_of_box(keys, origin);
        }
        const bool whole = first == 0 && inside.t == keys.box.t && inside.h == keys.box.h && inside.w == keys.box.w;
        const uint32_t packed = first | max(inside.t, 0) << 8 | max(inside.h, 0) << 16 | max(inside.w, 0) << 24;
        // A box that is outside along every axis is empty, and not whole.
        const uint32_t valid = whole ? kWhole : packed == kWhole ? kBoxTokens : packed;
        return {origin.w, origin.h, uint32_t(members) << kMembersShift | uint32_t(origin.t), valid};
    }

    __device__ __forceinline__ static bool is_valid(const Order& keys, uint32_t valid, int token) {
        const Video at = position_in_box(keys, token);
        return token >= int(valid & 255) && at.t < int(valid >> 8 & 255) && at.h < int(valid >> 16 & 255) &&
               at.w < int(valid >> 24);
    }
};
