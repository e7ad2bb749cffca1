// What the passes of the backward share: the statistics of query rows; of the passes over queries the parameters, the ring, the
// producers and the last product; where one pass sums dq up; and how gradients are stored.
#pragma once

#include "vsa/epilogue.cuh"

// Of two neighbouring queries of a box. `shift` is the log-sum-exp, or +inf where a query is not valid or has no keys, so that
// its probabilities are 0. `delta` is Σ dO ∘ O less the gradient of the log-sum-exp. Both are multiplied by factors: two passes
// take the shift in base 2, and one pass takes what it adds to products, −shift / scale and −delta. Queries are in the order
// in which the tokens of a box arrive, see KeyTile::origin: of a block with a size, the valid ones come last.
struct alignas(16) RowStatistics {
    float shift[2], delta[2];
};
constexpr int kStatisticsPerBox = kBoxTokens / 2;

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

// A value for each of a lane's columns of scores, two of every eight, where columns are queries.
struct ColumnPairs {
    float2 of[kBoxTokens / 8];
    __device__ __forceinline__ explicit ColumnPairs(const float (&of_first)[2]) {
        const RowStatistics* at = reinterpret_cast<const RowStatistics*>(&of_first) + kittens::laneid() % 4;
#pragma unroll
        for (int i = 0; i < kBoxTokens / 8; ++i) of[i] = *reinterpret_cast<const float2*>(at + 4 * i);
    }
    __device__ __forceinline__ float operator[](int i) const { return i % 2 == 0 ? of[i / 4].x : of[i / 4].y; }
};

// 2 ^ (scale x - shift of the column), in place.
__device__ __forceinline__ void exp2_scaled(kittens::rt_fl<16, kBoxTokens>& scores, float scale, const ColumnPairs& shift) {
#pragma unroll
    for (int i = 0; i < kBoxTokens / 2; ++i) scores.data[i] = kittens::exp2(fmaf(scores.data[i], scale, -shift[i]));
}

// Where dq of a query box that has a token is summed up in fp32: [tokens of a head, head_dim], box after box as PackedBox has
// them. Of a box whose 64 tokens all exist the lanes' values come one after the other, 16 bytes of each. Any other box has a
// row for each token that exists.
struct DqSums : PackedBox {
    using PackedBox::PackedBox;

    // Where the first values of a lane are if the box is whole, in the sums of its head.
    template <int head_dim, typename T>
    __device__ __forceinline__ T* of_lane(T* head) const {
        return head + int64_t(first) * head_dim + kittens::warpgroup::laneid() * 4;
    }

    // Calls `visit(address, values...)` with four or two values of a lane that lie together, until it has had all, of the
    // columns from `first_col` on. `own` is what of_lane returns.
    template <int head_dim, typename T, int cols, typename Visit>
    __device__ __forceinline__ void for_each(const TokenLayout& queries, T* own, int first_col, kittens::rt_fl<16, cols>& dq,
                                             Visit visit) const {
        using namespace kittens;
        float (&x)[cols / 2] = dq.data;
        if (extent == kWholeBox) {
#pragma unroll
            for (int i = 0; i < cols / 2; i += 4) {
                visit(own + (first_col / 2 + i) * kWarpgroupThreads, x[i], x[i + 1], x[i + 2], x[i + 3]);
            }
            return;
        }
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            const int place = place_of(queries, warpgroup::warpid() * 16 + laneid() / 4 + 8 * row);
            if (place < 0) continue;
            T* of_row = own - warpgroup::laneid() * 4 + place * head_dim + laneid() % 4 * 2;
#pragma unroll
            for (int i = 2 * row; i < cols / 2; i += 4) visit(of_row + first_col + 2 * (i - 2 * row), x[i], x[i + 1]);
        }
    }
};

// Where the gradient of tokens is stored.
template <typename T>
struct GradientTensor {
    T* data;
    int64_t strides[3];  // batches, heads, tokens
    const float* of_means;  // the gradient of the means of blocks, [batch, heads, blocks, head_dim], or null
};

