// The forward of the fine branch: every query block attends the keys of its key blocks, by an online softmax, and the coarse
// output is added before the store.
//
// Persistent thread blocks take one work tile after the other: 64 query rows for each of kConsumers consumer warpgroups. The
// fourth warpgroup has four producer warps: the scheduler, and loaders of Q, K and V. The barriers between them are in
// kernels_src/README.md.
//
// Specialised at compile time: VSA_DTYPE (bf16, half), VSA_HEAD_DIM (64, 128), VSA_CONSUMERS, VSA_WORK_TILES, VSA_K_STAGES and
// VSA_V_STAGES.
#include "kittens/grid.cuh"
#include "vsa/epilogue.cuh"
#include "vsa/mask.cuh"
#include "vsa/params.cuh"
#include "vsa/roles.cuh"
#include "vsa/softmax.cuh"
#include "vsa/tile_queue.cuh"

using namespace kittens;

namespace {

using element = VSA_DTYPE;
constexpr int kHeadDim = VSA_HEAD_DIM;
constexpr int kConsumers = VSA_CONSUMERS;
constexpr int kWorkTiles = VSA_WORK_TILES;
constexpr int kKStages = VSA_K_STAGES;
constexpr int kVStages = VSA_V_STAGES;
constexpr int kThreads = (kConsumers + 1) * kWarpgroupThreads;
constexpr int kLoaders = 3;  // of Q, K and V
// Columns of Q in registers, as many as fit beside scores, probabilities and output. The others are read from shared memory.
constexpr int kQCols = 32;
constexpr float kLn2 = 0.693147181f;

// Registers of a thread.
constexpr int kProducerRegisters = 56;
constexpr int kConsumerRegisters = 152;

using box_tile = st<element, kBoxTokens, kHeadDim>;
using q_fragment = rt<element, 16, kQCols>;
using s_fragment = rt_fl<16, kBoxTokens>;
using p_fragment = rt<element, 16, kBoxTokens>;
using o_fragment = rt_fl<16, kHeadDim>;
using tile_queue = TileQueue<kConsumers, kKStages, kVStages>;

struct Params {
    TokenTensor q, k, v;
    element* out;
    element* out_s;          // the output without the coarse part, or null
    int64_t out_strides[3];  // of both: batches, heads, tokens
    TokenLayout queries, keys;
    Schedule<IndexTable> schedule;
    TileLists<kConsumers> lists;
    float* lse;  // [batch, heads, q_len]
    CoarseOutput coarse;
    int q_len;
    float scale_log2;
};
VSA_CHECK_PARAMS;

struct SharedStorage {
    box_tile k[kKStages], v[kVStages];
    box_tile q[kConsumers];
    WorkTileQueue<kConsumers, kWorkTiles> work_tiles;
    TileListScratch<kConsumers> scratch;
    tile_queue queue;
    StageBarriers<kKStages> k_barriers;
    StageBarriers<kVStages> v_barriers;
    StageBarriers<kConsumers> q_barriers;
};
static_assert(sizeof(SharedStorage) <= VSA_SMEM_BYTES, "the host launches with less shared memory");

__device__ __forceinline__ void init_barriers(SharedStorage& shared) {
    constexpr int kConsumerWarps = kConsumers * kWarpgroupWarps;
    init_work_tile_barriers(shared.work_tiles, kConsumerWarps + kLoaders);
    init_stage_barriers(shared.k_barriers, 1, kConsumerWarps);
    init_stage_barriers(shared.v_barriers, 1, kConsumerWarps);
    init_stage_barriers(shared.q_barriers, 1, kWarpgroupWarps);
    init_queue_barriers(shared.queue, 2);
    fence_init_semaphores();
}

// Producers

__device__ __forceinline__ void produce(const Params& params, SharedStorage& shared) {
    const int warp = warpid() % kWarpgroupWarps;
    wait_for_launch_before();
    acquire_maps(params.q, params.k, params.v);
    using work_tile = WorkTile<kConsumers>;
    const auto load_k = [&](const work_tile& work, const BoxOrigin& origin, int stage) {
        load_box(shared.k[stage], params.k, work.batch, work.col_head, origin, shared.k_barriers.full[stage]);
    };
    const auto load_v = [&](const work_tile& work, const BoxOrigin& origin, int stage) {
        load_box(shared.v[stage], params.v, work.batch, work.col_head, origin, shared.v_barriers.full[stage]);
    };
    const auto load_q = [&](const work_tile& work, int i) {
        load_box(shared.q[i], params.q, work.batch, work.row_head, work.origin[i], shared.q_barriers.full[i]);
    };
    if (warp == 0)
        load_tiles<Operand::kK>(params.keys, params.lists, shared.work_tiles, shared.k_barriers, shared.queue, load_k);
    if (warp == 1)
        load_tiles<Operand::kV>(params.keys, params.lists, shared.work_tiles, shared.v_barriers, shared.queue, load_v);
    if (warp == 2) load_row_boxes(shared.work_tiles, shared.q_barriers, load_q);
    if (warp == 3) {
        schedule_work_tiles(params.schedule, params.queries, params.keys, params.lists, shared.scratch, shared.work_tiles);
    }
}

// Consumer

// Masks and exponentiates one tile. No wgmma may be in flight that reads `p` or accumulates into `out`.
__device__ __forceinline__ void softmax_step(const Params& params, SharedStorage& shared, const StageTicket& tile,
                                             Softmax& softmax, s_fragment& scores, p_fragment& p, o_fragment& out) {
    if (__builtin_expect(tile.is_partial, 0)) mask_keys(params.keys, shared.queue.valid[tile.v_stage], scores);
    softmax.exponentiate(p, scores, out);
}

// Attends the tiles of a work tile. The scores of each tile are computed while the output of the one before is accumulated, as
// long as each tile has a near successor. Where it has none, the consumer must not hold a V stage while it waits: it finishes
// the output, releases the stage, and starts again with the next tile.
__device__ __forceinline__ void attend_tiles(const Params& params, SharedStorage& shared, TicketReader<tile_queue>& tickets,
                                             int num_tiles, const q_fragment& q, Softmax& softmax, o_fragment& out) {
    const box_tile& q_shared = shared.q[tickets.consumer];
    semaphore& q_empty = shared.q_barriers.empty[tickets.consumer];
    if (num_tiles == 0) {
        __syncwarp();
        release(q_empty);
    }
    s_fragment scores;
    p_fragment p;
    for (int left = num_tiles; left > 0; --left) {
        StageTicket before = tickets.next();
        wait(shared.k_barriers.full[before.k_stage], before.k_phase);
        warpgroup::mma_fence();
        warpgroup::mm_ABt(scores, q, q_shared, shared.k, before.k_stage);
        warpgroup::mma_commit_group();
        const bool is_next_issued = tickets.test_next();
        warpgroup::mma_async_wait<0>(scores);
        release(shared.k_barriers.empty[before.k_stage]);
        tickets.look_ahead(is_next_issued);
        softmax_step(params, shared, before, softmax, scores, p, out);
        for (; before.has_successor; --left) {
            const StageTicket tile = tickets.next();
            wait_both(shared.k_barriers.full[tile.k_stage], tile.k_phase, shared.v_barriers.full[before.v_stage],
                      before.v_phase);
            warpgroup::mma_fence(p);
            warpgroup::mm_ABt(scores, q, q_shared, shared.k, tile.k_stage);
            warpgroup::mma_commit_group();
            warpgroup::mma_AB(out, p, shared.v, before.v_stage);
            warpgroup::mma_commit_group();
            const bool is_next_issued = tickets.test_next();
            warpgroup::mma_async_wait<1>(scores);
            release(shared.k_barriers.empty[tile.k_stage]);
            tickets.look_ahead(is_next_issued);
            warpgroup::mma_async_wait<0>(out, p);
            release(shared.v_barriers.empty[before.v_stage]);
            softmax_step(params, shared, tile, softmax, scores, p, out);
            before = tile;
        }
        wait(shared.v_barriers.full[before.v_stage], before.v_phase);
        warpgroup::mma_fence(p);
        warpgroup::mma_AB(out, p, shared.v, before.v_stage);
        warpgroup::mma_commit_group();
        // All scores are computed: Q may be overwritten.
        if (left == 1) release(q_empty);
        warpgroup::mma_async_wait<0>(out);
        release(shared.v_barriers.empty[before.v_stage]);
    }
}

// Epilogue

// Normalises the output, and stores it with its log-sum-exp. Rows without keys get 0 and -inf, poisoned ones NaN.
__device__ __forceinline__ void finish(const Params& params, const OutputRows& rows, bool poisoned, Softmax& softmax,
                                       o_fragment& out) {
    col_vec& sum = softmax.sum;
    sum_over_lanes(sum);
    col_vec factor;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        factor[i] = sum[i] == 0.0f ? 0.0f : 1.0f / sum[i];
        float lse = sum[i] == 0.0f ? -infinity() : softmax.shift[i] * kLn2 + logf(sum[i]);
        if (poisoned) factor[i] = lse = not_a_number();
        if (!rows.valid[i]) lse = -infinity();
        if (rows.exists[i] && laneid() % 4 == 0) params.lse[rows.bh * params.q_len + rows.token[i]] = lse;
    }
    mul_row(out, factor);
    if (!__all_sync(kAllLanes, rows.valid[0] && rows.valid[1])) {
#pragma unroll
        for (int i = 0; i < kHeadDim / 2; ++i) out.data[i] = rows.valid[row_of(i)] ? out.data[i] : 0.0f;
    }
    if (params.out_s != nullptr) store_output(params.out_s, params.out_strides, rows, out);
    if (params.coarse.out_c != nullptr) add_coarse_output<element>(params.coarse, params.schedule.rows.num_rows, rows, out);
    store_output(params.out, params.out_strides, rows, out);
}

