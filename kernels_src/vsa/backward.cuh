// What the passes of the backward share: the statistics of query rows, and how gradients are stored.
#pragma once

#include "vsa/epilogue.cuh"

// Of two neighbouring queries of a box. `shift` is the log-sum-exp in base 2, or +inf where a query is not valid or has no
// keys, so that its probabilities are 0. `delta` is Σ dO ∘ O less the gradient of the log-sum-exp. Queries are in the order in
// which the tokens of a box arrive, see KeyTile::origin: of a block with a size, the valid ones come last.
struct alignas(16) RowStatistics {
    float shift[2], delta[2];
};
constexpr float kLog2e = 1.44269504f;
constexpr int kStatisticsPerBox = kBoxTokens / 2;

// How many places the tokens of a query box are moved by in the order in which they arrive.
__device__ __forceinline__ int first_place_of(const TokenLayout& queries, int block, int box) {
    return queries.sizes == nullptr ? 0 : kBoxTokens - valid_tokens_of_box(queries, block, box);
}

// The statistics of a lane's two rows of a consumer's query box.
template <int kConsumers, typename Index>
__device__ __forceinline__ void load_statistics(const RowStatistics* statistics, const TokenLayout& queries,
                                                const Schedule<Index>& schedule, const WorkTile<kConsumers>& work, int consumer,
                                                kittens::col_vec& shift, kittens::col_vec& delta) {
    const int64_t bh = int64_t(work.batch) * schedule.heads.value + work.row_head;
    const int block = work.group.block[consumer], box = work.group.box[consumer];
    const RowStatistics* of_box =
        statistics + ((bh * schedule.rows.num_rows + block) * queries.boxes.value + box) * kStatisticsPerBox;
    const int first = first_place_of(queries, block, box);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int row = kittens::warpgroup::warpid() * 16 + kittens::laneid() / 4 + 8 * i, place = (first + row) % kBoxTokens;
        shift[i] = of_box[place / 2].shift[place % 2];
        delta[i] = of_box[place / 2].delta[place % 2];
    }
}

// Stores a gradient times a factor, 0 where a token is not valid.
template <typename T, int head_dim>
__device__ __forceinline__ void store_gradient(T* out, const int64_t (&strides)[3], const OutputRows& rows, float factor,
                                               kittens::rt_fl<16, head_dim>& gradient) {
#pragma unroll
    for (int i = 0; i < head_dim / 2; ++i) gradient.data[i] = rows.valid[kittens::row_of(i)] ? gradient.data[i] * factor : 0.0f;
    store_output(out, strides, rows, gradient);
}
