// dK and dV of every key block for heads of 64 channels: what attend_backward_kv.cu computes, by a single warpgroup, which has
// registers for all four products of a tile. Two thread blocks share a multiprocessor: products of one run while the other
// exponentiates.
//
// The products of a tile are issued in two batches. Its scores and dP come with dK of the tile before, and the scores are
// exponentiated while the others run. dV comes after that, and dS is computed beside it.
//
// Specialised at compile time: VSA_DTYPE (bf16, half), VSA_HEAD_DIM (64), VSA_WORK_TILES and VSA_STAGES.
#include "vsa/backward.cuh"
#include "vsa/params.cuh"
#include "vsa/roles.cuh"

using namespace kittens;

namespace {

using element = VSA_DTYPE;
constexpr int kHeadDim = VSA_HEAD_DIM;
constexpr int kWorkTiles = VSA_WORK_TILES;
constexpr int kStages = VSA_STAGES;
constexpr int kConsumers = 1;
constexpr int kThreads = (kConsumers + 1) * kWarpgroupThreads;
constexpr int kThreadBlocks = 2;  // of a multiprocessor

constexpr int kProducerRegisters = 40;
constexpr int kConsumerRegisters = 216;

using k_fragment = rt<element, 16, kHeadDim>;
using s_fragment = rt_fl<16, kBoxTokens>;
using p_fragment = rt<element, 16, kBoxTokens>;
using dk_fragment = rt_fl<16, kHeadDim>;

using Params = PassOverQueries<element>;
VSA_CHECK_PARAMS;

using SharedStorage = QueryRing<element, kHeadDim, 1, kStages, kWorkTiles>;
static_assert(sizeof(SharedStorage) <= VSA_SMEM_BYTES, "the host launches with less shared memory");

// What stays in registers for the tiles of a key box.
struct Keys {
    k_fragment k, v;
    dk_fragment dk, dv;
};

// Of one tile.
struct Tile {
    s_fragment s, dp;
    p_fragment p, ds;
};

// Adds dV of tile `number`, and dK of the tile before it. Whether the next tile has arrived is looked up meanwhile.
template <bool is_first>
__device__ __forceinline__ void add_tile(const Params& params, SharedStorage& shared, uint32_t number, bool& has_arrived,
                                         Keys& keys, Tile& tile) {
    const PipelineState<kStages> before(number - 1), stage(number), next(number + 1);
    if (!has_arrived) wait(shared.barriers.full[stage.index], stage.phase);
    const ColumnPairs shift(shared.statistics[stage.index][0].shift);
    warpgroup::mma_fence();
    warpgroup::mm_ABt(tile.s, keys.k, shared.q, stage.index);
    warpgroup::mma_commit_group();
    warpgroup::mm_ABt(tile.dp, keys.v, shared.dout, stage.index);
    warpgroup::mma_commit_group();
    if constexpr (!is_first) {
        warpgroup::mma_AB(keys.dk, tile.ds, shared.q, before.index);
        warpgroup::mma_commit_group();
    }
    has_arrived = test(shared.barriers.full[next.index], next.phase);
    warpgroup::mma_async_wait<is_first ? 1 : 2>(tile.s);
    exp2_scaled(tile.s, params.scale_log2, shift);
    copy(tile.p, tile.s);

    const ColumnPairs delta(shared.statistics[stage.index][0].delta);
    warpgroup::mma_fence(tile.p);
    warpgroup::mma_AB(keys.dv, tile.p, shared.dout, stage.index);
    warpgroup::mma_commit_group();
    if constexpr (is_first) {
        warpgroup::mma_async_wait<1>(tile.dp);
    } else {
        warpgroup::mma_async_wait<1>(tile.dp, keys.dk, tile.ds);
        release(shared.barriers.empty[before.index]);
    }
#pragma unroll
    for (int i = 0; i < kBoxTokens / 2; ++i) tile.dp.data[i] = tile.s.data[i] * (tile.dp.data[i] - delta[i]);
    copy(tile.ds, tile.dp);
    // Without this fence ptxas moves the wait before all of dS; with it, before the last steps.
    warpgroup::mma_fence(tile.ds);
    warpgroup::mma_async_wait<0>(keys.dv, tile.p);
}

// Adds the tiles of a work tile. `number` counts those of all work tiles. It and the number of tiles are made uniform, and with
// them the stages that follow from it.
__device__ __forceinline__ void add_tiles(const Params& params, SharedStorage& shared, int num_tiles, uint32_t& number,
                                          Keys& keys) {
    if (num_tiles == 0) return;
    uint32_t own = uniform(number);
    const uint32_t end = own + uniform(num_tiles);
    Tile tile;
    bool has_arrived = false;
    add_tile<true>(params, shared, own, has_arrived, keys, tile);
#pragma unroll 1
    while (++own < end) add_tile<false>(params, shared, own, has_arrived, keys, tile);
    number = own;
    add_last(keys.dk, tile.ds, shared.q, PipelineState<kStages>(own - 1).index, shared.barriers);
}

__device__ void consume(const Params& params, SharedStorage& shared) {
    int k_phase = 0;
    uint32_t number = 0;
    Keys keys;
    for_each_work_tile(shared.work_tiles, [&](const WorkTile<1>& work, auto) {
        if (work.is_first) {
            zero(keys.dk);
            zero(keys.dv);
            wait(shared.k_barriers.full[0], k_phase);
            k_phase ^= 1;
            warpgroup::load(keys.k, shared.k[0]);
            warpgroup::load(keys.v, shared.v[0]);
            __syncwarp();
            release(shared.k_barriers.empty[0]);
        }
        add_tiles(params, shared, work.group.num_tiles, number, keys);
        if (work.is_last) {
            const OutputRows rows(params.keys, params.schedule.heads.value, work, 0);
            store_gradient(params.dv, params.keys, params.schedule.rows.num_rows, rows, 1.0f, keys.dv);
            store_gradient(params.dk, params.keys, params.schedule.rows.num_rows, rows, params.scale, keys.dk);
        }
    });
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads, kThreadBlocks)
    attend_backward_kv_64(const __grid_constant__ Params params) {
    extern __shared__ __align__(1024) uint8_t raw[];
    SharedStorage& shared = *reinterpret_cast<SharedStorage*>(raw);
    if (threadIdx.x == 0) shared.init_barriers(kWarpgroupWarps, kWarpgroupWarps);
    __syncthreads();

    run_roles<kConsumers, kProducerRegisters, kConsumerRegisters, kThreadBlocks>([&] { produce_queries(params, shared); },
                                                                                 [&](int) { consume(params, shared); });
}
