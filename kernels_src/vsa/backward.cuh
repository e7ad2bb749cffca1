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

// Where dq of a query box that has a token is summed up in fp32: [tokens of a head, head_dim], the boxes in raster order. Of a
// box whose 64 tokens all exist the lanes' values come one after the other, 16 bytes of each. Any other box has a row for each
// token that exists.
struct alignas(8) DqSums {
    static constexpr uint32_t kWhole = 0;

    int first_token;
    uint32_t extent;  // of the tokens that exist along t, h and w, a byte each; or kWhole

    // `origin` is where the box starts, or where its load does, see KeyTile::origin.
    __device__ __forceinline__ DqSums(const TokenLayout& queries, const Extent3& origin) {
        const auto [t, h, w] = extent_of_box(queries, origin);
        first_token = (origin.t * queries.extent.h + t * origin.h) * queries.extent.w + t * h * max(origin.w, 0);
        extent = t * h * w == kBoxTokens ? kWhole : t | h << 8 | w << 16;
    }

    // Where the first values of a lane are if the box is whole, in the sums of its head.
    template <int head_dim, typename T>
    __device__ __forceinline__ T* of_lane(T* head) const {
        return head + int64_t(first_token) * head_dim + kittens::warpgroup::laneid() * 4;
    }

    // Calls `visit(address, values...)` with four or two values of a lane that lie together, until it has had all, of the
    // columns from `first_col` on. `own` is what of_lane returns.
    template <int head_dim, typename T, int cols, typename Visit>
    __device__ __forceinline__ void for_each(const TokenLayout& queries, T* own, int first_col, kittens::rt_fl<16, cols>& dq,
                                             Visit visit) const {
        using namespace kittens;
        float (&x)[cols / 2] = dq.data;
        if (extent == kWhole) {
#pragma unroll
            for (int i = 0; i < cols / 2; i += 4) {
                visit(own + (first_col / 2 + i) * kWarpgroupThreads, x[i], x[i + 1], x[i + 2], x[i + 3]);
            }
            return;
        }
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            const Extent3 at = position_in_box(queries, warpgroup::warpid() * 16 + laneid() / 4 + 8 * row);
            const int h = extent >> 8 & 255, w = extent >> 16;
            if (at.t >= int(extent & 255) || at.h >= h || at.w >= w) continue;
            T* of_row = own - warpgroup::laneid() * 4 + ((at.t * h + at.h) * w + at.w) * head_dim + laneid() % 4 * 2;
#pragma unroll
            for (int i = 2 * row; i < cols / 2; i += 4) visit(of_row + first_col + 2 * (i - 2 * row), x[i], x[i + 1]);
        }
    }
};

// What a pass over queries is given: its rows are key blocks, which it keeps in place, and its columns the query blocks that
// selected them.
template <typename element>
struct PassOverQueries {
    TokenTensor q, k, v, dout;
    float* dq;  // of one pass: [query heads of all batches, q_len, head_dim], see DqSums
    element *dk, *dv;
    int64_t dk_strides[3], dv_strides[3];  // batches, heads, tokens
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
// `prepare(number, origin)` writes what else the readers of a tile need to know.
template <typename Params, typename SharedStorage, typename Prepare>
__device__ __forceinline__ void load_queries(const Params& params, SharedStorage& shared, Prepare prepare) {
    using kittens::kWarpThreads;
    constexpr int kStages = SharedStorage::kStages;
    const int lane = kittens::laneid();
    const int boxes_of_head = params.schedule.rows.num_cols * params.queries.boxes.value;
    uint32_t loaded = 0;
    for_each_work_tile(shared.work_tiles, [&](const WorkTile<1>& work, const auto& state) {
        const KeyTile<1>* list = params.lists.at(state);
        const int num_tiles = work.group.num_tiles;
        const int head = query_head(params, work);
        // Each lane takes one tile of 32. The list is read one step ahead, to hide the latency of global memory.
        const auto tile_at = [&](int i) { return i < num_tiles ? list[i] : KeyTile<1>{}; };
        KeyTile<1> own = tile_at(lane);
#pragma unroll 1
        for (int first = 0; first < num_tiles; first += kWarpThreads) {
            const KeyTile<1> next = tile_at(first + kWarpThreads + lane);
            const Extent3 origin = own.origin(params.queries);
            const int count = min(kWarpThreads, num_tiles - first);
#pragma unroll 1
            for (int i = 0; i < count; ++i, ++loaded) {
                const PipelineState<kStages> stage(loaded);
                kittens::semaphore& full = shared.barriers.full[stage.index];
                kittens::wait(shared.barriers.empty[stage.index], stage.phase ^ 1);
                // No lane continues before all have seen this phase: the stage could complete another phase and hide it.
                __syncwarp();
                if (lane == i) {
                    const int64_t box = int64_t(head) * boxes_of_head + own.box();
                    load_box(shared.q[stage.index], params.q, params.q.at(work.batch, work.col_head, origin), full);
                    load_box(shared.dout[stage.index], params.dout, params.dout.at(work.batch, work.col_head, origin), full);
                    // Published by the arrival of the last copy, while the first ones are under way.
                    prepare(loaded, origin);
                    load_array(shared.statistics[stage.index], params.statistics + box * kStatisticsPerBox, full);
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
        load_box(shared.k[0], params.k, params.k.at(work.batch, work.row_head, work.origin[0]), full);
        load_box(shared.v[0], params.v, params.v.at(work.batch, work.row_head, work.origin[0]), full);
    };
    produce_queries(params, shared, load_keys, [](uint32_t, const Extent3&) {});
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

// Stores a gradient times a factor, 0 where a token is not valid.
template <typename T, int head_dim>
__device__ __forceinline__ void store_gradient(T* out, const int64_t (&strides)[3], const OutputRows& rows, float factor,
                                               kittens::rt_fl<16, head_dim>& gradient) {
#pragma unroll
    for (int i = 0; i < head_dim / 2; ++i) gradient.data[i] = rows.valid[kittens::row_of(i)] ? gradient.data[i] * factor : 0.0f;
    store_output(out, strides, rows, gradient);
}
