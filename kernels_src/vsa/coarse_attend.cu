// Attention of block means, and the key blocks with the highest scores, in one launch.
//
// It starts while the launch before it, of the block means, still runs: scores need those of q and k alone.
//
// Persistent thread blocks take row tiles in turn: up to kTileRows query blocks of one head. Their scores go to memory of the
// thread block's own, which stays in L2. From there each warp takes a row at a time, selects and exponentiates; several warps
// share a long row.
//
// Specialised at compile time: VSA_HEAD_DIM (64, 128), and the sizes that the host knows: VSA_TILE_ROWS, VSA_SCORE_COLS,
// VSA_MAX_COLS, VSA_STAGES and VSA_REGISTERS of a thread.
#include "kittens/grid.cuh"
#include "vsa/coarse_rows.cuh"
#include "vsa/params.cuh"

using namespace kittens;

namespace {

struct Params {
    const float *q, *k, *v;  // [heads, blocks, kHeadDim]; v null: the means are not attended
    float* out;              // [heads, num_rows, kHeadDim]
    int *idx, *num;          // [heads, num_rows, width] and [heads, num_rows]
    float* scores;           // [thread blocks, tile_rows, row_floats]
    const int4* choices;     // [num_rows], see segments.selection_rows; null: all rows select `width` columns
    // The launch before makes the means: q and k are complete when as many have arrived here, or if null when it has ended.
    const int* means_done;
    CoarseProblem problem;
    int width;
    int means_arrivals;
};
VSA_CHECK_PARAMS;

struct SharedStorage {
    union {
        ScoreRing of_scores;
        OutRing of_out;
    };
    ColumnBits eligible;  // columns that may be selected
    ColumnBits forced;  // those that every row takes
    TeamSlots slots;
};
static_assert(sizeof(SharedStorage) <= VSA_SMEM_BYTES, "the host launches with less shared memory");

// The keys of a row: 0 of columns that do not count, ~0u of those that every row takes.
struct RowKeys : RowPart<uint32_t> {
    uint32_t least, most;  // of the whole row's scores
    float sum, squares;  // of this lane's

    // All warps of a team call this. `forced` may be null.
    __device__ __forceinline__ RowKeys(const ColumnFilter& filter, const ColumnBits* forced, Team& team, const float* of_lane)
        : least(~0u), most(0), sum(0.0f), squares(0.0f) {
        load(team, reinterpret_cast<const uint32_t*>(of_lane));
        for_vectors(team, [&](uint32_t (&vector)[kLaneCols], int i) {
#pragma unroll
            for (uint32_t& key : vector) {
                const float score = __uint_as_float(key);
                sum += score;
                squares += score * score;
                key = key_of(score);
            }
            filter.leave_out(team, i, [&](int j) { vector[j] = 0; });
#pragma unroll
            for (uint32_t key : vector) {
                // One less, so that those that do not count come last.
                least = min(least, key - 1);
                most = max(most, key);
            }
            if (forced == nullptr) return;
#pragma unroll
            for (int j = 0; j < kLaneCols; ++j) {
                const bool is_forced = vector[j] != 0 && forced->has(team.first_vector + i, j);
                vector[j] = is_forced ? ~0u : min(vector[j], ~1u);
            }
        });
        least = team.least(least) + 1;
        // The highest key is that of a NaN, too.
        if (forced != nullptr) least = min(least, ~1u);
        most = forced != nullptr ? ~0u : team.most(most);
    }

    // How many are at least as high, of the whole row.
    __device__ __forceinline__ int reach(Team& team, uint32_t threshold) {
        int count = 0;
        for_each(team, [&](uint32_t key) { count_at_least(count, key, threshold); });
        return team.sum(count);
    }

