// The layout of several segments, one after the other: videos, which are cut into tiles as in video.cuh, and runs of plain
// tokens. What is to be known of a box stands in a table that the host made; every segment has a tensor map of its own, so that
// TMA fills with zeros what is outside of it, and reads none of the next one's tokens. See layout.cuh.
//
// A box of plain tokens is described as one of a video whose rows and columns are as long as those of a box: its tokens are
// then consecutive. Where it ends is said by the number of its tokens alone.
#pragma once

struct BoxOrigin {
    int segment;
    int t, h, w;
};

// A box in the table.
struct alignas(16) BoxRecord {
    BoxOrigin origin;
    int first_token;  // in the sequence
    uint32_t rows_of;  // rows of a frame of the segment, and above 16 bits tokens of a row
    uint32_t valid;  // see valid_tokens
    int first_place;  // see PackedBox
};
static_assert(sizeof(BoxRecord) == VSA_BOX_RECORD_BYTES);

// A tensor of tokens, as TMA reads it.
struct TokenTensor {
    const kittens::tensor_map* maps;  // of each segment
    HeadSteps steps;
    int num_maps;

    // A kernel before this one made the maps: a warp that copies by them calls this first.
    __device__ __forceinline__ void acquire_maps() const {
        for (int i = kittens::laneid(); i < num_maps; i += kittens::kWarpThreads) kittens::tma::acquire_map(maps + i);
        __syncwarp();
    }
    __device__ __forceinline__ kittens::coordinates at(int batch, int head, const BoxOrigin& box) const {
        return steps.at(batch, head, box.t, box.h, box.w);
    }
    __device__ __forceinline__ const kittens::tensor_map& map_of(const BoxOrigin& box) const { return maps[box.segment]; }
};

struct TokenLayout {
    const BoxRecord* table;  // of all boxes of a head
    BoxShape box;  // of a video
    Divisor boxes;  // boxes of a block
    int partial;  // some block has tokens that are not valid
    int length;  // of the sequence

    __device__ __forceinline__ int num_tokens() const { return length; }
    __device__ __forceinline__ const BoxRecord& record(int block, int box) const { return table[block * boxes.value + box]; }
};

__device__ __forceinline__ BoxOrigin origin_in_table(const TokenLayout& layout, int index) {
    const uint4 words = reinterpret_cast<const uint4*>(layout.table + index)[0];
    return {int(words.x), int(words.y), int(words.z), int(words.w)};
}

__device__ __forceinline__ BoxOrigin origin_of_box(const TokenLayout& layout, int block, int box) {
    return origin_in_table(layout, block * layout.boxes.value + box);
}

// The bound is the number of tokens.
__device__ __forceinline__ uint32_t valid_tokens(const TokenLayout& layout, int block, int box) {
    return layout.record(block, box).valid;
}

__device__ __forceinline__ bool is_empty(uint32_t valid) { return valid != kWholeBox && ValidTokens::bound(valid) == 0; }

// Either plain tokens end before the box does, or the video.
__device__ __forceinline__ int num_valid(uint32_t valid) {
    if (valid == kWholeBox) return kBoxTokens;
    return min(ValidTokens::bound(valid), int(valid >> 8 & 255) * int(valid >> 16 & 255) * int(valid >> 24));
}

__device__ __forceinline__ int valid_tokens_of_block(const TokenLayout& layout, int block) {
    int count = 0;
#pragma unroll 1
    for (int box = 0; box < layout.boxes.value; ++box) count += num_valid(valid_tokens(layout, block, box));
    return count;
}

__device__ __forceinline__ bool is_valid(const TokenLayout& layout, uint32_t valid, int token) {
    return token < ValidTokens::bound(valid) && ValidTokens::has(valid, layout.box.position(token));
}

__device__ __forceinline__ bool has_tokens(const TokenLayout& layout, int block, int box, const BoxOrigin&) {
    return !is_empty(valid_tokens(layout, block, box));
}

__device__ __forceinline__ BoxOrigin origin_of_load(const TokenLayout& layout, int index, uint32_t) {
    return origin_in_table(layout, index);
}

__device__ __forceinline__ int first_place_of(const TokenLayout&, int, int) { return 0; }

__device__ __forceinline__ BoxOrigin before(const BoxOrigin& origin, int) { return origin; }

struct BoxTokens {
    int first_token;
    uint32_t rows_of, valid;

    __device__ __forceinline__ BoxTokens(const TokenLayout& layout, int block, int box, const BoxOrigin&) {
        const uint4 words = reinterpret_cast<const uint4*>(&layout.record(block, box))[1];
        first_token = int(words.x), rows_of = words.y, valid = words.z;
    }

    __device__ __forceinline__ Token operator()(const TokenLayout& layout, int token) const {
        const Extent3 inside = layout.box.position(token);
        const bool exists = valid == kWholeBox || (token < ValidTokens::bound(valid) && ValidTokens::has(valid, inside));
        return {first_token + (inside.t * int(rows_of & 0xffff) + inside.h) * int(rows_of >> 16) + inside.w, exists, exists};
    }

    __device__ __forceinline__ int count(const TokenLayout&) const { return num_valid(valid); }
    __device__ __forceinline__ int end(const TokenLayout&) const { return kBoxTokens; }
};

struct alignas(8) PackedBox {
    uint32_t extent;  // of BoxRecord
    int first;

    PackedBox() = default;
    // `index` counts the boxes of a head.
    __device__ __forceinline__ PackedBox(const TokenLayout& layout, int index, const BoxOrigin&)
        : extent(layout.table[index].valid), first(layout.table[index].first_place) {}

    // The place of a token of a box that is not whole, among those of the box; -1: it does not exist.
    __device__ __forceinline__ int place_of(const TokenLayout& layout, int token) const {
        const Extent3 at = layout.box.position(token);
        if (token >= ValidTokens::bound(extent) || !ValidTokens::has(extent, at)) return -1;
        return (at.t * int(extent >> 16 & 255) + at.h) * int(extent >> 24) + at.w;
    }
};
