// From dQ as attend_backward_qkv.cu adds it up, in fp32 and without the scale, to the gradient. A warpgroup takes a query box.
//
// Specialised at compile time: VSA_DTYPE (bf16, half), VSA_HEAD_DIM (64, 128).
#include "vsa/backward.cuh"
#include "vsa/params.cuh"

using namespace kittens;

namespace {

using element = VSA_DTYPE;
constexpr int kHeadDim = VSA_HEAD_DIM;

struct Params {
    const float4* sums;  // [query boxes of all heads, kHeadDim / 8, kWarpgroupThreads]
    element* dq;
    int64_t dq_strides[3];  // batches, heads, tokens
    const float* lse;       // [batch, heads, q_len], NaN where a query names a key block that does not exist
    TokenLayout queries;
    int heads, num_blocks, q_len;
    float scale;
};
VSA_CHECK_PARAMS;

}  // namespace

extern "C" __global__ void __launch_bounds__(kWarpgroupThreads) store_dq(const __grid_constant__ Params params) {
    const TokenLayout& queries = params.queries;
    const int box_of_head = blockIdx.x % (params.num_blocks * queries.boxes.value);
    const int bh = blockIdx.x / (params.num_blocks * queries.boxes.value);
    const int batch = bh / params.heads, head = bh - batch * params.heads;
    const int block = queries.boxes.quotient(box_of_head), box = box_of_head - block * queries.boxes.value;
    const OutputRows rows(queries, params.heads, batch, head, block, box, origin_of_box(queries, block, box),
                          first_place_of(queries, block, box));
    const float4* sums = params.sums + int64_t(blockIdx.x) * (kHeadDim / 8 * kWarpgroupThreads) + threadIdx.x;
    rt_fl<16, kHeadDim> dq;
#pragma unroll
    for (int i = 0; i < kHeadDim / 8; ++i) {
        const float4 four = sums[i * kWarpgroupThreads];
        dq.data[4 * i] = four.x, dq.data[4 * i + 1] = four.y, dq.data[4 * i + 2] = four.z, dq.data[4 * i + 3] = four.w;
    }
    col_vec factor;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const float lse = rows.valid[i] ? params.lse[rows.bh * params.q_len + rows.token[i]] : 0.0f;
        factor[i] = lse == lse ? params.scale : not_a_number();
    }
    mul_row(dq, factor);
    store_gradient(params.dq, params.dq_strides, rows, 1.0f, dq);
}
