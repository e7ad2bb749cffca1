// The inverse of a map of blocks as bits: which query blocks name each key block.
#pragma once

#include "vsa/block_index.cuh"

struct Inversion {
    IndexTable rows;
    uint32_t* bits;  // [heads, num_words, num_cols], as IndexBits has them
    int num_words;
};

// Makes the words of one number of all key blocks of a head: `index` counts them over all heads. The 32 query blocks of that
// number set a bit each, for some key blocks at a time in shared memory, and bits do not depend on the order in which they are
// set. For all kThreads of a thread block.
template <int kThreads, int kSlice>
__device__ __forceinline__ void invert_rows(const Inversion& inversion, int index, uint32_t (&words)[kSlice]) {
    using kittens::kWarpThreads;
    constexpr int kWordBits = 32, kWarps = kThreads / kWarpThreads;
    const IndexTable& rows = inversion.rows;
    const int head = index / inversion.num_words, word = index - head * inversion.num_words;
    uint32_t* bits = inversion.bits + int64_t(index) * rows.num_cols;
    for (int first = 0; first < rows.num_cols; first += kSlice) {
        const int num_cols = min(kSlice, rows.num_cols - first);
        for (int i = threadIdx.x; i < num_cols; i += kThreads) words[i] = 0;
        __syncthreads();
        for (int bit = kittens::warpid(); bit < kWordBits && word * kWordBits + bit < rows.num_rows; bit += kWarps) {
            const int row = word * kWordBits + bit, length = rows.length(head, row);
            const int* entries = rows.row(head, row);
            for (int i = kittens::laneid(); i < length; i += kWarpThreads) {
                const uint32_t col = entries[i] - first;
                if (col < kSlice) atomicOr(&words[col], 1u << bit);
            }
        }
        __syncthreads();
        for (int i = threadIdx.x; i < num_cols; i += kThreads) bits[first + i] = words[i];
        __syncthreads();
    }
}
