// Products of fp32 matrices by tensor cores, as exact as fp32: each factor is the sum of two TF32 numbers, which hold 22 of its
// 24 bits, and three of their four products are added. The matrix units cut off sums instead of rounding them: they add up only
// a few products, and ordinary additions the rest.
#pragma once

#include "kittens/instructions.cuh"
#include "kittens/warp.cuh"

constexpr int kProductWarps = 16;
constexpr int kProductThreads = kProductWarps * kittens::kWarpThreads;
// The most rows of a result, how much of a sum is loaded at a time, and how often ahead of its use.
constexpr int kTileRows = VSA_TILE_ROWS;
constexpr int kChunk = 32;
constexpr int kRingStages = VSA_STAGES;
constexpr int kVectorFloats = 4;

// A factor: rows of the result, or its columns, by what is summed over. Of neighbouring parts, the products are stored one by
// one, or added up.
struct Matrix {
    const float* data;
    int64_t stride;  // of rows, where what is summed over is contiguous; else the other way round
    int limit;  // how many rows there are in that order; others count as zeros
    int64_t part_stride;  // from one part to the next
    int part_limit;  // by which the next part has fewer rows
    // How much of what is contiguous may be read, where that are rows of the result.
    int inner_limit = 1 << 30;
};

// A chunk of a factor in shared memory. Of a step of 8, lane t of a row multiplies 2 t and 2 t + 1 where the instruction has t
// and t + 4: both factors agree, and the two lie side by side. The padding keeps fragments free of bank conflicts.
template <int rows_, bool kSumContiguous>
struct Panel {
    static constexpr int rows = rows_;
    static constexpr int kOuter = kSumContiguous ? rows : kChunk;
    static constexpr int kInner = kSumContiguous ? kChunk : rows;
    static constexpr int kStride = kInner + (kSumContiguous ? 8 : 4);

    float data[kOuter * kStride];

    __device__ __forceinline__ void load(const Matrix& matrix, int thread, int part, int chunk) {
        constexpr int kVectors = kInner / kVectorFloats;
        constexpr int kStep = kProductThreads / kVectors;
        static_assert(kOuter % kStep == 0);
        const int outer = thread / kVectors, inner = thread % kVectors * kVectorFloats;
        const int first = kSumContiguous ? 0 : chunk * kChunk;
        const int left = inner < matrix.inner_limit ? matrix.limit - part * matrix.part_limit - first - outer : 0;
        const float* source = matrix.data + part * matrix.part_stride + (first + outer) * matrix.stride + inner;
        if (kSumContiguous) source += chunk * kChunk;
        float* destination = data + outer * kStride + inner;
#pragma unroll
        for (int i = 0; i < kOuter; i += kStep) {
            const bool exists = i < left;
            kittens::copy_async(destination + i * kStride, exists ? source + i * matrix.stride : matrix.data, exists);
        }
    }

    __device__ __forceinline__ float2 pair(int row, int k) const {
        if (kSumContiguous) return *reinterpret_cast<const float2*>(data + row * kStride + k);
        return {data[k * kStride + row], data[(k + 1) * kStride + row]};
    }
};

// The chunks of both factors that are loaded while others are multiplied.
template <typename A, typename B>
struct ProductRing {
    struct Stage {
        A a;
        B b;
    };
    alignas(16) Stage stages[kRingStages];
};

// What a warp has of a result with so many columns and groups of 16 rows: a group, of which all warps that have the same share
// the columns.
template <int cols, int row_groups>
struct Accumulator {
    static constexpr int kColTiles = cols * row_groups < 8 * kProductWarps ? 1 : cols * row_groups / (8 * kProductWarps);

    float values[kColTiles][4];
    int warp, lane;

    __device__ __forceinline__ explicit Accumulator(int thread)
        : warp(thread / kittens::kWarpThreads), lane(thread % kittens::kWarpThreads) {
        clear();
    }

