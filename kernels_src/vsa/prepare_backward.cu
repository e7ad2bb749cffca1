// What the backward needs of every query, and the gradients of the coarse output and its gate, in one pass over dO:
//
//   delta = Σ dO ∘ O − dlse,   dgate = dO ∘ out_c,   dout_c = Σ over the block's queries of gate ∘ dO
//
// A thread block takes one query block. Others, which come first, make the inverse of the map meanwhile.
//
// Specialised at compile time: VSA_DTYPE (bf16, half), VSA_HEAD_DIM (64, 128) and VSA_INVERSE_SLICE.
#include "vsa/backward.cuh"
#include "vsa/invert_map.cuh"
#include "vsa/params.cuh"

using namespace kittens;

namespace {

using element = VSA_DTYPE;
constexpr int kHeadDim = VSA_HEAD_DIM;
constexpr int kWarps = 4;

// A lane takes 16 channels of a token: 32 bytes. The warps of a thread block cover a box in kSteps.
constexpr int kChannels = 16;
constexpr int kVector = 16 / sizeof(element);
constexpr int kLanesPerToken = kHeadDim / kChannels;
constexpr int kRows = kWarpThreads / kLanesPerToken;  // of a warp
constexpr int kSteps = kBoxTokens / (kWarps * kRows);

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
    int is_combined;  // out_s is the output with gate_value times the coarse one added
    Inversion inversion;
    int inversion_blocks;  // thread blocks that take part in it
};
VSA_CHECK_PARAMS;

union SharedStorage {
    float dout_c[kWarps][kHeadDim];
    uint32_t words[VSA_INVERSE_SLICE];
};
static_assert(sizeof(SharedStorage) == VSA_SMEM_BYTES, "the host launches with other shared memory");

struct Row {
    float data[kChannels];
};

// A lane's channels of a token, as they lie in memory.
struct PackedRow {
    uint4 words[kChannels / kVector];

    PackedRow() = default;
    __device__ __forceinline__ explicit PackedRow(const element* source) {
#pragma unroll
        for (int i = 0; i < kChannels / kVector; ++i) words[i] = reinterpret_cast<const uint4*>(source)[i];
    }
    __device__ __forceinline__ Row unpack() const {
        Row row;
#pragma unroll
        for (int i = 0; i < kChannels / kVector; ++i) {
            const uint32_t word[4] = {words[i].x, words[i].y, words[i].z, words[i].w};
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const float2 pair = kittens::unpack<element>(word[j]);
                row.data[i * kVector + 2 * j] = pair.x;
                row.data[i * kVector + 2 * j + 1] = pair.y;
            }
        }
        return row;
    }
};

// A query of a box.
struct Query {
    int place;  // in the order in which tokens arrive, see RowStatistics
    int token;
    bool exists, valid;

    __device__ __forceinline__ Query(const TokenLayout& queries, const BoxTokens& tokens, int first, int place) : place(place) {
        const Token at = tokens(queries, (place + kBoxTokens - first) % kBoxTokens);
        token = at.number;
        exists = at.exists;
        valid = at.valid;
    }
    // A token that exists, whose values are read and not used where this one is not valid: loads without branches overlap.
    __device__ __forceinline__ int readable() const { return valid ? token : 0; }
};

