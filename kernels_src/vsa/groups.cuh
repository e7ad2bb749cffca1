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
    int trios, trio_rows, longer_trios;        // of a head; rows of a trio, and how many of the trios have one more
    int windows, window_trios, longer_windows; // the same of windows and trios
};
constexpr int kWindowTrios = kittens::kWarpThreads / kTrioRows;

struct Group {
    int q_block[kConsumers];   // -1: none
    int q_box[kConsumers];     // which box of it
    int tiles_of[kConsumers];  // how many tiles each attends
    int num_tiles;
    int poisoned;  // bit i: query block i names a key block that does not exist
};

constexpr int kEntriesOfLine = 128 / sizeof(int), kLinesOfRow = kittens::kWarpThreads / kTrioRows;

// The rows of a trio. Where `index` counts up, the longer trios of all windows come first. All lanes of a warp have one.
class Trio {
  public:
    __device__ __forceinline__ Trio(const Map& map, const Cut& cut, int64_t first_row, int index) {
        const auto row_of_trio = [&](int trio) {
            return min(trio * cut.trio_rows + min(trio, cut.longer_trios), map.num_q_blocks);
        };
        const int window = index % cut.windows;
        const int first_trio = window * cut.window_trios + min(window, cut.longer_windows);
        const int end_trio = first_trio + cut.window_trios + (window < cut.longer_windows);
        const int trio = first_trio + index / cut.windows;
        first_ = row_of_trio(first_trio);
        begin_ = row_of_trio(trio) - first_;
        end_ = row_of_trio(trio + 1) - first_;

        // Where all of the window are alike, these are the rows: they are on their way before it is known.
        const int lane = kittens::laneid(), row = begin_ + lane / kLinesOfRow, entry = lane % kLinesOfRow * kEntriesOfLine;
        if (row < end_ && entry < map.width) kittens::prefetch(map.row(first_row + first_ + row) + entry);
        // A lane ranks a row of the window. Lengths are nearly the same where exponent and three bits behind it are.
        const int num_rows = row_of_trio(end_trio) - first_;
        int work = -1;
        if (lane < num_rows) work = __float_as_int(float(map.length(first_row + first_ + lane))) >> 20;
        rank_ = lane;
        if (__all_sync(kittens::kAllLanes, work == __shfl_sync(kittens::kAllLanes, work, 0) || lane >= num_rows)) return;
        rank_ = 0;
#pragma unroll 4
        for (int other = 0; other < kittens::kWarpThreads; ++other) {
            const int work_of_other = __shfl_sync(kittens::kAllLanes, work, other);
            rank_ += work_of_other > work || (work_of_other == work && other < lane);
        }
    }

    // A row, -1: none.
    __device__ __forceinline__ int row(int i) const {
        const uint32_t lanes = __ballot_sync(kittens::kAllLanes, rank_ == begin_ + i);
        return begin_ + i < end_ ? first_ + __ffs(lanes) - 1 : -1;
    }

  private:
    int first_;        // row of the window
    int begin_, end_;  // ranks of the trio
    int rank_;         // of a lane's row
};

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
