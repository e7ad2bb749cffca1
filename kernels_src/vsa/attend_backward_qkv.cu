// dQ, dK and dV in one pass, for blocks of more than one box:
//
//   Pᵀ = exp(scale K Qᵀ − lse),   dSᵀ = Pᵀ ∘ (V dOᵀ − delta),   dV = Pᵀ dO,   dK = scale dSᵀ Q,   dQ = Σ dS K
//
// As in attend_backward_kv.cu, rows are key blocks and columns are the query blocks that selected them. A thread block keeps
// two boxes of keys. A consumer warpgroup of each computes its scores, transposed, and adds to its dK and dV in registers. dSᵀ
// of both go through shared memory to a third warpgroup: it multiplies them with K, and adds the product to dQ in global
// memory, in fp32. The order of these additions differs from run to run.
//
// Specialised at compile time: VSA_DTYPE (bf16, half), VSA_HEAD_DIM (64, 128), VSA_WORK_TILES and VSA_STAGES.
#include "vsa/backward.cuh"
#include "vsa/params.cuh"

using namespace kittens;

namespace {

using element = VSA_DTYPE;
constexpr int kHeadDim = VSA_HEAD_DIM;
constexpr int kWorkTiles = VSA_WORK_TILES;
constexpr int kStages = VSA_STAGES;
constexpr int kConsumers = 2;
constexpr int kThreads = (kConsumers + 2) * kWarpgroupThreads;
constexpr int kConsumerWarps = (kConsumers + 1) * kWarpgroupWarps;  // with those of dQ
constexpr int kDsBuffers = 2;
constexpr int kBoxEntries = 16;
static_assert(kStages + kDsBuffers < kBoxEntries);

constexpr int kProducerRegisters = 32;
constexpr int kDqRegisters = 64;
constexpr int kConsumerRegisters = 208;
static_assert(kProducerRegisters + kDqRegisters + kConsumers * kConsumerRegisters <= 65536 / kWarpgroupThreads);

// Columns of dQ that are computed at a time.
constexpr int kDqCols = 64;

using ds_tile = st<element, kBoxTokens, kBoxTokens>;
using s_fragment = rt_fl<16, kBoxTokens>;
using p_fragment = rt<element, 16, kBoxTokens>;
using dk_fragment = rt_fl<16, kHeadDim>;
using dq_fragment = rt_fl<16, kDqCols>;

using Params = PassOverQueries<element>;
VSA_CHECK_PARAMS;

struct SharedStorage : QueryRing<element, kHeadDim, kConsumers, kStages, kWorkTiles> {
    ds_tile ds[kConsumers * kDsBuffers];  // dSᵀ of each consumer
    // Where dQ of the query box of a tile is summed up. An entry needs no barrier: when a tile is loaded, its stage has been
    // released by the consumers, who then had buffers for dSᵀ that the warpgroup of dQ had released.
    DqSums sums[kBoxEntries];
    StageBarriers<kConsumers * kDsBuffers> ds_barriers;
};
static_assert(sizeof(SharedStorage) <= VSA_SMEM_BYTES, "the host launches with less shared memory");

__device__ __forceinline__ void init_barriers(SharedStorage& shared) {
    init_stage_barriers(shared.ds_barriers, kWarpgroupWarps, kWarpgroupWarps);
    shared.init_barriers(kConsumers * kWarpgroupWarps, kConsumerWarps);
}

// The key box of a consumer. Of a block with an odd number of boxes, the last consumer has none: it takes the one before again,
// and counts none of its tokens.
struct KeyBox {
    int box;
    bool exists;
    BoxOrigin origin;
    int moved;

    __device__ __forceinline__ KeyBox(const TokenLayout& keys, const WorkTile<1>& work, int consumer) {
        const int block = work.group.block[0], own = work.group.box[0] + consumer;
        exists = own < keys.boxes.value;
        box = exists ? own : own - consumer;
        origin = origin_of_box(keys, block, box);
        moved = first_place_of(keys, block, box);
    }
    // Where the load starts: what is not valid then arrives as zeros, see KeyTile::origin.
    __device__ __forceinline__ BoxOrigin loaded_from() const { return before(origin, moved); }

