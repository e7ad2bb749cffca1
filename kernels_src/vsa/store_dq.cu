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
    const float* sums;  // [batch, heads, q_len, kHeadDim], see DqSums
    GradientTensor<element> dq;
    const float* lse;       // [batch, heads, q_len], NaN where a query names a key block that does not exist
    TokenLayout queries;
    int heads, num_blocks, q_len;
    float scale;
};
VSA_CHECK_PARAMS;

struct Load {
    __device__ __forceinline__ void operator()(const float* address, float& a, float& b) const {
        const float2 pair = *reinterpret_cast<const float2*>(address);
        a = pair.x, b = pair.y;
    }
    __device__ __forceinline__ void operator()(const float* address, float& a, float& b, float& c, float& d) const {
        const float4 four = *reinterpret_cast<const float4*>(address);
        a = four.x, b = four.y, c = four.z, d = four.w;
    }
};

}  // namespace

extern "C" __global__ void __launch_bounds__(kWarpgroupThreads, 1) store_dq(const __grid_constant__ Params params) {
    const TokenLayout& queries = params.queries;
    const int box_of_head = blockIdx.x % (params.num_blocks * queries.boxes.value);
    const int bh = blockIdx.x / (params.num_blocks * queries.boxes.value);
    const int batch = bh / params.heads, head = bh - batch * params.heads;
    const int block = queries.boxes.quotient(box_of_head), box = box_of_head - block * queries.boxes.value;
    const BoxOrigin origin = origin_of_box(queries, block, box);
    if (!has_tokens(queries, block, box, origin)) return;
    const OutputRows rows(queries, params.heads, batch, head, block, box, origin, first_place_of(queries, block, box));
    rt_fl<16, kHeadDim> dq;
    zero(dq);
    const DqSums sums(queries, box_of_head, origin);
    sums.for_each<kHeadDim>(queries, sums.of_lane<kHeadDim>(params.sums + rows.bh * params.q_len * kHeadDim), 0, dq, Load());
    col_vec factor;
    bool has_keys[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const float lse = rows.valid[i] ? params.lse[rows.bh * params.q_len + rows.token[i]] : 0.0f;
        factor[i] = lse == lse ? params.scale : not_a_number();
        has_keys[i] = lse != -infinity();
    }
    // Without keys nothing is summed up, whatever probabilities that are 0 were multiplied by.
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) dq.data[i] = has_keys[row_of(i)] ? dq.data[i] * factor[row_of(i)] : 0.0f;
    store_gradient(params.dq, queries, params.num_blocks, rows, 1.0f, dq);
}
