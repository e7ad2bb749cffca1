// Masking of scores.
//
// Only tiles that have a key which is not valid are masked. That is decided where the list is written: valid_tokens packs which
// tokens of a box are valid, select_boxes leaves out boxes without any, and the loader of K sets StageTicket::is_partial. A
// mask that depends on the query, too, would need the position of the key box in the ticket.
#pragma once

#include "kittens/register_tile.cuh"
#include "vsa/tile_list.cuh"

// Scores of keys that are not valid become -inf. `valid` is KeyTile::valid, in shared memory.
__device__ __forceinline__ void mask_keys(const TokenLayout& keys, const uint32_t& valid,
                                          kittens::rt_fl<16, kBoxTokens>& scores) {
    using kittens::kAllLanes, kittens::kWarpThreads, kittens::laneid;
    // Lane 0 reads, because lane 0 later arrives on the V stage's `empty`: its read precedes the release.
    const uint32_t packed = kittens::broadcast(laneid() == 0 ? valid : 0);
#pragma unroll
    for (int first = 0; first < kBoxTokens; first += kWarpThreads) {
        const uint32_t bits = __ballot_sync(kAllLanes, is_valid(keys, packed, first + laneid()));
#pragma unroll
        for (int i = 0; i < kWarpThreads / 2; ++i) {
            if (!(bits >> (i / 4 * 8 + i % 2 + laneid() % 4 * 2) & 1)) scores.data[first / 2 + i] = -kittens::infinity();
        }
    }
}
