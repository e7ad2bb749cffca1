// Means of the valid tokens of every block of q, k and v, in one launch.
//
// A thread block is one warp and takes one block of tokens: TMA loads its boxes one after the other, and the warp sums them. A
// multiprocessor holds so many of these warps that the loads of some overlap with the sums of others.
//
// Specialised at compile time: VSA_DTYPE (bf16, half), VSA_HEAD_DIM (64, 128).
#include "kittens/instructions.cuh"
#include "vsa/layout.cuh"
#include "vsa/params.cuh"

using namespace kittens;

namespace {

using element = VSA_DTYPE;
constexpr int kHeadDim = VSA_HEAD_DIM;
constexpr int kBoxBytes = kBoxTokens * kHeadDim * sizeof(element);

// A lane reads 16 bytes of a token; one load of the warp covers kRows tokens.
constexpr int kVector = 16 / sizeof(element);
constexpr int kLanesPerRow = kHeadDim / kVector;
constexpr int kRows = kWarpThreads / kLanesPerRow;

// One of q, k and v.
struct Operand {
    TokenTensor tensor;
    float* mean;    // [batch, heads, num_blocks, kHeadDim]
    int num_items;  // blocks of all heads, 0 where the operand is missing
    int num_blocks, heads;
};

struct Params {
    Operand operands[3];
    TokenLayout layouts[2];  // of q, and of k and v
    int heads_first;         // consecutive items are heads of one block, not blocks of one head
};

VSA_CHECK_PARAMS;

struct SharedStorage {
    alignas(128) uint4 box[kBoxTokens][kLanesPerRow];
    semaphore full;
};
static_assert(sizeof(SharedStorage) == VSA_SMEM_BYTES, "the host launches with other shared memory");

}  // namespace

extern "C" __global__ void __launch_bounds__(kWarpThreads) block_means(const __grid_constant__ Params params) {
    extern __shared__ __align__(128) uint8_t raw[];
    SharedStorage& shared = *reinterpret_cast<SharedStorage*>(raw);
    const int lane = threadIdx.x;
    if (lane == 0) {
        init_semaphore(shared.full, 1);
        fence_init_semaphores();
    }
    __syncwarp();

    // Which block of which operand
    int item = blockIdx.x, which = 0;
    while (item >= params.operands[which].num_items) item -= params.operands[which++].num_items;
    const Operand& operand = params.operands[which];
    const TokenLayout& layout = params.layouts[which > 0];
    int head, block, batch;
    if (params.heads_first) {
        head = item % operand.heads;
        block = item / operand.heads % operand.num_blocks;
        batch = item / operand.heads / operand.num_blocks;
    } else {
        block = item % operand.num_blocks;
        head = item / operand.num_blocks % operand.heads;
        batch = item / operand.num_blocks / operand.heads;
    }

    const int column = lane % kLanesPerRow, row = lane / kLanesPerRow;
    float sum[kVector] = {};
    const auto add = [&](int token) {
        const uint4 words = shared.box[token][column];
        const uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float2 pair = unpack<element>(word[i]);
            sum[2 * i] += pair.x;
            sum[2 * i + 1] += pair.y;
        }
    };

    if (lane == 0) operand.tensor.acquire_map_of(origin_of_box(layout, block, 0));
    __syncwarp();
    int phase = 0, count = 0;
    for (int box = 0; box < layout.boxes.value; ++box) {
        const BoxOrigin origin = origin_of_box(layout, block, box);
        // Rows past a block's size hold anything, and those outside a video or a segment arrive as zeros.
        const BoxTokens tokens(layout, block, box, origin);
        const int valid = tokens.count(layout), rows = tokens.end(layout);
        if (valid == 0) continue;
        count += valid;
        if (lane == 0) {
            const coordinates from = operand.tensor.at(batch, head, origin);
            const tensor_map& map = operand.tensor.map_of(origin);
            tma::expect_bytes(shared.full, kBoxBytes);
            tma::load_async(shared.box, map, from, shared.full);
        }
        wait(shared.full, phase);
        phase ^= 1;
        if (rows == kBoxTokens) {
#pragma unroll
            for (int token = 0; token < kBoxTokens; token += kRows) add(token + row);
        } else {
            for (int token = row; token < rows; token += kRows) add(token);
        }
        __syncwarp();
    }

    // The lanes that hold other rows of the same channels add up.
#pragma unroll
    for (int step = kLanesPerRow; step < kWarpThreads; step *= 2) {
#pragma unroll
        for (float& s : sum) s += __shfl_xor_sync(kAllLanes, s, step);
    }
    if (row == 0) {
        const float share = 1.0f / max(count, 1);
        const int64_t index = (int64_t(batch) * operand.heads + head) * operand.num_blocks + block;
        float4* mean = reinterpret_cast<float4*>(operand.mean + index * kHeadDim + column * kVector);
#pragma unroll
        for (int i = 0; i < kVector; i += 4) {
            mean[i / 4] = {sum[i] * share, sum[i + 1] * share, sum[i + 2] * share, sum[i + 3] * share};
        }
    }
}
