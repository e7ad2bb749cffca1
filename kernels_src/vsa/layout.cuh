// Where the tokens of a block lie. Every order of tokens is described as a video (frames, height, width) that is cut into
// tiles, which are the blocks, and each tile into boxes of kBoxTokens tokens, which TMA copies. A plain sequence is a video of
// one frame and one row. Keys in padded blocks are a video of one frame with a row for each box, so that TMA can fill with
// zeros what is not valid.
#pragma once

#include "kittens/tma.cuh"
#include "kittens/types.cuh"

constexpr int kBoxTokens = VSA_BOX_TOKENS;

// Tokens along the axes of a video.
struct Extent3 {
    int t, h, w;
};

// Division of non-negative numbers by multiplication (Granlund and Montgomery, PLDI 1994).
struct Divisor {
    int value;
    uint32_t inverse;  // 2^(31 + shift) / value, rounded up
    int shift;         // ceil(log2(value))

    __device__ __forceinline__ int quotient(int x) const { return __umulhi(2u * x, inverse) >> shift; }
};

// Where heads and batches are in a tensor map, whose five dimensions are (channels, w, h, t, outer): each moves the channel or
// the outer coordinate by these steps.
struct HeadSteps {
    int head_channel, batch_channel;
    int head_outer, batch_outer;

    __device__ __forceinline__ int channel(int batch, int head) const { return head * head_channel + batch * batch_channel; }
    __device__ __forceinline__ int outer(int batch, int head) const { return head * head_outer + batch * batch_outer; }
};

// A tensor of tokens, as TMA reads it.
struct TokenTensor {
    kittens::tensor_map map;
    HeadSteps steps;

    // The coordinates of a token of a head.
    __device__ __forceinline__ kittens::coordinates at(int batch, int head, const Extent3& token) const {
        return {{steps.channel(batch, head), token.w, token.h, token.t, steps.outer(batch, head)}};
    }
};

// How a sequence is cut into blocks, and its blocks into boxes.
struct TokenLayout {
    Divisor tiles_w, tiles_h;  // tiles in a row and in a column of the video
    Divisor boxes_w, boxes_h;  // boxes in a row and in a column of a tile
    Extent3 extent;
    Extent3 tile;
    Extent3 box;                  // powers of two
    int box_w_log2, box_hw_log2;  // of the tokens in a row and in a frame of a box
    Divisor boxes;                // boxes of a tile
    int partial;                  // some block has tokens that are not valid
    int sizes_are_64_bit;
    const void* sizes;  // int32 or int64, valid tokens of each block, which come first in it; null: all inside the video
};

// Valid tokens of a box of a block that has a size. Sizes are clamped to 0 and the number of tokens of a block.
__device__ __forceinline__ int valid_tokens_of_box(const TokenLayout& layout, int block, int box) {
    const int most = layout.boxes.value * kBoxTokens;
    int size;
    if (layout.sizes_are_64_bit) {
        const int64_t given = static_cast<const int64_t*>(layout.sizes)[block];
        size = static_cast<int>(max(int64_t(0), min(given, int64_t(most))));
    } else {
        size = max(0, min(static_cast<const int*>(layout.sizes)[block], most));
    }
    return max(0, min(size - box * kBoxTokens, kBoxTokens));
}

__device__ __forceinline__ Extent3 position_in(const Divisor& width, const Divisor& height, int index) {
    const int row = width.quotient(index), t = height.quotient(row);
    return {t, row - t * height.value, index - row * width.value};
}

// The first token of a box of a block.
__device__ __forceinline__ Extent3 origin_of_box(const TokenLayout& layout, int block, int box) {
    const Extent3 tile = position_in(layout.tiles_w, layout.tiles_h, block);
    const Extent3 inside = position_in(layout.boxes_w, layout.boxes_h, box);
    return {tile.t * layout.tile.t + inside.t * layout.box.t, tile.h * layout.tile.h + inside.h * layout.box.h,
            tile.w * layout.tile.w + inside.w * layout.box.w};
}

// The part of a box that is inside the video; the box has no token where an extent is not positive.
__device__ __forceinline__ Extent3 extent_of_box(const TokenLayout& layout, const Extent3& origin) {
    return {min(layout.box.t, layout.extent.t - origin.t), min(layout.box.h, layout.extent.h - origin.h),
            min(layout.box.w, layout.extent.w - origin.w)};
}

// Where a token of a box lies in it.
__device__ __forceinline__ Extent3 position_in_box(const TokenLayout& layout, int token) {
    return {token >> layout.box_hw_log2, token >> layout.box_w_log2 & (layout.box.h - 1), token & (layout.box.w - 1)};
}