// What a pass over queries is given: its rows are key blocks, which it keeps in place, and its columns the query blocks that
// selected them.
template <typename element>
struct PassOverQueries {
    TokenTensor q, k, v, dout;
    float* dq;  // of one pass: [query heads of all batches, q_len, head_dim], see DqSums
    GradientTensor<element> dk, dv;
    TokenLayout queries, keys;
    Schedule<IndexBits> schedule;
    TileLists<1> lists;
    const RowStatistics* statistics;
    float scale, scale_log2;
};

// What it has in shared memory: a ring of query boxes, some key boxes, and work tiles.
template <typename element, int head_dim, int kKeyBoxes, int kStages_, int kWorkTiles>
struct QueryRing {
    static constexpr int kStages = kStages_;
    using box_tile = kittens::st<element, kBoxTokens, head_dim>;

    box_tile q[kStages], dout[kStages];
    box_tile k[kKeyBoxes], v[kKeyBoxes];
    RowStatistics statistics[kStages][kStatisticsPerBox];
    WorkTileQueue<1, kWorkTiles> work_tiles;
    TileListScratch<1> scratch;
    StageBarriers<kStages> barriers;  // of Q, dO and the statistics
    StageBarriers<1> k_barriers;  // of K and V

    // `readers`: the warps that read queries. `all_readers`: those that read keys or work tiles.
    __device__ __forceinline__ void init_barriers(int readers, int all_readers) {
        constexpr int kLoaders = 2;  // of queries, and of key boxes
        init_work_tile_barriers(work_tiles, all_readers + kLoaders);
        init_stage_barriers(barriers, 3, readers);
        init_stage_barriers(k_barriers, 2 * kKeyBoxes, all_readers);
        kittens::fence_init_semaphores();
    }
};

// The query head of a work tile, counted over all batches.
template <typename Params>
__device__ __forceinline__ int query_head(const Params& params, const WorkTile<1>& work) {
    return work.batch * params.schedule.heads.value * params.schedule.rows.group + work.col_head;
}

// A loader of a pass over queries: it loads the query boxes of all work tiles, with their dO and their statistics.
// `prepare(number, box, origin)` writes what else the readers of a tile need to know.
template <typename Params, typename SharedStorage, typename Prepare>
__device__ __forceinline__ void load_queries(const Params& params, SharedStorage& shared, Prepare prepare) {
    using kittens::kWarpThreads;
    constexpr int kStages = SharedStorage::kStages;
    const int lane = kittens::laneid();
    const int boxes_of_head = params.schedule.rows.num_cols * params.queries.boxes.value;
    uint32_t loaded = 0;
    for_each_work_tile(shared.work_tiles, [&](const WorkTile<1>& work, const auto& state) {
        const KeyTile<1>* list = params.lists.at(state);
        // 32 bits count the boxes of all heads: the statistics of each take 512 bytes.
        const uint32_t first_box = uint32_t(query_head(params, work)) * boxes_of_head;
        int left = work.group.num_tiles;
        // Each lane takes one tile of 32. The list is read one step ahead, to hide the latency of global memory.
        const auto tile_at = [&](int i) { return i < left ? list[i] : KeyTile<1>{}; };
        KeyTile<1> own = tile_at(lane);
#pragma unroll 1
        for (; left > 0; left -= kWarpThreads, list += kWarpThreads) {
            const KeyTile<1> next = tile_at(kWarpThreads + lane);
            const BoxOrigin origin = own.origin(params.queries);
            const int count = min(kWarpThreads, left);
#pragma unroll 1
            for (int i = 0; i < count; ++i, ++loaded) {
                const PipelineState<kStages> stage(loaded);
                kittens::semaphore& full = shared.barriers.full[stage.index];
                kittens::wait(shared.barriers.empty[stage.index], stage.phase ^ 1);
                // No lane continues before all have seen this phase: the stage could complete another phase and hide it.
                __syncwarp();
                if (lane == i) {
                    load_box(shared.q[stage.index], params.q, work.batch, work.col_head, origin, full);
                    load_box(shared.dout[stage.index], params.dout, work.batch, work.col_head, origin, full);
                    // Published by the arrival of the last copy, while the first ones are under way.
                    prepare(loaded, own.box(), origin);
                    load_array(shared.statistics[stage.index],
                               params.statistics + uint64_t(first_box + own.box()) * kStatisticsPerBox, full);
                }
            }
            own = next;
        }
    });
}

