// Means of the valid tokens of every block of q, k and v, in one launch.
//
// A thread block is one warp and takes one block of tokens: TMA loads it as boxes of 64 tokens, and the warp sums one after
// the other. A multiprocessor holds so many of these warps that the loads of some hide the sums of the others, and hands
// out the blocks as warps end. A sequence is a video of one frame and one row, so that raster, tiled and plain order are
// one kernel: a box is cut from the tensor where it lies, and what lies outside a video arrives as zeros.
//
// Specialised at compile time: VSA_DTYPE (bf16, half), VSA_HEAD_DIM (64, 128).
#include "kittens/instructions.cuh"
#include "kittens/tma.cuh"
#include "vsa/tokens.cuh"

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
    float* mean;        // [batch, heads, num_blocks, kHeadDim]
    const void* sizes;  // valid tokens of each block, or null
    int sizes_are_64_bit;
    int num_items;  // blocks of all heads
    int num_blocks;
    int heads;
    int width;  // tokens along w
    int tiles_w;
    HeadSteps steps;  // in its tensor map
};

struct Params {
    tensor_map maps[3];
    Operand operands[3];
    int frames, height;
    int tiles_h;
    int tile_t, tile_h, tile_w;
    int box_t, box_h, box_w;
    int heads_first;  // neighbouring items are heads of one block, not blocks of one head
};
static_assert(sizeof(Params) == VSA_PARAMS_BYTES, "the host's description of the parameters differs");

struct SharedStorage {
    alignas(128) uint4 box[kBoxTokens][kLanesPerRow];
    semaphore full;
};
static_assert(sizeof(SharedStorage) == VSA_SMEM_BYTES, "the host launches with other shared memory");

}  // namespace

extern "C" __global__ void __launch_bounds__(kWarpThreads) block_means(const __grid_constant__ Params params) {
    // Setup: which block of which operand, and where it lies.
    extern __shared__ __align__(128) uint8_t raw[];
    SharedStorage& shared = *reinterpret_cast<SharedStorage*>(raw);
    const int lane = threadIdx.x;
    if (lane == 0) {
        init_semaphore(shared.full, 1);
        fence_init_semaphores();
    }
    __syncwarp();

    int item = blockIdx.x, which = 0;
    while (item >= params.operands[which].num_items) item -= params.operands[which++].num_items;
    const Operand& operand = params.operands[which];
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
    const int channel = operand.steps.channel(batch, head), outer = operand.steps.outer(batch, head);
    const int row_of_tiles = block / operand.tiles_w;
    const int first_w = block % operand.tiles_w * params.tile_w;
    const int first_h = row_of_tiles % params.tiles_h * params.tile_h;
    const int first_t = row_of_tiles / params.tiles_h * params.tile_t;
    const int tokens_t = min(params.tile_t, params.frames - first_t);
    const int tokens_h = min(params.tile_h, params.height - first_h);
    int tokens_w = min(params.tile_w, operand.width - first_w);
    // Rows past a block's size hold anything; those past the border of a video hold zeros.
    const bool sized = operand.sizes != nullptr;
    if (sized) tokens_w = size_of_block(operand.sizes, operand.sizes_are_64_bit, block, tokens_w);

    const int column = lane % kLanesPerRow, row = lane / kLanesPerRow;
    float sum[kVector] = {};
    auto add = [&](int token) {
        const uint4 words = shared.box[token][column];
        const uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float2 pair = unpack<element>(word[i]);
            sum[2 * i] += pair.x;
            sum[2 * i + 1] += pair.y;
        }
    };

    int phase = 0;
    for (int t = 0; t < tokens_t; t += params.box_t) {
        for (int h = 0; h < tokens_h; h += params.box_h) {
            for (int w = 0; w < tokens_w; w += params.box_w) {
                // Producer
                if (lane == 0) {
                    tma::expect_bytes(shared.full, kBoxBytes);
                    const coordinates at = {{channel, first_w + w, first_h + h, first_t + t, outer}};
                    tma::load_async(shared.box, params.maps[which], at, shared.full);
                }
                // Consumer
                wait(shared.full, phase);
                phase ^= 1;
                const int tokens = sized ? tokens_w - w : kBoxTokens;
                if (tokens >= kBoxTokens) {
#pragma unroll
                    for (int token = 0; token < kBoxTokens; token += kRows) add(token + row);
                } else {
                    for (int token = row; token < tokens; token += kRows) add(token);
                }
                __syncwarp();
            }
        }
    }

    // Epilogue: the lanes that hold other rows of the same channels add up.
#pragma unroll
    for (int step = kLanesPerRow; step < kWarpThreads; step *= 2) {
#pragma unroll
        for (float& s : sum) s += __shfl_xor_sync(0xffffffffu, s, step);
    }
    if (row == 0) {
        const float share = 1.0f / max(tokens_t * tokens_h * tokens_w, 1);
        const int64_t index = (int64_t(batch) * operand.heads + head) * operand.num_blocks + block;
        float4* mean = reinterpret_cast<float4*>(operand.mean + index * kHeadDim + column * kVector);
#pragma unroll
        for (int i = 0; i < kVector; i += 4) {
            mean[i / 4] = {sum[i] * share, sum[i + 1] * share, sum[i + 2] * share, sum[i + 3] * share};
        }
    }
}
