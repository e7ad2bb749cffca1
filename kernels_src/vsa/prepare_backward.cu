// What the backward needs of every query, and the gradients of the coarse output and its gate, in one pass over dO:
//
//   delta = Σ dO ∘ O − dlse,   dgate = dO ∘ out_c,   dout_c = Σ over the block's queries of gate ∘ dO
//
// A thread block takes one query block.
//
// Specialised at compile time: VSA_DTYPE (bf16, half), VSA_HEAD_DIM (64, 128).
#include "vsa/backward.cuh"
#include "vsa/params.cuh"

using namespace kittens;

namespace {

using element = VSA_DTYPE;
constexpr int kHeadDim = VSA_HEAD_DIM;
constexpr int kWarps = 4;

// A lane reads 16 bytes of a token; one load of a warp covers kRows tokens.
constexpr int kVector = 16 / sizeof(element);
constexpr int kLanesPerToken = kHeadDim / kVector;
constexpr int kRows = kWarpThreads / kLanesPerToken;

struct Params {
    const element *dout, *out_s;
    int64_t dout_strides[3], out_s_strides[3];  // batches, heads, tokens
    const float *lse, *dlse;                    // [batch, heads, q_len]; dlse may be null
    RowStatistics* statistics;                  // [batch, heads, query boxes, kStatisticsPerBox]
    int* counters;                              // of both passes, which begin at 0, see Schedule::taken
    CoarseOutput coarse;
    void* dgate;  // of the gate's dtype, or null
    int64_t dgate_strides[3];
    float* dout_c;  // like out_c
    TokenLayout queries;
    int heads, num_blocks, q_len;
    float shift_factor, delta_factor;  // see RowStatistics
};
VSA_CHECK_PARAMS;

struct SharedStorage {
    float dout_c[kWarps][kHeadDim];
};
static_assert(sizeof(SharedStorage) == VSA_SMEM_BYTES, "the host launches with other shared memory");

struct Row {
    float data[kVector];
};

__device__ __forceinline__ Row load_row(const element* source) {
    const uint4 words = *reinterpret_cast<const uint4*>(source);
    const uint32_t word[4] = {words.x, words.y, words.z, words.w};
    Row row;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 pair = unpack<element>(word[i]);
        row.data[2 * i] = pair.x;
        row.data[2 * i + 1] = pair.y;
    }
    return row;
}

