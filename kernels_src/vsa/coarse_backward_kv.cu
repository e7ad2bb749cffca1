// The backward of the attention of block means, by columns: dK and dV, from what coarse_backward_q.cu leaves. Thread blocks
// take tiles of key blocks in turn, of one gradient each.
//
// Specialised at compile time as coarse_attend.cu.
#include "vsa/coarse.cuh"
#include "vsa/params.cuh"

using namespace kittens;

namespace {

struct Params {
    const float *q, *dout;  // [query heads, query blocks, kHeadDim]
    const float *p, *ds;    // [query heads, query blocks, row_floats]
    float *dk, *dv;         // [heads, key blocks, kHeadDim]
    CoarseProblem problem;  // its rows are the key blocks, its columns the query blocks, and its heads those of keys
};
VSA_CHECK_PARAMS;

using Ring = ProductRing<Panel<kTileRows, false>, Panel<kHeadDim, false>>;
static_assert(sizeof(Ring) <= VSA_SMEM_BYTES, "the host launches with less shared memory");

}  // namespace

extern "C" __global__ void __launch_bounds__(kProductThreads, 1) coarse_backward_kv(const __grid_constant__ Params params) {
    extern __shared__ __align__(128) uint8_t raw[];
    Ring& ring = *reinterpret_cast<Ring*>(raw);
    const CoarseProblem& problem = params.problem;
    for (int item = blockIdx.x; item < problem.num_items; item += num_thread_blocks()) {
        const bool is_dv = item % 2 == 1;
        const int head = item / 2 / problem.num_tiles;
        const RowTile tile = problem.tile(item / 2 - head * problem.num_tiles);
        // The query heads that share the keys are parts of a sum.
        const int64_t first_query = int64_t(head) * problem.group * problem.num_cols + tile.col;
        const int64_t queries = problem.num_cols;
        // Rows of scores begin with the first block of their sample.
        const float* scores = (is_dv ? params.p : params.ds) + first_query * problem.row_floats + tile.row - tile.col;
        const Matrix a = {scores, problem.row_floats, tile.cols(), queries * problem.row_floats, 0, tile.rows()};
        const Matrix b = {(is_dv ? params.dout : params.q) + first_query * kHeadDim, kHeadDim, tile.cols(), queries * kHeadDim,
                          0};
        float* means = (is_dv ? params.dv : params.dk) + (int64_t(head) * problem.num_rows + tile.row) * kHeadDim;
        product<true>(ring, a, b, tile.rows(), problem.group, (tile.cols() + kChunk - 1) / kChunk,
                      [&](int, const auto& sum) { store_means(sum, means, tile.rows(), [](float x) { return x; }); });
    }
}