    __device__ __forceinline__ int first_row() const { return warp % row_groups * 16; }
    __device__ __forceinline__ int first_col() const { return warp / row_groups * kColTiles * 8; }
    // Few rows and columns are not enough for all warps.
    __device__ __forceinline__ bool has_cols() const { return cols * row_groups >= 8 * kProductWarps || first_col() < cols; }

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int j = 0; j < kColTiles; ++j) {
#pragma unroll
            for (float& value : values[j]) value = 0.0f;
        }
    }

    __device__ __forceinline__ void add(const Accumulator& other) {
#pragma unroll
        for (int j = 0; j < kColTiles; ++j) {
#pragma unroll
            for (int i = 0; i < 4; ++i) values[j][i] += other.values[j][i];
        }
    }

    // Calls f with a row, a column, and the values there and in the next column.
    template <typename F>
    __device__ __forceinline__ void for_each(const F& f) const {
        const int row = first_row() + lane / 4, col = first_col() + lane % 4 * 2;
        if (!has_cols()) return;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int j = 0; j < kColTiles; ++j) {
                f(row + half * 8, col + j * 8, values[j][2 * half], values[j][2 * half + 1]);
            }
        }
    }

    template <typename A, typename B>
    __device__ __forceinline__ void add_product(const A& a, const B& b) {
        const int row = first_row() + lane / 4, col = first_col() + lane / 4;
        if (!has_cols()) return;
        constexpr int kStep = 8, kAtATime = 2 * kStep;
#pragma unroll
        for (int first = 0; first < kChunk; first += kAtATime) {
            float part[kColTiles][4];
#pragma unroll
            for (int step = 0; step < kAtATime; step += kStep) {
                const int k = first + step + lane % 4 * 2;
                uint32_t a_high[4], a_low[4], b_high[kColTiles][2], b_low[kColTiles][2];
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const float2 pair = a.pair(row + half * 8, k);
                    split<true>(pair.x, a_high[half], a_low[half]);
                    split<true>(pair.y, a_high[half + 2], a_low[half + 2]);
                }
#pragma unroll
                for (int j = 0; j < kColTiles; ++j) {
                    const float2 pair = b.pair(col + j * 8, k);
                    split<false>(pair.x, b_high[j][0], b_low[j][0]);
                    split<false>(pair.y, b_high[j][1], b_low[j][1]);
                }
                // The small ones first. Products in turn are of different sums, so that none waits for the one before.
#pragma unroll
                for (int j = 0; j < kColTiles; ++j) {
                    if (step == 0) kittens::mm_tf32(part[j], a_low, b_high[j]);
                    if (step > 0) kittens::mma_tf32(part[j], a_low, b_high[j]);
                }
#pragma unroll
                for (int j = 0; j < kColTiles; ++j) kittens::mma_tf32(part[j], a_high, b_low[j]);
#pragma unroll
                for (int j = 0; j < kColTiles; ++j) kittens::mma_tf32(part[j], a_high, b_high[j]);
            }
#pragma unroll
            for (int j = 0; j < kColTiles; ++j) {
#pragma unroll
                for (int i = 0; i < 4; ++i) values[j][i] += part[j][i];
            }
        }
    }

  private:
    // The matrix units ignore the low bits of a number. Of one factor the upper number is rounded, so that what is left out has
    // either sign; of the other that is not worth an instruction. A NaN stays in one of them.
    template <bool kRounded>
    __device__ __forceinline__ static void split(float x, uint32_t& high, uint32_t& low) {
        high = __float_as_uint(x) + (kRounded ? 0x1000 : 0);
        low = __float_as_uint(x - __uint_as_float(high & ~0x1fffu));
    }
};

// See below; the result has so many groups of 16 rows.
template <bool kAdded, int row_groups, typename A, typename B, typename Store>
__device__ __forceinline__ void product(ProductRing<A, B>& ring, const Matrix& a, const Matrix& b, int parts, int chunks,
                                        const Store& store) {
    const int thread = kittens::thread_number(), steps = parts * chunks;
    int part = 0, chunk = 0, stage = 0;
    const auto load = [&](int step) {
        if (step < steps) {
            ring.stages[stage].a.load(a, thread, part, chunk);
            ring.stages[stage].b.load(b, thread, part, chunk);
            if (++chunk == chunks) chunk = 0, ++part;
            if (++stage == kRingStages) stage = 0;
        }
        // Without copies, too: groups are counted.
        kittens::commit_copies();
    };
    __syncthreads();
#pragma unroll 1
    for (int step = 0; step < kRingStages - 1; ++step) load(step);
    // Of long sums, parts are added up by themselves: the error grows with the number of additions to a sum.
    constexpr int kPartSteps = 16;
    Accumulator<B::rows, row_groups> sum(thread), total(thread);
    int done = 0, chunk_done = 0, stage_done = 0;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
        kittens::wait_copies<kRingStages - 2>();
        // All have landed, and the stage that is loaded next is free.
        __syncthreads();
        load(step + kRingStages - 1);
        sum.add_product(ring.stages[stage_done].a, ring.stages[stage_done].b);
        if (++stage_done == kRingStages) stage_done = 0;
        const bool is_last = ++chunk_done == chunks && (!kAdded || done == parts - 1);
        if (chunk_done == chunks) chunk_done = 0, ++done;
        if (!is_last && (!kAdded || step % kPartSteps != kPartSteps - 1)) continue;
        total.add(sum);
        sum.clear();
        if (!is_last) continue;
        store(done - 1, total);
        total.clear();
    }
    kittens::wait_copies<0>();
}

// a · bᵀ, of which a has `rows`, by all threads of the thread block: of each of `parts` by itself, or with `kAdded` their sum,
// each over `chunks`. `store` takes a part and its result. What the threads wrote before may be read, and after that a barrier
// is needed.
template <bool kAdded, typename A, typename B, typename Store>
__device__ __forceinline__ void product(ProductRing<A, B>& ring, const Matrix& a, const Matrix& b, int rows, int parts,
                                        int chunks, const Store& store) {
    if (rows > 32) {
        product<kAdded, 4>(ring, a, b, parts, chunks, store);
    } else if (rows > 16) {
        product<kAdded, 2>(ring, a, b, parts, chunks, store);
    } else {
        product<kAdded, 1>(ring, a, b, parts, chunks, store);
    }
}