__device__ __forceinline__ void store_dgate(const Params& params, int64_t offset, const Row& row) {
    if (params.coarse.gate_is_fp32) {
        float4* out = reinterpret_cast<float4*>(static_cast<float*>(params.dgate) + offset);
#pragma unroll
        for (int i = 0; i < kVector; i += 4) out[i / 4] = {row.data[i], row.data[i + 1], row.data[i + 2], row.data[i + 3]};
    } else {
        uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) words[i] = pack<element>(row.data[2 * i], row.data[2 * i + 1]);
        *reinterpret_cast<uint4*>(static_cast<element*>(params.dgate) + offset) = {words[0], words[1], words[2], words[3]};
    }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kWarps* kWarpThreads) prepare_backward(const __grid_constant__ Params params) {
    extern __shared__ __align__(128) uint8_t raw[];
    SharedStorage& shared = *reinterpret_cast<SharedStorage*>(raw);
    const TokenLayout& queries = params.queries;
    const int block = blockIdx.x % params.num_blocks, bh = blockIdx.x / params.num_blocks;
    const int batch = bh / params.heads, head = bh - batch * params.heads;
    const int warp = warpid(), channel = laneid() % kLanesPerToken * kVector;
    const auto offset_of = [&](const int64_t (&strides)[3], int token) {
        return batch * strides[0] + head * strides[1] + token * strides[2] + channel;
    };
    if (blockIdx.x == 0 && threadIdx.x < 2) params.counters[threadIdx.x] = 0;
    const bool has_coarse = params.coarse.out_c != nullptr;
    Row out_c = {}, dout_c = {};
    if (has_coarse) {
        const float* source = params.coarse.out_c + int64_t(blockIdx.x) * kHeadDim + channel;
#pragma unroll
        for (int i = 0; i < kVector; ++i) out_c.data[i] = source[i];
    }

    for (int box = 0; box < queries.boxes.value; ++box) {
        const Extent3 origin = origin_of_box(queries, block, box);
        const int first = first_place_of(queries, block, box);
        RowStatistics* statistics = params.statistics + (int64_t(blockIdx.x) * queries.boxes.value + box) * kStatisticsPerBox;
#pragma unroll 4
        for (int start = warp * kRows; start < kBoxTokens; start += kWarps * kRows) {
            const int place = start + laneid() / kLanesPerToken, row = (place + kBoxTokens - first) % kBoxTokens;
            const Extent3 inside = position_in_box(queries, row);
            const Extent3 at = {origin.t + inside.t, origin.h + inside.h, origin.w + inside.w};
            const bool exists = at.t < queries.extent.t && at.h < queries.extent.h && at.w < queries.extent.w;
            const bool valid = exists && row + first < kBoxTokens;
            const int token = (at.t * queries.extent.h + at.h) * queries.extent.w + at.w;
            Row dout = {}, out_s = {};
            float lse = -infinity(), dlse = 0.0f;
            if (valid) {
                const int64_t index = int64_t(bh) * params.q_len + token;
                lse = params.lse[index];
                if (params.dlse != nullptr) dlse = params.dlse[index];
                dout = load_row(params.dout + offset_of(params.dout_strides, token));
                out_s = load_row(params.out_s + offset_of(params.out_s_strides, token));
            }
            float delta = 0.0f;
#pragma unroll
            for (int i = 0; i < kVector; ++i) delta += dout.data[i] * out_s.data[i];
#pragma unroll
            for (int lanes = 1; lanes < kLanesPerToken; lanes *= 2) delta += __shfl_xor_sync(kAllLanes, delta, lanes);
            if (channel == 0) {
                statistics[place / 2].shift[place % 2] = (lse == -infinity() ? infinity() : lse) * params.shift_factor;
                statistics[place / 2].delta[place % 2] = (delta - dlse) * params.delta_factor;
            }
            if (!has_coarse) continue;
            if (params.coarse.gate == nullptr) {
#pragma unroll
                for (int i = 0; i < kVector; ++i) dout_c.data[i] += params.coarse.gate_value * dout.data[i];
                continue;
            }
            if (valid) {
                const auto& strides = params.coarse.gate_strides;
                const int64_t gate = batch * strides[0] + head * strides[1] + token * strides[2] + channel * strides[3];
#pragma unroll
                for (int i = 0; i < kVector; ++i)
                    dout_c.data[i] += load_gate<element>(params.coarse, gate + i * strides[3]) * dout.data[i];
            }
            if (exists) {
                Row dgate;
#pragma unroll
                for (int i = 0; i < kVector; ++i) dgate.data[i] = dout.data[i] * out_c.data[i];
                store_dgate(params, offset_of(params.dgate_strides, token), dgate);
            }
        }
    }

    if (!has_coarse) return;
    // The lanes that hold other rows of the same channels add up, then the warps.
#pragma unroll
    for (int step = kLanesPerToken; step < kWarpThreads; step *= 2) {
#pragma unroll
        for (float& x : dout_c.data) x += __shfl_xor_sync(kAllLanes, x, step);
    }
    if (laneid() < kLanesPerToken) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) shared.dout_c[warp][channel + i] = dout_c.data[i];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kHeadDim; i += kWarps * kWarpThreads) {
        float sum = 0.0f;
        for (int other = 0; other < kWarps; ++other) sum += shared.dout_c[other][i];
        params.dout_c[int64_t(blockIdx.x) * kHeadDim + i] = sum;
    }
}
