// Scores of block means, a tile of rows at a time: which columns these have, and products of them and of means.
#pragma once

#include "kittens/instructions.cuh"
#include "vsa/product.cuh"

constexpr int kHeadDim = VSA_HEAD_DIM;
static_assert(kHeadDim % kChunk == 0);
// Columns of scores that one thread block takes at most.
constexpr int kMaxCoarseCols = VSA_MAX_COLS;
// Columns that a warp reads at a time, of which each lane has some: rows of scores have a multiple of those.
constexpr int kLaneCols = 4;
constexpr int kVectorCols = kLaneCols * kittens::kWarpThreads;
// Columns whose scores are computed at a time.
constexpr int kScoreCols = VSA_SCORE_COLS;
static_assert(kScoreCols == kVectorCols);

// Query blocks of a head, with the key blocks that they see.
struct alignas(16) RowTile {
    int row, end_row, col, end_col;

    __device__ __forceinline__ int rows() const { return end_row - row; }
    __device__ __forceinline__ int cols() const { return end_col - col; }
    __device__ __forceinline__ int vectors() const { return (cols() + kVectorCols - 1) / kVectorCols; }
};

// The elements that scores are rounded like.
enum class Rounding { kNone, kBf16, kHalf };

struct CoarseProblem {
    const RowTile* tiles;  // of a head; null: all columns belong to all rows
    const void* sizes;     // valid tokens of each key block, or null
    int sizes_are_64_bit;
    int rounding;  // Rounding
    int num_rows, num_cols;
    int group;       // query heads that share a key/value head
    int num_tiles;   // of a head
    int num_items;   // row tiles of all heads
    int row_floats;  // of a row of scores
    int tile_rows;   // of a row tile, the most
    float scale;

    __device__ __forceinline__ RowTile tile(int number) const {
        if (tiles != nullptr) return tiles[number];
        return {number * tile_rows, min(num_rows, (number + 1) * tile_rows), 0, num_cols};
    }
    __device__ __forceinline__ bool has_tokens(int col) const {
        if (sizes == nullptr) return true;
        return sizes_are_64_bit ? static_cast<const int64_t*>(sizes)[col] > 0 : static_cast<const int*>(sizes)[col] > 0;
    }
};

__device__ __forceinline__ float rounded(float x, int rounding) {
    if (rounding == int(Rounding::kBf16)) return kittens::unpack<kittens::bf16>(kittens::pack<kittens::bf16>(x, 0.0f)).x;
    if (rounding == int(Rounding::kHalf)) return kittens::unpack<kittens::half>(kittens::pack<kittens::half>(x, 0.0f)).x;
    return x;
}

// Bits of the columns of a row tile.
struct ColumnBits {
    uint32_t words[kMaxCoarseCols / kittens::kWarpThreads];

    // All threads of the thread block set them, and then meet.
    template <typename F>
    __device__ __forceinline__ void set(const RowTile& tile, const F& is_set) {
        for (int word = kittens::warpid(); word < tile.vectors() * kLaneCols; word += kProductWarps) {
            const int col = word * kittens::kWarpThreads + kittens::laneid();
            const uint32_t bits = __ballot_sync(kittens::kAllLanes, col < tile.cols() && is_set(tile.col + col));
            if (kittens::laneid() == 0) words[word] = bits;
        }
    }
    // Of the i-th column of a lane.
    __device__ __forceinline__ bool has(int vector, int i) const {
        return words[vector * kLaneCols + i] >> kittens::laneid() & 1;
    }
    // How many are set. Where none is, all are, after this. By all threads of the thread block.
    __device__ __forceinline__ int count_or_all(const RowTile& tile) {
        int count = 0;
        for (int word = kittens::laneid(); word < tile.vectors() * kLaneCols; word += kittens::kWarpThreads) {
            count += __popc(words[word]);
        }
        count = __reduce_add_sync(kittens::kAllLanes, count);
        if (count == 0) {
            __syncthreads();
            set(tile, [](int) { return true; });
            __syncthreads();
        }
        return count;
    }
};

// Rows by columns, over the channels; and rows by channels, over the columns.
using RowPanel = Panel<kTileRows, true>;
using ScoreRing = ProductRing<RowPanel, Panel<kScoreCols, true>>;
using OutRing = ProductRing<RowPanel, Panel<kHeadDim, false>>;

// Products of the means of a row tile's rows and columns go to rows of memory, each finished by a function.
template <typename Finish>
__device__ __forceinline__ void multiply_means(ScoreRing& ring, const RowTile& tile, const float* rows, const float* cols,
                                               float* products, int row_floats, const Finish& finish) {
    const Matrix a = {rows, kHeadDim, tile.rows(), 0, 0};
    const Matrix b = {cols, kHeadDim, tile.cols(), kScoreCols * kHeadDim, kScoreCols};
    product<false>(ring, a, b, tile.rows(), tile.vectors(), kHeadDim / kChunk, [&](int part, const auto& sum) {
        sum.for_each([&](int row, int col, float x, float y) {
            if (row >= tile.rows()) return;
            float* pair = products + int64_t(row) * row_floats + part * kScoreCols + col;
            *reinterpret_cast<float2*>(pair) = {finish(x), finish(y)};
        });
    });
}

// Scores, as they order the key blocks: those that are rounded are scaled, since scaling can tie them.
__device__ __forceinline__ void compute_scores(const CoarseProblem& problem, ScoreRing& ring, const RowTile& tile,
                                               const float* q, const float* k, float* scores) {
    multiply_means(ring, tile, q, k, scores, problem.row_floats, [&](float x) {
        if (problem.rounding == int(Rounding::kNone)) return x;
        return rounded(rounded(x, problem.rounding) * problem.scale, problem.rounding);
    });
}

// Stores rows of channels.
template <typename Sum, typename Finish>
__device__ __forceinline__ void store_means(const Sum& sum, float* means, int rows, const Finish& finish) {
    sum.for_each([&](int row, int col, float x, float y) {
        if (row >= rows) return;
        *reinterpret_cast<float2*>(means + row * kHeadDim + col) = {finish(x), finish(y)};
    });
}

// Means of a row tile's columns, weighted by rows of memory, and finished by a function.
template <typename Finish>
__device__ __forceinline__ void weigh_means(OutRing& ring, const RowTile& tile, const float* weights, int row_floats,
                                            const float* cols, float* means, const Finish& finish) {
    const Matrix a = {weights, row_floats, tile.rows(), 0, 0};
    const Matrix b = {cols, kHeadDim, tile.cols(), 0, 0};
    product<true>(ring, a, b, tile.rows(), 1, (tile.cols() + kChunk - 1) / kChunk,
                  [&](int, const auto& sum) { store_means(sum, means, tile.rows(), finish); });
}
