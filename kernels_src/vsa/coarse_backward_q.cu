// The backward of the attention of block means, by rows: the probabilities and the gradients of scores, which are kept for
// coarse_backward_kv.cu, and dQ. Thread blocks take row tiles in turn, as in coarse_attend.cu.
//
// Specialised at compile time as that, without VSA_REGISTERS.
#include "vsa/coarse_rows.cuh"
#include "vsa/params.cuh"

using namespace kittens;

namespace {

struct Params {
    const float *q, *k, *v, *dout;  // [heads, blocks, kHeadDim]
    float* dq;                      // [heads, num_rows, kHeadDim]
    float *p, *ds;                  // [heads, num_rows, row_floats]
    CoarseProblem problem;
};
VSA_CHECK_PARAMS;

struct SharedStorage {
    union {
        ScoreRing of_scores;
        OutRing of_out;
    };
    ColumnBits eligible;
    TeamSlots slots;
};
static_assert(sizeof(SharedStorage) <= VSA_SMEM_BYTES, "the host launches with less shared memory");

// Makes probabilities of a row of scores, and gradients of scores of those of probabilities. All warps of a team call this.
__device__ __forceinline__ void differentiate_row(const CoarseProblem& problem, SharedStorage& shared, Team& team,
                                                  float* scores, float* dp) {
    RowSoftmax p(problem, {shared.eligible, problem.sizes == nullptr}, team, scores);
    p.store(team, scores);
    float sum = 0.0f;
    p.for_vectors(team, [&](const float (&of_p)[kLaneCols], int i) {
#pragma unroll
        for (int j = 0; j < kLaneCols; ++j) sum += of_p[j] * dp[i * kVectorCols + j * kWarpThreads];
    });
    sum = team.sum(sum);
    p.for_vectors(team, [&](float (&of_p)[kLaneCols], int i) {
#pragma unroll
        for (int j = 0; j < kLaneCols; ++j) of_p[j] *= (dp[i * kVectorCols + j * kWarpThreads] - sum) * problem.scale;
    });
    p.store(team, dp);
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kProductThreads, 1) coarse_backward_q(const __grid_constant__ Params params) {
    extern __shared__ __align__(128) uint8_t raw[];
    SharedStorage& shared = *reinterpret_cast<SharedStorage*>(raw);
    const CoarseProblem& problem = params.problem;
    const int row_floats = problem.row_floats;
    const auto as_it_is = [](float x) { return x; };
    for (int item = blockIdx.x; item < problem.num_items; item += num_thread_blocks()) {
        const int head = item / problem.num_tiles;
        const RowTile tile = problem.tile(item - head * problem.num_tiles);
        const int64_t first_row = int64_t(head) * problem.num_rows + tile.row;
        const int64_t first_col = int64_t(head / problem.group) * problem.num_cols + tile.col;
        const float *k = params.k + first_col * kHeadDim, *v = params.v + first_col * kHeadDim;
        float *p = params.p + first_row * row_floats, *ds = params.ds + first_row * row_floats;
        // All have done with the tile before.
        __syncthreads();
        shared.eligible.set(tile, [&](int col) { return problem.has_tokens(col); });
        compute_scores(problem, shared.of_scores, tile, params.q + first_row * kHeadDim, k, p);
        multiply_means(shared.of_scores, tile, params.dout + first_row * kHeadDim, v, ds, row_floats, as_it_is);
        __syncthreads();

        shared.eligible.count_or_all(tile);
        Team team(shared.slots, tile);
        for (int row = team.first_row(); row < tile.rows(); row += team.row_step()) {
            differentiate_row(problem, shared, team, team.of_lane(p + int64_t(row) * row_floats),
                              team.of_lane(ds + int64_t(row) * row_floats));
        }
        weigh_means(shared.of_out, tile, ds, row_floats, k, params.dq + first_row * kHeadDim, as_it_is);
    }
}
