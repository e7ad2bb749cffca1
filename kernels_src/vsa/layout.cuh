// Where the tokens of a block lie. Every block is cut into boxes of kBoxTokens tokens, which TMA copies. There are two layouts,
// one of which a kernel is compiled for: in video.cuh all tokens are one video, and in segments.cuh they are several videos and
// runs of plain tokens, one after the other. Both have the same types and functions:
//
//   BoxOrigin                               where a box starts, as TMA takes it
//   TokenTensor::at, map_of                 its coordinates and its tensor map
//   TokenTensor::acquire_maps               before the first copy by a map
//   TokenLayout                             how the tokens are cut into blocks and boxes
//   origin_of_box, valid_tokens             of a box: where it starts, and which of its tokens are valid, packed into a word
//   valid_tokens_of_block                   how many tokens of a block are valid
//   is_valid, is_empty                      of such a word; 0 is kWholeBox
//   origin_of_load, first_place_of, before  where a load starts, and by how many places it moves the tokens of the box
//   has_tokens                              whether some token of a box exists, valid or not
//   BoxTokens                               the number of each token of a box in the sequence
//   PackedBox                               its place in a tensor of those tokens that exist, box after box
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
    int shift;  // ceil(log2(value))

    __device__ __forceinline__ int quotient(int x) const { return __umulhi(2u * x, inverse) >> shift; }
};

// Where heads and batches are in a tensor map, whose five dimensions are (channels, w, h, t, outer): each moves the channel or
// the outer coordinate by these steps.
struct HeadSteps {
    int head_channel, batch_channel;
    int head_outer, batch_outer;

    __device__ __forceinline__ int channel(int batch, int head) const { return head * head_channel + batch * batch_channel; }
    __device__ __forceinline__ int outer(int batch, int head) const { return head * head_outer + batch * batch_outer; }
    // The coordinates of a token of a head.
    __device__ __forceinline__ kittens::coordinates at(int batch, int head, int t, int h, int w) const {
        return {{channel(batch, head), w, h, t, outer(batch, head)}};
    }
};

// The tokens of a box as three powers of two, along t, h and w.
struct BoxShape {
    Extent3 extent;
    int w_log2, hw_log2;  // of the tokens in a row and in a frame

    // Where a token lies in the box.
    __device__ __forceinline__ Extent3 position(int token) const {
        return {token >> hw_log2, token >> w_log2 & (extent.h - 1), token & (extent.w - 1)};
    }
};

// Of a token of a box.
struct Token {
    int number;  // in the sequence
    bool exists, valid;
};

constexpr uint32_t kWholeBox = 0;  // every token is valid

// The extents of a box that exist along t, h and w, a byte each, and a bound for the numbers of its tokens.
struct ValidTokens {
    __device__ __forceinline__ static uint32_t pack(int bound, int t, int h, int w) {
        return bound | t << 8 | h << 16 | w << 24;
    }
    __device__ __forceinline__ static int bound(uint32_t word) { return word & 255; }
    __device__ __forceinline__ static bool has(uint32_t word, const Extent3& at) {
        return at.t < int(word >> 8 & 255) && at.h < int(word >> 16 & 255) && at.w < int(word >> 24);
    }
    __device__ __forceinline__ static bool has_none(uint32_t word) {
        return (word >> 8 & 255) == 0 || (word >> 16 & 255) == 0 || word >> 24 == 0;
    }
};

#if VSA_SEGMENTS
#include "vsa/segments.cuh"
#else
#include "vsa/video.cuh"
#endif
