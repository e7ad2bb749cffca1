// The layout of one video (frames, height, width) that is cut into tiles, which are the blocks. A plain sequence is a video of
// one frame and one row. Keys in padded blocks are a video of one frame with a row for each box, so that TMA can fill with
// zeros what is not valid. See layout.cuh.
#pragma once

using BoxOrigin = Extent3;

// A tensor of tokens, as TMA reads it.
struct TokenTensor {
    kittens::tensor_map map;
    HeadSteps steps;

    __device__ __forceinline__ kittens::coordinates at(int batch, int head, const BoxOrigin& box) const {
        return steps.at(batch, head, box.t, box.h, box.w);
    }
    __device__ __forceinline__ void acquire_maps() const {}
    __device__ __forceinline__ const kittens::tensor_map& map_of(const BoxOrigin&) const { return map; }
};

struct TokenLayout {
    Divisor tiles_w, tiles_h;  // tiles in a row and in a column of the video
    Divisor boxes_w, boxes_h;  // boxes in a row and in a column of a tile
    Extent3 extent;
    Extent3 tile;
    BoxShape box;
    Divisor boxes;  // boxes of a tile
    int partial;    // some block has tokens that are not valid
    int sizes_are_64_bit;
    const void* sizes;  // int32 or int64, valid tokens of each block, which come first in it; null: all inside the video

    __device__ __forceinline__ int num_tokens() const { return extent.t * extent.h * extent.w; }
};

// The size of a block that has one, clamped to 0 and the number of tokens of a block.
__device__ __forceinline__ int size_of_block(const TokenLayout& layout, int block) {
    const int most = layout.boxes.value * kBoxTokens;
    if (layout.sizes_are_64_bit) {
        const int64_t given = static_cast<const int64_t*>(layout.sizes)[block];
        return static_cast<int>(max(int64_t(0), min(given, int64_t(most))));
    }
    return max(0, min(static_cast<const int*>(layout.sizes)[block], most));
}

// Valid tokens of a box of a block that has a size.
__device__ __forceinline__ int valid_tokens_of_box(const TokenLayout& layout, int block, int box) {
    return max(0, min(size_of_block(layout, block) - box * kBoxTokens, kBoxTokens));
}

__device__ __forceinline__ Extent3 position_in(const Divisor& width, const Divisor& height, int index) {
    const int row = width.quotient(index), t = height.quotient(row);
    return {t, row - t * height.value, index - row * width.value};
}

__device__ __forceinline__ BoxOrigin origin_of_box(const TokenLayout& layout, int block, int box) {
    const Extent3 tile = position_in(layout.tiles_w, layout.tiles_h, block);
    const Extent3 inside = position_in(layout.boxes_w, layout.boxes_h, box);
    return {tile.t * layout.tile.t + inside.t * layout.box.extent.t, tile.h * layout.tile.h + inside.h * layout.box.extent.h,
            tile.w * layout.tile.w + inside.w * layout.box.extent.w};
}

// The part of a tile or a box that is inside the video; it has no token where an extent is not positive.
__device__ __forceinline__ Extent3 extent_inside(const TokenLayout& layout, const Extent3& shape, const BoxOrigin& origin) {
    return {min(shape.t, layout.extent.t - origin.t), min(shape.h, layout.extent.h - origin.h),
            min(shape.w, layout.extent.w - origin.w)};
}

__device__ __forceinline__ Extent3 extent_of_box(const TokenLayout& layout, const BoxOrigin& origin) {
    return extent_inside(layout, layout.box.extent, origin);
}

__device__ __forceinline__ int valid_tokens_of_block(const TokenLayout& layout, int block) {
    if (layout.sizes != nullptr) return size_of_block(layout, block);
    const Extent3 extent = extent_inside(layout, layout.tile, origin_of_box(layout, block, 0));
    return extent.t * extent.h * extent.w;
}

__device__ __forceinline__ bool has_tokens(const TokenLayout& layout, int, int, const BoxOrigin& origin) {
    const Extent3 extent = extent_of_box(layout, origin);
    return extent.t > 0 && extent.h > 0 && extent.w > 0;
}