    __device__ __forceinline__ OutputRows rows(const Params& params, const WorkTile<1>& work) const {
        return {params.keys, params.schedule.heads.value, work.batch, work.row_head, work.group.block[0], box, origin, moved};
    }
};

__device__ __forceinline__ void produce(const Params& params, SharedStorage& shared) {
    const auto load_keys = [&](const WorkTile<1>& work, semaphore& full) {
#pragma unroll 1
        for (int i = 0; i < kConsumers; ++i) {
            const BoxOrigin from = KeyBox(params.keys, work, i).loaded_from();
            load_box(shared.k[i], params.k, work.batch, work.row_head, from, full);
            load_box(shared.v[i], params.v, work.batch, work.row_head, from, full);
        }
    };
    produce_queries(params, shared, load_keys, [&](uint32_t number, int box, const BoxOrigin& origin) {
        shared.sums[number % kBoxEntries] = DqSums(params.queries, box, origin);
    });
}

// Computed anew wherever it is needed, because that takes no register in between.
__device__ __forceinline__ int this_consumer() { return threadIdx.x / kWarpgroupThreads; }

// What a consumer adds up, and which of its keys count.
struct Keys {
    dk_fragment dk, dv;
    int valid;  // bit i: the lane's key i is
};

// Products that are added to what is subtracted from them anyway, one number for each column, need no other registers for it.
__device__ __forceinline__ void set_columns(s_fragment& s, const ColumnPairs& pairs) {
#pragma unroll
    for (int i = 0; i < kBoxTokens / 2; ++i) s.data[i] = pairs[i];
}

__device__ __forceinline__ void exponentiate(float scale_log2, int valid, s_fragment& s, p_fragment& p) {
#pragma unroll
    for (int i = 0; i < kBoxTokens / 2; ++i) s.data[i] = kittens::exp2(s.data[i] * scale_log2);
    copy(p, s);
    const uint32_t mask[2] = {0u - (valid & 1), 0u - (valid >> 1)};
#pragma unroll
    for (int i = 0; i < kBoxTokens / 4; ++i) p.data[i] &= mask[i % 2];
}

// dSᵀ of a tile, also for the warpgroup of dQ.
__device__ __forceinline__ void differentiate(SharedStorage& shared, int consumer, uint32_t number, const p_fragment& p,
                                              s_fragment& s, p_fragment& ds) {
#pragma unroll
    for (int i = 0; i < kBoxTokens / 2; i += 2) {
        const float2 pair = unpack<element>(p.data[i / 2]);
        s.data[i] *= pair.x;
        s.data[i + 1] *= pair.y;
    }
    copy(ds, s);
    const PipelineState<kDsBuffers> state(number);
    const int buffer = consumer * kDsBuffers + state.index;
    wait(shared.ds_barriers.empty[buffer], state.phase ^ 1);
    warpgroup::store(shared.ds[buffer], ds);
    warpgroup::fence_stores();
    __syncwarp();
    release(shared.ds_barriers.full[buffer]);
}

// dV of a tile, and its dS. dV is waited for together with dP: dS beside it would need registers that there are not.
__device__ __forceinline__ void add_dv(SharedStorage& shared, int consumer, uint32_t tile, s_fragment& s, p_fragment& p,
                                       p_fragment& ds, Keys& keys) {
    const PipelineState<kStages> stage(tile);
    set_columns(s, ColumnPairs(shared.statistics[stage.index][0].delta));
    warpgroup::mma_fence(s, p);
    warpgroup::mma_ABt(s, shared.v[consumer], shared.dout, stage.index);
    warpgroup::mma_commit_group();
    warpgroup::mma_AB(keys.dv, p, shared.dout, stage.index);
    warpgroup::mma_commit_group();
    warpgroup::mma_async_wait<0>(s, keys.dv, p);
    differentiate(shared, consumer, tile, p, s, ds);
}

// The tiles of a work tile. `number` counts those of all work tiles. The products of each tile are issued in two pairs: its
// scores with dK of the tile before, so that the scores are exponentiated while dK is being added; and dP with dV. `number` and
// the number of tiles are made uniform, and with them the stages that follow from it.
__device__ __forceinline__ void add_tiles(const Params& params, SharedStorage& shared, int num_tiles, uint32_t& number,
                                          Keys& keys) {
    if (num_tiles == 0) return;
    const int consumer = uniform(this_consumer());
    uint32_t tile = uniform(number);
    const uint32_t end = tile + uniform(num_tiles);
    s_fragment s;
    p_fragment p, ds;
    const PipelineState<kStages> first(tile);
    wait(shared.barriers.full[first.index], first.phase);
    set_columns(s, ColumnPairs(shared.statistics[first.index][0].shift));
    warpgroup::mma_fence(s);
    warpgroup::mma_ABt(s, shared.k[consumer], shared.q, first.index);
    warpgroup::mma_commit_group();
    warpgroup::mma_async_wait<0>(s);
    exponentiate(params.scale_log2, keys.valid, s, p);
    add_dv(shared, consumer, tile, s, p, ds, keys);
#pragma unroll 1
    while (++tile < end) {
        const PipelineState<kStages> before(tile - 1), stage(tile);
        wait(shared.barriers.full[stage.index], stage.phase);
        set_columns(s, ColumnPairs(shared.statistics[stage.index][0].shift));
        warpgroup::mma_fence(s, ds);
        warpgroup::mma_ABt(s, shared.k[consumer], shared.q, stage.index);
        warpgroup::mma_commit_group();
        warpgroup::mma_AB(keys.dk, ds, shared.q, before.index);
        warpgroup::mma_commit_group();
        warpgroup::mma_async_wait<1>(s);
        exponentiate(params.scale_log2, keys.valid, s, p);
        warpgroup::mma_async_wait<0>(keys.dk, ds);
        release(shared.barriers.empty[before.index]);
        add_dv(shared, consumer, tile, s, p, ds, keys);
    }
    number = tile;
    add_last(keys.dk, ds, shared.q, PipelineState<kStages>(tile - 1).index, shared.barriers);
}

__device__ void consume(const Params& params, SharedStorage& shared) {
    uint32_t number = 0;
    Keys keys;
    for_each_work_tile(shared.work_tiles, [&](const WorkTile<1>& work, auto) {
        if (work.is_first) {
            zero(keys.dk);
            zero(keys.dv);
            const KeyBox box(params.keys, work, this_consumer());
            const OutputRows rows = box.rows(params, work);
            keys.valid = box.exists ? rows.valid[0] | rows.valid[1] << 1 : 0;
            wait(shared.k_barriers.full[0], work.row_phase);
        }
        add_tiles(params, shared, work.group.num_tiles, number, keys);
        if (work.is_last) {
            __syncwarp();
            release(shared.k_barriers.empty[0]);
            const KeyBox box(params.keys, work, this_consumer());
            if (box.exists) {
                const OutputRows rows = box.rows(params, work);
                store_gradient(params.dv, params.keys, params.schedule.rows.num_rows, rows, 1.0f, keys.dv);
                // Keeps the two apart, which together take more registers than there are.
                __syncwarp();
                store_gradient(params.dk, params.keys, params.schedule.rows.num_rows, rows, params.scale, keys.dk);
            }
        }
    });
}

// Adds some columns of the product of a tile to those of its query box.
template <int first_col>
__device__ __forceinline__ void add_columns(const Params& params, SharedStorage& shared, int buffer, const DqSums& sums,
                                            float* own, dq_fragment& dq) {
    warpgroup::mma_fence();
    warpgroup::mm_AtB<first_col, false>(dq, shared.ds, buffer, shared.k, 0);
    warpgroup::mm_AtB<first_col, true>(dq, shared.ds, kDsBuffers + buffer, shared.k, 1);
    warpgroup::mma_commit_group();
    warpgroup::mma_async_wait<0>(dq);
    if (first_col + kDqCols == kHeadDim) {
#pragma unroll
        for (int i = 0; i < kConsumers; ++i) release(shared.ds_barriers.empty[i * kDsBuffers + buffer]);
    }
    sums.for_each<kHeadDim>(params.queries, own, first_col, dq,
                            [](float* address, auto... values) { add_to(address, values...); });
}

// The warpgroup of dQ.
__device__ void add_dq(const Params& params, SharedStorage& shared) {
    dq_fragment dq;
    zero(dq);
    uint32_t number = 0;
    for_each_work_tile(shared.work_tiles, [&](const WorkTile<1>& work, auto) {
        if (work.is_first) wait(shared.k_barriers.full[0], work.row_phase);
        float* const head = params.dq + int64_t(query_head(params, work)) * params.queries.num_tokens() * kHeadDim;
#pragma unroll 1
        for (const uint32_t end = number + work.group.num_tiles; number < end; ++number) {
            const PipelineState<kDsBuffers> ds(number);
#pragma unroll
            for (int i = 0; i < kConsumers; ++i) wait(shared.ds_barriers.full[i * kDsBuffers + ds.index], ds.phase);
            const DqSums sums = shared.sums[number % kBoxEntries];
            float* const own = sums.of_lane<kHeadDim>(head);
            add_columns<0>(params, shared, ds.index, sums, own, dq);
            if constexpr (kHeadDim > kDqCols) add_columns<kDqCols>(params, shared, ds.index, sums, own, dq);
        }
        // Every lane has seen the phase of K before it can end again.
        __syncwarp();
        if (work.is_last) release(shared.k_barriers.empty[0]);
    });
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads, 1) attend_backward_qkv(const __grid_constant__ Params params) {
    extern __shared__ __align__(1024) uint8_t raw[];
    SharedStorage& shared = *reinterpret_cast<SharedStorage*>(raw);
    if (threadIdx.x == 0) init_barriers(shared);
    __syncthreads();

    const int index = broadcast(threadIdx.x / kWarpgroupThreads);
    if (index < kConsumers) {
        warpgroup::increase_registers<kConsumerRegisters>();
        consume(params, shared);
    } else if (index == kConsumers) {
        warpgroup::decrease_registers<kDqRegisters>();
        add_dq(params, shared);
    } else {
        warpgroup::decrease_registers<kProducerRegisters>();
        produce(params, shared);
    }
}
