// Means of the valid tokens of every block of q, k and v, in one launch.
//
// Persistent thread blocks take a block of tokens for each of kConsumers warps at a time. One more warp loads their boxes into
// a ring of stages, a box for each consumer in turn. The launch after it may start beside it at once, and learns from a counter
// when those of q and k are there.
//
// Specialised at compile time: VSA_DTYPE (bf16, half), VSA_HEAD_DIM (64, 128), VSA_CONSUMERS, VSA_STAGES, a multiple of
// that, and VSA_REGISTERS of a thread.
#include "kittens/grid.cuh"
#include "kittens/instructions.cuh"
#include "vsa/params.cuh"
#include "vsa/pipeline.cuh"

using namespace kittens;

namespace {

using element = VSA_DTYPE;
constexpr int kHeadDim = VSA_HEAD_DIM;
constexpr int kConsumers = VSA_CONSUMERS;
constexpr int kStages = VSA_STAGES;
// A stage is read by the same consumer every time: another one would not have seen its phases.
static_assert(kStages % kConsumers == 0);
constexpr int kBoxBytes = kBoxTokens * kHeadDim * sizeof(element);

// A lane reads 16 bytes of a token; one load of the warp covers kRows tokens.
constexpr int kVector = 16 / sizeof(element);
constexpr int kLanesPerRow = kHeadDim / kVector;
constexpr int kRows = kWarpThreads / kLanesPerRow;

// One of q, k and v.
struct Operand {
    TokenTensor tensor;
    float* mean;  // [batch, heads, num_blocks, kHeadDim]
    int num_items;  // blocks of all heads, 0 where the operand is missing
    int num_blocks, heads;
};

struct Params {
    Operand operands[3];
    TokenLayout layouts[2];  // of q, and of k and v
    int* done;  // null, or counts the consumers that have stored all of their means of q and k
    int heads_first;  // consecutive items are heads of one block, not blocks of one head
};

VSA_CHECK_PARAMS;

// What a consumer is told of a box.
struct BoxInfo {
    float* mean;  // of its block, null: there is no block
    int count;  // its valid tokens
    int rows;  // it has none from there on
    int is_last;  // this is the last block of q or k that the consumer takes
};

struct SharedStorage {
    alignas(128) uint4 boxes[kStages][kBoxTokens][kLanesPerRow];
    BoxInfo info[kStages];
    StageBarriers<kStages> barriers;
};
static_assert(sizeof(SharedStorage) <= VSA_SMEM_BYTES, "the host launches with less shared memory");

// A block of tokens of one head of q, k or v.
struct Item {
    int which;  // of the operands; 3: there are no more items
    int batch, head, block;

    __device__ __forceinline__ Item(const Params& params, int number) : which(0) {
        while (which < 3 && number >= params.operands[which].num_items) number -= params.operands[which++].num_items;
        if (which == 3) return;
        const int heads = params.operands[which].heads, num_blocks = params.operands[which].num_blocks;
        if (params.heads_first) {
            head = number % heads;
            block = number / heads % num_blocks;
        } else {
            block = number % num_blocks;
            head = number / num_blocks % heads;
        }
        batch = number / (heads * num_blocks);
    }
};

// The warp that loads. A lane finds out all that is to be known of one of the next boxes; then lanes load their boxes in turn.
__device__ __forceinline__ void load_boxes(const Params& params, SharedStorage& shared, int num_boxes) {
    acquire_maps(params.operands[0].tensor, params.operands[1].tensor, params.operands[2].tensor);
    const int lane = laneid(), boxes = params.layouts[0].boxes.value;
    for (int first = 0; first < num_boxes; first += kWarpThreads) {
        const int own = (first + lane) / kConsumers, consumer = (first + lane) % kConsumers;
        const int round = own / boxes, box = own % boxes;
        const int number = blockIdx.x + (round * kConsumers + consumer) * num_thread_blocks();
        const Item item(params, number);
        BoxInfo info = {};
        BoxOrigin origin = {};
        if (item.which < 3) {
            const Operand& operand = params.operands[item.which];
            const TokenLayout& layout = params.layouts[item.which > 0];
            origin = origin_of_box(layout, item.block, box);
            // Rows past a block's size hold anything, and those outside a video or a segment arrive as zeros.
            const BoxTokens tokens(layout, item.block, box, origin);
            const int64_t index = (int64_t(item.batch) * operand.heads + item.head) * operand.num_blocks + item.block;
            const int of_q_and_k = params.operands[0].num_items + params.operands[1].num_items;
            const bool is_last = item.which < 2 && number + kConsumers * num_thread_blocks() >= of_q_and_k;
            info = {operand.mean + index * kHeadDim, tokens.count(layout), tokens.end(layout), is_last};
        }
        const int count = min(kWarpThreads, num_boxes - first);
        for (int i = 0; i < count; ++i) {
            const PipelineState<kStages> state(first + i);
            wait(shared.barriers.empty[state.index], state.phase ^ 1);
            // Every lane has seen the phase before the load can lead to the next one.
            __syncwarp();
            if (lane != i) continue;
            semaphore& full = shared.barriers.full[state.index];
            shared.info[state.index] = info;
            if (info.count == 0) {
                arrive(full);
            } else {
                const TokenTensor& tensor = params.operands[item.which].tensor;
                tma::expect_bytes(full, kBoxBytes);
                tma::load_async(shared.boxes[state.index], tensor.map_of(origin), tensor.at(item.batch, item.head, origin),
                                full);
            }
        }
    }
}

// Adds the rows of a box to the sums of this lane's channels.
__device__ __forceinline__ void add_rows(float (&sum)[kVector], const uint4 (&box)[kBoxTokens][kLanesPerRow], int rows) {
    const int column = laneid() % kLanesPerRow, row = laneid() / kLanesPerRow;
    const auto add = [&](int token) {
        const uint4 words = box[token][column];
        const uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float2 pair = unpack<element>(word[i]);
            sum[2 * i] += pair.x;
            sum[2 * i + 1] += pair.y;
        }
    };
    if (rows == kBoxTokens) {
#pragma unroll
        for (int token = 0; token < kBoxTokens; token += kRows) add(token + row);
    } else {
#pragma unroll 1
        for (int token = row; token < rows; token += kRows) add(token);
    }
}

