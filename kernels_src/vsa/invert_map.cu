// The inverse of a map of blocks as bits: which query blocks name each key block.
//
// A thread block takes 32 query blocks of a head, whose rows set their bits in one word of every key block. Bits do not depend
// on the order in which they are set.
#include "vsa/block_index.cuh"
#include "vsa/params.cuh"

using namespace kittens;

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpThreads;
constexpr int kWordBits = 32;
// Key blocks whose words are made at a time.
constexpr int kSlice = VSA_SLICE;

struct Params {
    IndexTable rows;
    uint32_t* bits;  // [heads, num_words, num_cols], as IndexBits has them
    int num_words;
};
VSA_CHECK_PARAMS;

struct SharedStorage {
    uint32_t words[kSlice];
};
static_assert(sizeof(SharedStorage) == VSA_SMEM_BYTES, "the host launches with other shared memory");

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads) invert_map(const __grid_constant__ Params params) {
    extern __shared__ __align__(128) uint8_t raw[];
    SharedStorage& shared = *reinterpret_cast<SharedStorage*>(raw);
    const IndexTable& rows = params.rows;
    const int head = blockIdx.x / params.num_words, word = blockIdx.x - head * params.num_words;
    uint32_t* bits = params.bits + int64_t(blockIdx.x) * rows.num_cols;
    for (int first = 0; first < rows.num_cols; first += kSlice) {
        for (int i = threadIdx.x; i < min(kSlice, rows.num_cols - first); i += kThreads) shared.words[i] = 0;
        __syncthreads();
        for (int bit = warpid(); bit < kWordBits && word * kWordBits + bit < rows.num_rows; bit += kWarps) {
            const int row = word * kWordBits + bit, length = rows.length(head, row);
            const int* entries = rows.row(head, row);
            for (int i = laneid(); i < length; i += kWarpThreads) {
                const uint32_t col = entries[i] - first;
                if (col < kSlice) atomicOr(&shared.words[col], 1u << bit);
            }
        }
        __syncthreads();
        for (int i = threadIdx.x; i < min(kSlice, rows.num_cols - first); i += kThreads) bits[first + i] = shared.words[i];
        __syncthreads();
    }
}