__device__ __forceinline__ void store_dgate(const Params& params, int64_t offset, const Row& row) {
    if (params.coarse.gate_is_fp32) {
        float4* out = reinterpret_cast<float4*>(static_cast<float*>(params.dgate) + offset);
#pragma unroll
        for (int i = 0; i < kChannels; i += 4) {
            out[i / 4] = {row.data[i], row.data[i + 1], row.data[i + 2], row.data[i + 3]};
        }
    } else {
        uint4* out = reinterpret_cast<uint4*>(static_cast<element*>(params.dgate) + offset);
#pragma unroll
        for (int i = 0; i < kChannels; i += kVector) {
            uint32_t word[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) word[j] = pack<element>(row.data[i + 2 * j], row.data[i + 2 * j + 1]);
            out[i / kVector] = {word[0], word[1], word[2], word[3]};
        }
    }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kWarps* kWarpThreads) prepare_backward(const __grid_constant__ Params params) {
    extern __shared__ __align__(128) uint8_t raw[];
    SharedStorage& shared = *reinterpret_cast<SharedStorage*>(raw);
    const int index = int(blockIdx.x) - params.inversion_blocks;
    if (index < 0) {
        invert_rows<kWarps * kWarpThreads>(params.inversion, blockIdx.x, shared.words);
        return;
    }
    const TokenLayout& queries = params.queries;
    const int block = index % params.num_blocks, bh = index / params.num_blocks;
    const int batch = bh / params.heads, head = bh - batch * params.heads;
    const int warp = warpid(), channel = laneid() % kLanesPerToken * kChannels;
    const auto offset_of = [&](const int64_t (&strides)[3], int token) {
        return batch * strides[0] + head * strides[1] + token * strides[2] + channel;
    };
    const bool gate_vectors = has_gate_vectors(params.coarse);
    if (index == 0 && threadIdx.x < 2) params.counters[threadIdx.x] = 0;
    const bool has_coarse = params.coarse.out_c != nullptr;
    Row out_c = {}, dout_c = {};
    if (has_coarse) {
        const float* source = params.coarse.out_c + int64_t(index) * kHeadDim + channel;
#pragma unroll
        for (int i = 0; i < kChannels; ++i) out_c.data[i] = source[i];
    }

    for (int box = 0; box < queries.boxes.value; ++box) {
        const BoxTokens tokens(queries, block, box, origin_of_box(queries, block, box));
        const int first = first_place_of(queries, block, box);
        RowStatistics* statistics = params.statistics + (int64_t(index) * queries.boxes.value + box) * kStatisticsPerBox;
        const auto query_of = [&](int step) {
            return Query(queries, tokens, first, (step * kWarps + warp) * kRows + laneid() / kLanesPerToken);
        };
        PackedRow dout_rows[kSteps], out_rows[kSteps];
        float lse_of[kSteps], dlse_of[kSteps] = {};
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
            const int token = query_of(step).readable();
            dout_rows[step] = PackedRow(params.dout + offset_of(params.dout_strides, token));
            out_rows[step] = PackedRow(params.out_s + offset_of(params.out_s_strides, token));
            lse_of[step] = params.lse[int64_t(bh) * params.q_len + token];
        }
        if (params.dlse != nullptr) {
#pragma unroll
            for (int step = 0; step < kSteps; ++step) {
                dlse_of[step] = params.dlse[int64_t(bh) * params.q_len + query_of(step).readable()];
            }
        }
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
            const Query query = query_of(step);
            Row dout = {}, out_s = {};
            float lse = -infinity(), dlse = 0.0f;
            if (query.valid) {
                lse = lse_of[step];
                dlse = dlse_of[step];
                dout = dout_rows[step].unpack();
                out_s = out_rows[step].unpack();
                if (params.is_combined) {
#pragma unroll
                    for (int i = 0; i < kChannels; ++i) out_s.data[i] -= params.coarse.gate_value * out_c.data[i];
                }
            }
            float delta = 0.0f;
#pragma unroll
            for (int i = 0; i < kChannels; ++i) delta += dout.data[i] * out_s.data[i];
#pragma unroll
            for (int lanes = 1; lanes < kLanesPerToken; lanes *= 2) delta += __shfl_xor_sync(kAllLanes, delta, lanes);
            if (channel == 0) {
                RowStatistics& of_pair = statistics[query.place / 2];
                of_pair.shift[query.place % 2] = (lse == -infinity() ? infinity() : lse) * params.shift_factor;
                of_pair.delta[query.place % 2] = (delta - dlse) * params.delta_factor;
            }
            if (!has_coarse) continue;
            if (params.coarse.gate == nullptr) {
#pragma unroll
                for (int i = 0; i < kChannels; ++i) dout_c.data[i] += params.coarse.gate_value * dout.data[i];
                continue;
            }
            if (query.valid) {
                Row gate;
                const auto& strides = params.coarse.gate_strides;
                const int64_t offset = batch * strides[0] + head * strides[1] + query.token * strides[2] + channel * strides[3];
                if (gate_vectors) {
                    gate = PackedRow(static_cast<const element*>(params.coarse.gate) + offset).unpack();
                } else {
#pragma unroll
                    for (int i = 0; i < kChannels; ++i) {
                        gate.data[i] = load_gate<element>(params.coarse, offset + i * strides[3]);
                    }
                }
#pragma unroll
                for (int i = 0; i < kChannels; ++i) dout_c.data[i] += gate.data[i] * dout.data[i];
            }
            if (query.exists) {
                Row dgate;
#pragma unroll
                for (int i = 0; i < kChannels; ++i) dgate.data[i] = dout.data[i] * out_c.data[i];
                store_dgate(params, offset_of(params.dgate_strides, query.token), dgate);
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
        for (int i = 0; i < kChannels; ++i) shared.dout_c[warp][channel + i] = dout_c.data[i];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kHeadDim; i += kWarps * kWarpThreads) {
        float sum = 0.0f;
        for (int other = 0; other < kWarps; ++other) sum += shared.dout_c[other][i];
        params.dout_c[int64_t(index) * kHeadDim + i] = sum;
    }
}
