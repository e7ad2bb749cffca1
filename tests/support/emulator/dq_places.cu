// Adds 1 wherever a value of dq is summed up, for every query box that has a token.
#include "vsa/store_dq.cu"

void dq_places(const Params& params) {
    const TokenLayout& queries = params.queries;
    const int boxes_of_head = params.num_blocks * queries.boxes.value;
    const int bh = blockIdx.x / boxes_of_head, box = blockIdx.x % boxes_of_head;
    const Extent3 origin = origin_of_box(queries, box / queries.boxes.value, box % queries.boxes.value);
    const Extent3 extent = extent_of_box(queries, origin);
    if (extent.t <= 0 || extent.h <= 0 || extent.w <= 0) return;
    rt_fl<16, kHeadDim> ones;
    for (float& x : ones.data) x = 1.0f;
    const DqSums sums(queries, origin);
    sums.for_each<kHeadDim>(queries,
                            sums.of_lane<kHeadDim>(const_cast<float*>(params.sums) + int64_t(bh) * params.q_len * kHeadDim), 0,
                            ones, [](float* address, auto... values) { add_to(address, values...); });
}
