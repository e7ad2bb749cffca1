// Adds 1 wherever a value of dq is summed up, for every query box that has a token.
#include "vsa/store_dq.cu"

void dq_places(const Params& params) {
    const TokenLayout& queries = params.queries;
    const int boxes_of_head = params.num_blocks * queries.boxes.value;
    const int bh = blockIdx.x / boxes_of_head, box = blockIdx.x % boxes_of_head;
    const int block = box / queries.boxes.value, of_block = box % queries.boxes.value;
    const BoxOrigin origin = origin_of_box(queries, block, of_block);
    if (!has_tokens(queries, block, of_block, origin)) return;
    rt_fl<16, kHeadDim> ones;
    for (float& x : ones.data) x = 1.0f;
    const DqSums sums(queries, box, origin);
    sums.for_each<kHeadDim>(queries,
                            sums.of_lane<kHeadDim>(const_cast<float*>(params.sums) + int64_t(bh) * params.q_len * kHeadDim), 0,
                            ones, [](float* address, auto... values) { add_to(address, values...); });
}
