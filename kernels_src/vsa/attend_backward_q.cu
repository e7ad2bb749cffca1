// dQ of every query block, from the keys of its key blocks. Probabilities are computed again from the log-sum-exp of the
// forward:
//
//   P = exp(scale Q Kᵀ − lse),   dS = P ∘ (dO Vᵀ − delta),   dQ = scale dS K
//
// Work tiles, their lists and the producers are those of the forward. Q and dO stay in a consumer's registers: with them in
// shared memory, the products would need all of its bandwidth. Three consumers have registers for half of dO.
//
// Specialised at compile time: VSA_DTYPE (bf16, half), VSA_HEAD_DIM (64, 128), VSA_CONSUMERS, VSA_WORK_TILES and VSA_STAGES.
#include "vsa/backward.cuh"
#include "vsa/mask.cuh"
#include "vsa/params.cuh"
#include "vsa/roles.cuh"
#include "vsa/tile_queue.cuh"

using namespace kittens;

namespace {

using element = VSA_DTYPE;
constexpr int kHeadDim = VSA_HEAD_DIM;
constexpr int kConsumers = VSA_CONSUMERS;
constexpr int kWorkTiles = VSA_WORK_TILES;
constexpr int kStages = VSA_STAGES;
constexpr int kThreads = (kConsumers + 1) * kWarpgroupThreads;
constexpr int kLoaders = 2;  // of keys, and of query boxes

// Columns of dO that a consumer has in registers.
constexpr int kDoutColsInRegisters = kConsumers == 2 ? kHeadDim : kHeadDim / 2;

// Registers of a thread.
constexpr int kProducerRegisters = 56;
constexpr int kConsumerRegisters = kConsumers == 2 ? 224 : 152;

using box_tile = st<element, kBoxTokens, kHeadDim>;
using q_fragment = rt<element, 16, kHeadDim>;
using dout_fragment = rt<element, 16, kDoutColsInRegisters>;
using s_fragment = rt_fl<16, kBoxTokens>;
using ds_fragment = rt<element, 16, kBoxTokens>;
using dq_fragment = rt_fl<16, kHeadDim>;
using tile_queue = TileQueue<kConsumers, kStages, kStages>;

struct Params {
    TokenTensor q, k, v, dout;
    GradientTensor<element> dq;
    TokenLayout queries, keys;
    Schedule<IndexTable> schedule;
    TileLists<kConsumers> lists;
    const RowStatistics* statistics;
    float scale, scale_log2;
};
VSA_CHECK_PARAMS;

struct SharedStorage {
    box_tile k[kStages], v[kStages];
    box_tile q[kConsumers], dout[kConsumers];
    WorkTileQueue<kConsumers, kWorkTiles> work_tiles;
    TileListScratch<kConsumers> scratch;
    tile_queue queue;
    StageBarriers<kStages> barriers;       // of K and V
    StageBarriers<kConsumers> q_barriers;  // of Q and dO
};
static_assert(sizeof(SharedStorage) <= VSA_SMEM_BYTES, "the host launches with less shared memory");

__device__ __forceinline__ void init_barriers(SharedStorage& shared) {
    constexpr int kConsumerWarps = kConsumers * kWarpgroupWarps;
    init_work_tile_barriers(shared.work_tiles, kConsumerWarps + kLoaders);
    init_stage_barriers(shared.barriers, 2, kConsumerWarps);
    init_stage_barriers(shared.q_barriers, 2, kWarpgroupWarps);
    init_queue_barriers(shared.queue, 1);
    fence_init_semaphores();
}

__device__ __forceinline__ void produce(const Params& params, SharedStorage& shared) {
    const int warp = warpid() % kWarpgroupWarps;
    acquire_maps(params.q, params.k, params.v, params.dout);
    using work_tile = WorkTile<kConsumers>;
    const auto load_keys = [&](const work_tile& work, const BoxOrigin& origin, int stage) {
        semaphore& full = shared.barriers.full[stage];
        load_box(shared.k[stage], params.k, work.batch, work.col_head, origin, full);
        load_box(shared.v[stage], params.v, work.batch, work.col_head, origin, full);
    };
    const auto load_queries = [&](const work_tile& work, int i) {
        semaphore& full = shared.q_barriers.full[i];
        load_box(shared.q[i], params.q, work.batch, work.row_head, work.origin[i], full);
        load_box(shared.dout[i], params.dout, work.batch, work.row_head, work.origin[i], full);
    };
    if (warp == 0)
        load_tiles<Operand::kBoth>(params.keys, params.lists, shared.work_tiles, shared.barriers, shared.queue, load_keys);
    if (warp == 1) load_row_boxes(shared.work_tiles, shared.q_barriers, load_queries);
    if (warp == 2) {
        schedule_work_tiles(params.schedule, params.queries, params.keys, params.lists, shared.scratch, shared.work_tiles);
    }
}

// Adds dS K of one tile.
template <bool kIsPartial>
__device__ __forceinline__ void add_tile(const Params& params, SharedStorage& shared, TicketReader<tile_queue>& tickets,
                                         const StageTicket& tile, const q_fragment& q, const dout_fragment& dout,
                                         const col_vec& shift, const col_vec& delta, dq_fragment& dq) {
    const int stage = tile.k_stage;
    s_fragment s, dp;
    ds_fragment ds;
    warpgroup::mma_fence();
    warpgroup::mm_ABt(s, q, shared.k, stage);
    warpgroup::mma_commit_group();
    warpgroup::mm_ABt(dp, dout, shared.dout[tickets.consumer], shared.v, stage);
    warpgroup::mma_commit_group();
    const bool is_next_issued = tickets.test_next();
    warpgroup::mma_async_wait<1>(s);
    if constexpr (kIsPartial) mask_keys(params.keys, shared.queue.valid[stage], s);
    exp2_scaled(s, params.scale_log2, shift);
    // `s` is named so that it is computed before this wait.
    warpgroup::mma_async_wait<0>(dp, s);
    tickets.look_ahead(is_next_issued);
#pragma unroll
    for (int i = 0; i < kBoxTokens / 2; ++i) s.data[i] *= dp.data[i] - delta[row_of(i)];
    copy(ds, s);
    warpgroup::mma_fence(ds);
    warpgroup::mma_AB(dq, ds, shared.k, stage);
    warpgroup::mma_commit_group();
    warpgroup::mma_async_wait<0>(dq, ds);
    release(shared.barriers.empty[stage]);
}

// Adds those of a work tile. A partial tile has code of its own: with a branch between its products, ptxas 13.0 gives dS
// registers in which dO must stay.
__device__ __forceinline__ void add_tiles(const Params& params, SharedStorage& shared, TicketReader<tile_queue>& tickets,
                                          int num_tiles, const q_fragment& q, const dout_fragment& dout, const col_vec& shift,
                                          const col_vec& delta, dq_fragment& dq) {
#pragma unroll 1
    for (int left = num_tiles; left > 0; --left) {
        const StageTicket tile = tickets.next();
        wait(shared.barriers.full[tile.k_stage], tile.k_phase);
        if (__builtin_expect(tile.is_partial, 0)) {
            add_tile<true>(params, shared, tickets, tile, q, dout, shift, delta, dq);
        } else {
            add_tile<false>(params, shared, tickets, tile, q, dout, shift, delta, dq);
        }
    }
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

        col_vec shift, delta;
        load_statistics(params.statistics, params.queries, params.schedule, work, consumer, shift, delta);
        wait(shared.q_barriers.full[consumer], q_phase);
        q_phase ^= 1;
        q_fragment q;
        dout_fragment dout;
        warpgroup::load(q, shared.q[consumer]);
        warpgroup::load(dout, shared.dout[consumer]);
        __syncwarp();
        if constexpr (kDoutColsInRegisters == kHeadDim) release(shared.q_barriers.empty[consumer]);
        dq_fragment dq;
        zero(dq);
        add_tiles(params, shared, tickets, work.group.num_tiles_of[consumer], q, dout, shift, delta, dq);
        if constexpr (kDoutColsInRegisters < kHeadDim) {
            __syncwarp();
            release(shared.q_barriers.empty[consumer]);
        }

        const OutputRows rows(params.queries, params.schedule.heads.value, work, consumer);
        const bool poisoned = work.group.poisoned >> consumer & 1;
        arrive(shared.work_tiles.slots[state.index].empty);
        store_gradient(params.dq, params.queries, params.schedule.rows.num_rows, rows, poisoned ? not_a_number() : params.scale,
                       dq);
    }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads, 1) attend_backward_q(const __grid_constant__ Params params) {
    extern __shared__ __align__(1024) uint8_t raw[];
    SharedStorage& shared = *reinterpret_cast<SharedStorage*>(raw);
    if (threadIdx.x == 0) init_barriers(shared);
    __syncthreads();

    run_roles<kConsumers, kProducerRegisters, kConsumerRegisters>([&] { produce(params, shared); },
                                                                  [&](int index) { consume(params, shared, index); });
}
