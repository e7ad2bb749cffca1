// dK and dV of every key block, from the queries of the query blocks that selected it.
//
//   Pᵀ = exp(scale K Qᵀ − lse),   dSᵀ = Pᵀ ∘ (V dOᵀ − delta),   dV = Pᵀ dO,   dK = scale dSᵀ Q
//
// Rows are key blocks and columns are query blocks: the scheduler takes the inverse of the map. Scores are computed transposed,
// keys by queries, so that Pᵀ and dSᵀ are left operands in registers.
//
// Two warpgroups share each tile, two products each: the first computes Pᵀ and accumulates dV, the second computes V dOᵀ, takes
// Pᵀ through shared memory, and accumulates dK. K and V are left operands in registers, too: with either in shared memory, the
// products would need all of its bandwidth.
//
// Heads of 64 channels have a kernel of their own, attend_backward_kv_64.cu.
//
// Specialised at compile time: VSA_DTYPE (bf16, half), VSA_HEAD_DIM (128), VSA_WORK_TILES and VSA_STAGES.
#include "vsa/backward.cuh"
#include "vsa/params.cuh"
#include "vsa/roles.cuh"

using namespace kittens;

namespace {

using element = VSA_DTYPE;
constexpr int kHeadDim = VSA_HEAD_DIM;
constexpr int kWorkTiles = VSA_WORK_TILES;
constexpr int kStages = VSA_STAGES;
constexpr int kConsumers = 2;
constexpr int kThreads = (kConsumers + 1) * kWarpgroupThreads;
constexpr int kConsumerWarps = kConsumers * kWarpgroupWarps;

constexpr int kProducerRegisters = 72;
constexpr int kConsumerRegisters = 216;

using k_fragment = rt<element, 16, kHeadDim>;
using s_fragment = rt_fl<16, kBoxTokens>;
using p_fragment = rt<element, 16, kBoxTokens>;
using dk_fragment = rt_fl<16, kHeadDim>;

using Params = PassOverQueries<element>;
VSA_CHECK_PARAMS;

// Pᵀ on its way from the first warpgroup to the second: a lane writes what the same lane reads. Named barriers tell when: one
// of each buffer that it is full, and one that it is empty.
struct Exchange {
    static constexpr int kBuffers = 2;
    static constexpr int kWords = sizeof(p_fragment) / sizeof(uint4);
    template <int buffer>
    using full = named_barrier<1 + buffer, 2 * kWarpgroupThreads>;
    template <int buffer>
    using empty = named_barrier<1 + kBuffers + buffer, 2 * kWarpgroupThreads>;
    uint4 words[kBuffers][kWords][kWarpgroupThreads];