__device__ void consume(const Params& params, SharedStorage& shared, int consumer) {
    TicketReader<tile_queue> tickets{shared.queue, consumer};
    int q_phase = 0;
    for (int round = 0;; ++round) {
        const PipelineState<kWorkTiles> state(round);
        const WorkTile<kConsumers>& work = shared.work_tiles.slots[state.index].tile;
        wait(shared.work_tiles.slots[state.index].full, state.phase);
        if (work.ends) return;
        if (work.group.block[consumer] < 0) {
            arrive(shared.work_tiles.slots[state.index].empty);
            continue;
        }

        wait(shared.q_barriers.full[consumer], q_phase);
        q_phase ^= 1;
        q_fragment q;
        warpgroup::load(q, shared.q[consumer]);
        o_fragment out;
        zero(out);
        Softmax softmax{params.scale_log2};
        attend_tiles(params, shared, tickets, work.group.num_tiles_of[consumer], q, softmax, out);

        const OutputRows rows(params.queries, params.schedule.heads.value, work, consumer);
        const bool poisoned = work.group.poisoned >> consumer & 1;
        arrive(shared.work_tiles.slots[state.index].empty);
        finish(params, rows, poisoned, softmax, out);
    }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads, 1) attend_forward(const __grid_constant__ Params params) {
    extern __shared__ __align__(1024) uint8_t raw[];
    SharedStorage& shared = *reinterpret_cast<SharedStorage*>(raw);
    if (threadIdx.x == 0) init_barriers(shared);
    __syncthreads();

    run_roles<kConsumers, kProducerRegisters, kConsumerRegisters>([&] { produce(params, shared); },
                                                                  [&](int index) { consume(params, shared, index); });
}
