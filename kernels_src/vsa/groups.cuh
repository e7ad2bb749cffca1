// What the plan tells the forward: groups of boxes of queries that one thread block attends together, and the tiles of keys
// that each group loads, every one once for all of the group that selected it.
#pragma once

#include "vsa/tokens.cuh"

// Boxes of queries that a thread block attends together: one for each of its consumer warpgroups.
constexpr int kConsumers = 3;

struct Group {
    int q_block[kConsumers];   // -1: none
    int q_box[kConsumers];     // which box of it
    int tiles_of[kConsumers];  // how many tiles each attends
    int num_tiles;
    int poisoned;  // bit i: query block i names a key block that does not exist
};

// A box of keys as the loaders take it: where it lies, which of its tokens are valid, and, a bit each, which query boxes of
// the group attend it.
struct alignas(16) KeyTile {
    static constexpr int kMembersShift = 32 - kConsumers;
    static constexpr uint32_t kWhole = 0;  // every token is valid

    int w, h;
    uint32_t t_and_members;
    uint32_t valid;  // the first valid token, and the extents along t, h and w that are inside the video, a byte each

    __device__ __forceinline__ int t() const { return t_and_members & ((1u << kMembersShift) - 1); }
    __device__ __forceinline__ int members() const { return t_and_members >> kMembersShift; }
    __device__ __forceinline__ bool is_empty() const {
        return valid != kWhole && ((valid & 255) == kBoxTokens || (valid >> 8 & 255) == 0 || (valid >> 16 & 255) == 0 || valid >> 24 == 0);
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