    // The words are there for the other warpgroup when they are published.
    template <int buffer>
    __device__ __forceinline__ void store(const p_fragment& p) {
        empty<buffer>::sync();
#pragma unroll
        for (int i = 0; i < kWords; ++i) {
            const uint32_t* word = p.data + 4 * i;
            words[buffer][i][warpgroup::laneid()] = {word[0], word[1], word[2], word[3]};
        }
    }
    template <int buffer>
    __device__ __forceinline__ static void publish() {
        full<buffer>::arrive();
    }
    template <int buffer>
    __device__ __forceinline__ void get(p_fragment& p) {
        full<buffer>::sync();
#pragma unroll
        for (int i = 0; i < kWords; ++i) {
            const uint4 four = words[buffer][i][warpgroup::laneid()];
            uint32_t* word = p.data + 4 * i;
            word[0] = four.x, word[1] = four.y, word[2] = four.z, word[3] = four.w;
        }
        empty<buffer>::arrive();
    }
};

struct SharedStorage : QueryRing<element, kHeadDim, 1, kStages, kWorkTiles> {
    Exchange exchange;
};
static_assert(sizeof(SharedStorage) <= VSA_SMEM_BYTES, "the host launches with less shared memory");

// What a warpgroup computes of each tile: a first product, K Qᵀ or V dOᵀ, and from it the left operand of a second one, Pᵀ dO
// or dSᵀ Q.
//
// kFirst: the warpgroup of K Qᵀ, Pᵀ and dV; else that of V dOᵀ, dSᵀ and dK.
template <bool kFirst, int buffer>
__device__ __forceinline__ void transform(const Params& params, Exchange& exchange, const ColumnPairs& pairs, s_fragment& s,
                                          p_fragment& p) {
    if constexpr (kFirst) {
        exp2_scaled(s, params.scale_log2, pairs);
        copy(p, s);
        exchange.store<buffer>(p);
    } else {
        exchange.get<buffer>(p);
#pragma unroll
        for (int i = 0; i < kBoxTokens / 2; i += 2) {
            const float2 pair = unpack<element>(p.data[i / 2]);
            s.data[i] = pair.x * (s.data[i] - pairs[i]);
            s.data[i + 1] = pair.y * (s.data[i + 1] - pairs[i + 1]);
        }
        copy(p, s);
    }
}

template <bool kFirst>
__device__ __forceinline__ ColumnPairs load_pairs(const SharedStorage& shared, int stage) {
    const RowStatistics& first = shared.statistics[stage][0];
    return ColumnPairs(kFirst ? first.shift : first.delta);
}

// The second product of a tile, in `stage`, whose left operand is `before`, and the first one of the next, from which the left
// operand `p` of its second one is computed. Whether the tile after that has arrived is looked up meanwhile.
template <bool kFirst, int buffer>
__device__ __forceinline__ void add_tile(const Params& params, SharedStorage& shared, const k_fragment& left, uint32_t number,
                                         PipelineState<kStages>& stage, bool& has_arrived, s_fragment& s, p_fragment& before,
                                         p_fragment& p, dk_fragment& sum) {
    const PipelineState<kStages> next(number), later(number + 1);
    if (!has_arrived) wait(shared.barriers.full[next.index], next.phase);
    warpgroup::mma_fence(before);
    warpgroup::mm_ABt(s, left, kFirst ? shared.q : shared.dout, next.index);
    warpgroup::mma_commit_group();
    warpgroup::mma_AB(sum, before, kFirst ? shared.dout : shared.q, stage.index);
    warpgroup::mma_commit_group();
    // Loaded before the first product is waited for, to hide the latency.
    const ColumnPairs pairs = load_pairs<kFirst>(shared, next.index);
    has_arrived = test(shared.barriers.full[later.index], later.phase);
    warpgroup::mma_async_wait<1>(s);
    transform<kFirst, buffer>(params, shared.exchange, pairs, s, p);
    warpgroup::mma_async_wait<0>(sum, before);
    release(shared.barriers.empty[stage.index]);
    if constexpr (kFirst) Exchange::publish<buffer>();
    stage = next;
}

// Adds the tiles of a work tile to `sum`. `number` counts the tiles of all work tiles. Two tiles take turns in registers,
// because the second product of one is in flight while the next one's left operand is computed.
template <bool kFirst>
__device__ __forceinline__ void add_tiles(const Params& params, SharedStorage& shared, const k_fragment& left, int num_tiles,
                                          uint32_t& number, dk_fragment& sum) {
    if (num_tiles == 0) return;
    const uint32_t end = number + num_tiles;
    s_fragment s;
    p_fragment even, odd;
    PipelineState<kStages> stage(number);
    bool has_arrived = false;
    wait(shared.barriers.full[stage.index], stage.phase);
    warpgroup::mma_fence();
    warpgroup::mm_ABt(s, left, kFirst ? shared.q : shared.dout, stage.index);
    warpgroup::mma_commit_group();
    const ColumnPairs pairs = load_pairs<kFirst>(shared, stage.index);
    warpgroup::mma_async_wait<0>(s);
    transform<kFirst, 0>(params, shared.exchange, pairs, s, even);
    if constexpr (kFirst) Exchange::publish<0>();
#pragma unroll 1
    while (++number < end) {
        add_tile<kFirst, 1>(params, shared, left, number, stage, has_arrived, s, even, odd, sum);
        if (++number == end) {
            even = odd;
            break;
        }
        add_tile<kFirst, 0>(params, shared, left, number, stage, has_arrived, s, odd, even, sum);
    }
    add_last(sum, even, kFirst ? shared.dout : shared.q, stage.index, shared.barriers);
}

template <bool kFirst>
__device__ void consume(const Params& params, SharedStorage& shared) {
    int k_phase = 0;
    uint32_t number = 0;
    k_fragment left;
    dk_fragment sum;
    if constexpr (!kFirst) {
        Exchange::empty<0>::arrive();
        Exchange::empty<1>::arrive();
    }
    for_each_work_tile(shared.work_tiles, [&](const WorkTile<1>& work, auto) {
        if (work.is_first) {
            zero(sum);
            wait(shared.k_barriers.full[0], k_phase);
            k_phase ^= 1;
            warpgroup::load(left, kFirst ? shared.k[0] : shared.v[0]);
            __syncwarp();
            release(shared.k_barriers.empty[0]);
        }
        add_tiles<kFirst>(params, shared, left, work.group.num_tiles_of[0], number, sum);
        if (work.is_last) {
            const OutputRows rows(params.keys, params.schedule.heads.value, work, 0);
            const float factor = kFirst ? 1.0f : params.scale;
            store_gradient(kFirst ? params.dv : params.dk, params.keys, params.schedule.rows.num_rows, rows, factor, sum);
        }
    });
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads, 1) attend_backward_kv(const __grid_constant__ Params params) {
    extern __shared__ __align__(1024) uint8_t raw[];
    SharedStorage& shared = *reinterpret_cast<SharedStorage*>(raw);
    if (threadIdx.x == 0) shared.init_barriers(kConsumerWarps, kConsumerWarps);
    __syncthreads();

    const auto consume_role = [&](int index) {
        if (index == 0) consume<true>(params, shared);
        if (index == 1) consume<false>(params, shared);
    };
    run_roles<kConsumers, kProducerRegisters, kConsumerRegisters>([&] { produce_queries(params, shared); }, consume_role);
}