// The bound is the first valid token: of a block with a size, those that are not valid come first as they are loaded.
__device__ __forceinline__ uint32_t valid_tokens(const TokenLayout& layout, int block, int box) {
    const Extent3& shape = layout.box.extent;
    Extent3 extent = shape;
    int first = 0;
    if (layout.sizes != nullptr) {
        first = kBoxTokens - valid_tokens_of_box(layout, block, box);
    } else if (layout.partial) {
        extent = extent_of_box(layout, origin_of_box(layout, block, box));
    }
    if (first == 0 && extent.t == shape.t && extent.h == shape.h && extent.w == shape.w) return kWholeBox;
    const uint32_t packed = ValidTokens::pack(first, max(extent.t, 0), max(extent.h, 0), max(extent.w, 0));
    // A box that is outside along every axis packs to kWholeBox, and is empty.
    return packed == kWholeBox ? kBoxTokens : packed;
}

__device__ __forceinline__ bool is_empty(uint32_t valid) {
    return valid != kWholeBox && (ValidTokens::bound(valid) == kBoxTokens || ValidTokens::has_none(valid));
}

__device__ __forceinline__ bool is_valid(const TokenLayout& layout, uint32_t valid, int token) {
    return token >= ValidTokens::bound(valid) && ValidTokens::has(valid, layout.box.position(token));
}

// Of a block with a size the load starts so far before the box's row that its valid tokens come last: TMA fills what is before
// the row with zeros, and reads none of the tokens that are not valid, which may hold NaN.
__device__ __forceinline__ BoxOrigin origin_of_load(const TokenLayout& layout, int index, uint32_t valid) {
    const int block = layout.boxes.quotient(index);
    BoxOrigin origin = origin_of_box(layout, block, index - block * layout.boxes.value);
    if (layout.sizes != nullptr) origin.w = -ValidTokens::bound(valid);
    return origin;
}

__device__ __forceinline__ int first_place_of(const TokenLayout& layout, int block, int box) {
    return layout.sizes == nullptr ? 0 : kBoxTokens - valid_tokens_of_box(layout, block, box);
}

// Where the load of a box starts whose tokens are moved by so many places.
__device__ __forceinline__ BoxOrigin before(const BoxOrigin& origin, int places) {
    return {origin.t, origin.h, origin.w - places};
}

struct BoxTokens {
    BoxOrigin origin;
    int size;  // valid tokens, apart from those outside the video

    __device__ __forceinline__ BoxTokens(const TokenLayout& layout, int block, int box, const BoxOrigin& origin)
        : origin(origin), size(layout.sizes == nullptr ? kBoxTokens : valid_tokens_of_box(layout, block, box)) {}

    __device__ __forceinline__ Token operator()(const TokenLayout& layout, int token) const {
        const Extent3 inside = layout.box.position(token);
        const Extent3 at = {origin.t + inside.t, origin.h + inside.h, origin.w + inside.w};
        const bool exists = at.t < layout.extent.t && at.h < layout.extent.h && at.w < layout.extent.w;
        return {(at.t * layout.extent.h + at.h) * layout.extent.w + at.w, exists, exists && token < size};
    }

    // How many tokens are valid, and before which number a load has all of them; what else it has before that is zero.
    __device__ __forceinline__ int count(const TokenLayout& layout) const {
        if (layout.sizes != nullptr) return size;
        const Extent3 extent = extent_of_box(layout, origin);
        return max(extent.t, 0) * max(extent.h, 0) * max(extent.w, 0);
    }
    __device__ __forceinline__ int end(const TokenLayout&) const { return size; }
};

// Boxes are packed in raster order.
struct alignas(8) PackedBox {
    int first;
    uint32_t extent;  // of the tokens that exist along t, h and w, a byte each; or kWholeBox

    PackedBox() = default;
    // `origin` is where the box starts, or where its load does.
    __device__ __forceinline__ PackedBox(const TokenLayout& layout, int, const BoxOrigin& origin) {
        const auto [t, h, w] = extent_of_box(layout, origin);
        first = (origin.t * layout.extent.h + t * origin.h) * layout.extent.w + t * h * max(origin.w, 0);
        extent = t * h * w == kBoxTokens ? kWholeBox : t | h << 8 | w << 16;
    }

    // The place of a token of a box that is not whole, among those of the box; -1: it does not exist.
    __device__ __forceinline__ int place_of(const TokenLayout& layout, int token) const {
        const Extent3 at = layout.box.position(token);
        const int h = extent >> 8 & 255, w = extent >> 16;
        if (at.t >= int(extent & 255) || at.h >= h || at.w >= w) return -1;
        return (at.t * h + at.h) * w + at.w;
    }
};