    // A guess of the score that `wanted` of `count` exceed, as if those of all columns were normally distributed.
    __device__ __forceinline__ float guess_threshold(Team& team, int cols, int count, int wanted) const {
        const float mean = team.sum(sum) * reciprocal(cols);
        const float variance = max(0.0f, team.sum(squares) * reciprocal(cols) - mean * mean);
        const float deviation = kittens::exp2(0.5f * kittens::log2(variance));
        // The quantile of a logistic distribution is almost that of a normal one, and simple.
        return mean + 0.407f * kittens::log2(float(count - wanted) * reciprocal(wanted)) * deviation;
    }
};

// Of the keys that equal it, the first `ties` columns are selected, and all that are higher.
struct Threshold {
    uint32_t key;
    int ties;
};

// The threshold by which `wanted` of `count` keys are selected.
__device__ __forceinline__ Threshold find_threshold(RowKeys& keys, Team& team, int cols, int count, int wanted) {
    // Interpolating takes few steps where scores are spread evenly, halving the range of keys never more than 32.
    constexpr int kScoreSteps = 16, kHalving = 4;
    uint32_t low = keys.least, high = keys.most;
    int above = 0;  // how many are higher than `high`
    if (count == wanted) return {low, kMaxCoarseCols};
    float guess = keys.guess_threshold(team, cols, count, wanted);
    for (int step = 1; count != wanted && low < high; ++step) {
        uint32_t middle = key_of(guess);
        if (step > kScoreSteps || middle <= low || middle > high) middle = low + (high - low + 1) / 2;
        const int reached = keys.reach(team, middle);
        if (reached >= wanted) {
            low = middle;
            count = reached;
        } else {
            high = middle - 1;
            above = reached;
        }
        const float part = step % kHalving == 0 ? 0.5f : float(count - wanted) * reciprocal(float(count - above));
        guess = score_of(low) * (1.0f - part) + score_of(high) * part;
    }
    if (count == wanted) return {low, kMaxCoarseCols};
    // Several keys equal the lowest that is selected. No key is above the highest number.
    return {low, wanted - (low == ~0u ? 0 : keys.reach(team, low + 1))};
}

// Writes the selected columns of a row in ascending order.
__device__ __forceinline__ void store_selected(RowKeys& keys, Team& team, Threshold threshold, int first_col, int* idx) {
    // Each lane has one word, with the bits of 32 columns.
    static_assert(kWarpVectors * kLaneCols == kWarpThreads);
    const auto bits_of = [&](uint32_t least) {
        uint32_t own = 0;
        keys.for_vectors(team, [&](const uint32_t (&vector)[kLaneCols], int i) {
#pragma unroll
            for (int j = 0; j < kLaneCols; ++j) {
                const uint32_t bits = __ballot_sync(kAllLanes, vector[j] >= least);
                if (laneid() == i * kLaneCols + j) own = bits;
            }
        });
        return own;
    };
    // How many bits the lanes before have, those of the warps before included.
    const auto bits_before = [&](uint32_t own) -> int {
        uint32_t up_to_own[1] = {uint32_t(__popc(own))};
        prefix_sums(up_to_own);
        return up_to_own[0] - __popc(own) + team.before(__shfl_sync(kAllLanes, up_to_own[0], kWarpThreads - 1));
    };
    uint32_t selected = bits_of(threshold.key);
    if (threshold.ties < kMaxCoarseCols) {
        const uint32_t above = threshold.key < ~0u ? bits_of(threshold.key + 1) : 0;
        uint32_t equal = selected & ~above;
        const int taken = threshold.ties - bits_before(equal);
        while (equal != 0 && __popc(equal) > taken) equal ^= 0x80000000u >> __clz(equal);
        selected = above | equal;
        __syncwarp();
    }
    int place = bits_before(selected);
    first_col += team.first_vector * kVectorCols + laneid() * kWarpThreads;
    for (; selected != 0; selected &= selected - 1) idx[place++] = first_col + __ffs(selected) - 1;
    __syncwarp();
}

// Selects the columns of a row and makes its probabilities. All warps of a team call this.
__device__ __forceinline__ void attend_row(const Params& params, SharedStorage& shared, const RowTile& tile, Team& team,
                                           int row, int64_t row_of_all, int num_eligible, float* scores) {
    const CoarseProblem& problem = params.problem;
    const int4* choices = params.choices;
    const int num = choices == nullptr ? params.width : choices[tile.row + row].z;
    const int wanted = min(num_eligible, max(0, min(num, params.width)));
    int* idx = params.idx + row_of_all * params.width;
    const ColumnFilter filter = {shared.eligible, problem.sizes == nullptr};
    if (wanted > 0) {
        RowKeys keys(filter, choices == nullptr ? nullptr : &shared.forced, team, scores);
        store_selected(keys, team, find_threshold(keys, team, tile.cols(), num_eligible, wanted), tile.col, idx);
    }
    // A row that attends all of its sample names the first column alone.
    for (int i = wanted + team.rank * kWarpThreads + laneid(); i < params.width; i += team.warps * kWarpThreads) {
        idx[i] = num < 0 && i == 0 ? tile.col : 0;
    }
    if (team.rank == 0 && laneid() == 0) params.num[row_of_all] = num < 0 ? num : wanted;
    if (params.v != nullptr) RowSoftmax(problem, filter, team, scores).store(team, scores);
}

}  // namespace

extern "C" __global__ void __maxnreg__(VSA_REGISTERS) coarse_attend(const __grid_constant__ Params params) {
    extern __shared__ __align__(128) uint8_t raw[];
    SharedStorage& shared = *reinterpret_cast<SharedStorage*>(raw);
    const CoarseProblem& problem = params.problem;
    const int row_floats = problem.row_floats;
    let_next_launch_start();
    if (params.means_done == nullptr) {
        wait_for_launch_before();
    } else {
        if (threadIdx.x == 0) wait_for(params.means_done, params.means_arrivals);
        __syncthreads();
    }
    float* scores = params.scores + int64_t(blockIdx.x) * problem.tile_rows * row_floats;
    for (int item = blockIdx.x; item < problem.num_items; item += num_thread_blocks()) {
        const int head = item / problem.num_tiles;
        const RowTile tile = problem.tile(item - head * problem.num_tiles);
        const int64_t first_row = int64_t(head) * problem.num_rows + tile.row;
        const int64_t first_col = int64_t(head / problem.group) * problem.num_cols + tile.col;
        // All have done with the tile before: without means of v no product has met since its rows were selected.
        __syncthreads();
        shared.eligible.set(tile, [&](int col) { return problem.has_tokens(col); });
        if (params.choices != nullptr) shared.forced.set(tile, [&](int col) { return params.choices[col].w != 0; });

        compute_scores(problem, shared.of_scores, tile, params.q + first_row * kHeadDim, params.k + first_col * kHeadDim,
                       scores);
        __syncthreads();

        const int num_eligible = shared.eligible.count_or_all(tile);
        Team team(shared.slots, tile);
        for (int row = team.first_row(); row < tile.rows(); row += team.row_step()) {
            attend_row(params, shared, tile, team, row, first_row + row, num_eligible,
                       team.of_lane(scores + int64_t(row) * row_floats));
        }
        // Now v is complete, too.
        wait_for_launch_before();
        if (params.v == nullptr) continue;

        weigh_means(shared.of_out, tile, scores, row_floats, params.v + first_col * kHeadDim, params.out + first_row * kHeadDim,
                    [&](float x) { return rounded(x, problem.rounding); });
    }
}
