// Sorts the rows of an inverse map by length, the longest first, so that the last work tiles of a launch are short. Rows of
// nearly the same length stay in order: a counting sort by class of length.
//
// A thread block takes the rows of one head.
#include "vsa/block_index.cuh"
#include "vsa/params.cuh"

using namespace kittens;

namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / kWarpThreads;
constexpr int kClasses = 256;

struct Params {
    IndexBits rows;
    int* order;        // as IndexBits has it
    uint8_t* classes;  // [heads of rows, num_rows], for the rows' classes
};
VSA_CHECK_PARAMS;

struct SharedStorage {
    int count[kClasses], start[kClasses];  // rows of a class, and where they begin
};
static_assert(sizeof(SharedStorage) == VSA_SMEM_BYTES, "the host launches with other shared memory");

// 0 for an empty row, and a higher one for a longer one: below kClasses for what 26 bits count.
__device__ __forceinline__ int class_of(int length) {
    return length == 0 ? 0 : length_class_of(length) - length_class_of(1) + 1;
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads) order_rows(const __grid_constant__ Params params) {
    extern __shared__ __align__(128) uint8_t raw[];
    SharedStorage& shared = *reinterpret_cast<SharedStorage*>(raw);
    const IndexBits& rows = params.rows;
    const int head = blockIdx.x, lane = laneid();
    uint8_t* classes = params.classes + int64_t(head) * rows.num_rows;
    int* order = params.order + int64_t(head) * rows.num_rows;
    if (threadIdx.x < kClasses) shared.count[threadIdx.x] = 0;
    __syncthreads();
    for (int row = threadIdx.x; row < rows.num_rows; row += kThreads) {
        int length = 0;
        for (int part = 0; part < rows.group; ++part) {
#pragma unroll 8
            for (int i = 0; i < rows.num_words; ++i) length += __popc(rows.word(head * rows.group + part, row, i));
        }
        const int of_row = class_of(length);
        classes[row] = of_row;
        atomicAdd(&shared.count[of_row], 1);
    }
    __syncthreads();
    if (warpid() == 0) {
        // Each lane takes some classes, from the longest rows on.
        constexpr int kOfLane = kClasses / kWarpThreads;
        const int longest = kClasses - 1 - lane * kOfLane;
        uint32_t end[1] = {0};
        for (int i = 0; i < kOfLane; ++i) end[0] += shared.count[longest - i];
        uint32_t start = -end[0];
        prefix_sums(end);
        start += end[0];
        for (int i = 0; i < kOfLane; ++i) {
            shared.start[longest - i] = start;
            start += shared.count[longest - i];
        }
    }
    __syncthreads();
    for (int of_warp = warpid(); of_warp < kClasses; of_warp += kWarps) {
        int next = shared.start[of_warp];
        const int end = next + shared.count[of_warp];
        for (int first = 0; next < end; first += kWarpThreads) {
            const int row = first + lane;
            const bool is_of_class = row < rows.num_rows && classes[row] == of_warp;
            const uint32_t lanes = __ballot_sync(kAllLanes, is_of_class);
            if (is_of_class) order[next + __popc(lanes & ((1u << lane) - 1))] = row;
            next += __popc(lanes);
        }
    }
}