__device__ __forceinline__ void store_mean(float* mean, float (&sum)[kVector], int count) {
    // The lanes that hold other rows of the same channels add up.
#pragma unroll
    for (int step = kLanesPerRow; step < kWarpThreads; step *= 2) {
#pragma unroll
        for (float& s : sum) s += __shfl_xor_sync(kAllLanes, s, step);
    }
    if (laneid() >= kLanesPerRow) return;
    const float share = 1.0f / max(count, 1);
    float4* out = reinterpret_cast<float4*>(mean + laneid() * kVector);
#pragma unroll
    for (int i = 0; i < kVector; i += 4) {
        out[i / 4] = {sum[i] * share, sum[i + 1] * share, sum[i + 2] * share, sum[i + 3] * share};
    }
}

__device__ __forceinline__ void consume(const Params& params, SharedStorage& shared, int consumer, int num_boxes) {
    for (int number = consumer; number < num_boxes;) {
        float sum[kVector] = {};
        float* mean = nullptr;
        int count = 0, is_last = 0;
        for (int box = 0; box < params.layouts[0].boxes.value; ++box, number += kConsumers) {
            const PipelineState<kStages> state(number);
            wait(shared.barriers.full[state.index], state.phase);
            const BoxInfo info = shared.info[state.index];
            if (info.count > 0) add_rows(sum, shared.boxes[state.index], info.rows);
            __syncwarp();
            release(shared.barriers.empty[state.index]);
            mean = info.mean;
            count += info.count;
            is_last = info.is_last;
        }
        if (mean != nullptr) store_mean(mean, sum, count);
        if (is_last && params.done != nullptr) {
            __syncwarp();
            if (laneid() == 0) arrive_at(params.done);
        }
    }
}

}  // namespace

extern "C" __global__ void __maxnreg__(VSA_REGISTERS) block_means(const __grid_constant__ Params params) {
    extern __shared__ __align__(128) uint8_t raw[];
    SharedStorage& shared = *reinterpret_cast<SharedStorage*>(raw);
    if (threadIdx.x == 0) {
        init_stage_barriers(shared.barriers, 1, 1);
        fence_init_semaphores();
    }
    __syncthreads();
    let_next_launch_start();

    int num_items = 0;
    for (const Operand& operand : params.operands) num_items += operand.num_items;
    const int items_per_round = num_thread_blocks() * kConsumers;
    // Rounded up.
    const int rounds = (num_items - int(blockIdx.x) + items_per_round - 1) / items_per_round;
    const int num_boxes = rounds * params.layouts[0].boxes.value * kConsumers;
    if (warpid() == kConsumers) {
        load_boxes(params, shared, num_boxes);
    } else {
        consume(params, shared, warpid(), num_boxes);
    }
}