// The producers of a pass over queries. `load_keys(work, barrier)` starts the loads of the key boxes of a work tile, and
// `prepare` is that of load_queries.
template <typename Params, typename SharedStorage, typename LoadKeys, typename Prepare>
__device__ __forceinline__ void produce_queries(const Params& params, SharedStorage& shared, LoadKeys load_keys,
                                                Prepare prepare) {
    const int warp = kittens::warpid() % kittens::kWarpgroupWarps;
    acquire_maps(params.q, params.k, params.v, params.dout);
    if (warp == 0) load_queries(params, shared, prepare);
    if (warp == 1) {
        load_row_boxes(shared.work_tiles, shared.k_barriers,
                       [&](const WorkTile<1>& work, int) { load_keys(work, shared.k_barriers.full[0]); });
    }
    if (warp == 2) {
        schedule_work_tiles(params.schedule, params.keys, params.queries, params.lists, shared.scratch, shared.work_tiles);
    }
}

// The same where a work tile has a single key box.
template <typename Params, typename SharedStorage>
__device__ __forceinline__ void produce_queries(const Params& params, SharedStorage& shared) {
    const auto load_keys = [&](const WorkTile<1>& work, kittens::semaphore& full) {
        load_box(shared.k[0], params.k, work.batch, work.row_head, work.origin[0], full);
        load_box(shared.v[0], params.v, work.batch, work.row_head, work.origin[0], full);
    };
    produce_queries(params, shared, load_keys, [](uint32_t, int, const BoxOrigin&) {});
}

// Adds the second product of the last tile of a work tile, left · ring[stage], and gives its stage back.
template <typename T, int head_dim, int kStages>
__device__ __forceinline__ void add_last(kittens::rt_fl<16, head_dim>& sum, kittens::rt<T, 16, kBoxTokens>& left,
                                         const kittens::st<T, kBoxTokens, head_dim> (&ring)[kStages], int stage,
                                         StageBarriers<kStages>& barriers) {
    kittens::warpgroup::mma_fence(left);
    kittens::warpgroup::mma_AB(sum, left, ring, stage);
    kittens::warpgroup::mma_commit_group();
    kittens::warpgroup::mma_async_wait<0>(sum, left);
    release(barriers.empty[stage]);
}

// Stores a gradient times a factor, 0 where a token is not valid. To each valid one its share in the gradient of its block's
// mean is added.
template <typename T, int head_dim>
__device__ __forceinline__ void store_gradient(const GradientTensor<T>& out, const TokenLayout& layout, int num_blocks,
                                               const OutputRows& rows, float factor, kittens::rt_fl<16, head_dim>& gradient) {
#pragma unroll
    for (int i = 0; i < head_dim / 2; ++i) gradient.data[i] *= factor;
    if (out.of_means != nullptr) {
        const float share = kittens::reciprocal(valid_tokens_of_block(layout, rows.block));
        const float* row = out.of_means + (rows.bh * num_blocks + rows.block) * head_dim + kittens::laneid() % 4 * 2;
#pragma unroll
        for (int i = 0; i < head_dim / 2; i += 4) {
            const float2 pair = *reinterpret_cast<const float2*>(row + 2 * i);
            gradient.data[i] += share * pair.x;
            gradient.data[i + 1] += share * pair.y;
            gradient.data[i + 2] += share * pair.x;
            gradient.data[i + 3] += share * pair.y;
        }
    }
#pragma unroll
    for (int i = 0; i < head_dim / 2; ++i) gradient.data[i] = rows.valid[kittens::row_of(i)] ? gradient.data[i] : 0.0f;
    store_output(out.data, out.strides, rows, gradient);
}
