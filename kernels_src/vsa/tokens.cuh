// Where the tokens of a block lie, for every order of tokens: a sequence is a video (frames, height, width) cut into tiles,
// which are the blocks, and these into boxes of 64 tokens, which TMA copies. A plain sequence is one row of one frame, and
// one of padded blocks a frame with a box in every row.
#pragma once

#include "kittens/types.cuh"

constexpr int kBoxTokens = 64;

// Tokens along the axes of a video.
struct Video {
    int t, h, w;
};

// Divides what is not negative by multiplication (Granlund and Montgomery, PLDI 1994).
struct Divisor {
    int value;
    uint32_t inverse;  // 2^(31 + shift) / value, rounded up
    int shift;         // the least for which 2^shift is at least the value

    __device__ __forceinline__ int quotient(int x) const { return __umulhi(2u * x, inverse) >> shift; }
};

// Where the heads of a tensor are in its map, whose five dimensions are channels, w, h, t and an outer one: a step of head or
// batch moves the first or the outer coordinate, by these factors.
struct HeadSteps {
    int head_channel, batch_channel;
    int head_outer, batch_outer;

    __device__ __forceinline__ int channel(int batch, int head) const { return head * head_channel + batch * batch_channel; }
    __device__ __forceinline__ int outer(int batch, int head) const { return head * head_outer + batch * batch_outer; }
};

// What a tensor of sizes says of a block, between 0 and the largest that it can be.
__device__ __forceinline__ int size_of_block(const void* sizes, bool sizes_are_64_bit, int block, int largest) {
    if (!sizes_are_64_bit) return max(0, min(static_cast<const int*>(sizes)[block], largest));
    const int64_t size = static_cast<const int64_t*>(sizes)[block];
    return static_cast<int>(max(int64_t(0), min(size, int64_t(largest))));
}

struct Order {
    Divisor tiles_w, tiles_h;  // of the video
    Divisor boxes_w, boxes_h;  // of a tile
    Video extent;
    Video tile;
    Video box;
    int box_w_log2, box_hw_log2;  // of its row and of its frame: all its extents are powers of two
    Divisor boxes;                // of a tile, in all
    int partial;                  // not every token of every block is valid
    int sizes_are_64_bit;
    const void* sizes;  // valid tokens of each block, which come first in it, or null
};

// Valid tokens of a box where blocks have sizes.
__device__ __forceinline__ int valid_tokens_of_box(const Order& order, int block, int box) {
    const int size = size_of_block(order.sizes, order.sizes_are_64_bit, block, order.boxes.value * kBoxTokens);
    return max(0, min(size - box * kBoxTokens, kBoxTokens));
}

__device__ __forceinline__ Video position_in(const Divisor& width, const Divisor& height, int index) {
    const int row = width.quotient(index), t = height.quotient(row);
    return {t, row - t * height.value, index - row * width.value};
}

// The first token of a box.
__device__ __forceinline__ Video origin_of_box(const Order& order, int block, int box) {
    const Video tile = position_in(order.tiles_w, order.tiles_h, block);
    const Video inside = position_in(order.boxes_w, order.boxes_h, box);
    return {tile.t * order.tile.t + inside.t * order.box.t, tile.h * order.tile.h + inside.h * order.box.h,
            tile.w * order.tile.w + inside.w * order.box.w};
}

// What of a box is inside the video: none where an extent is not positive.
__device__ __forceinline__ Video inside_of_box(const Order& order, const Video& origin) {
    return {min(order.box.t, order.extent.t - origin.t), min(order.box.h, order.extent.h - origin.h),
            min(order.box.w, order.extent.w - origin.w)};
}

// Where a token of a box lies in it.
__device__ __forceinline__ Video position_in_box(const Order& order, int token) {
    return {token >> order.box_hw_log2, token >> order.box_w_log2 & (order.box.h - 1), token & (order.box.w - 1)};
}
