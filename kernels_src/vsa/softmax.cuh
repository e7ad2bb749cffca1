// The online softmax of the rows of a warp.
#pragma once

#include "kittens/register_tile.cuh"

// What a row's sums are relative to: a reference, its largest score at some time. Whether a later score has outgrown it by too
// much is seen from the sum of the probabilities, which is needed anyway: no maximum of every tile is.
struct Softmax {
    // How much a lane's probabilities of a row and a tile may add up to: what fp16 holds, and more than most scores make of it
    // after the first tile.
    static constexpr float kMost = 0x1p14f;
    // There is no reference yet: probabilities of finite scores are infinite, and those of -inf are 0.
    static constexpr float kNone = -3e38f;

    float scale_log2;
    kittens::col_vec shift = {kNone, kNone};  // the reference, scaled
    kittens::col_vec sum = {0.0f, 0.0f};      // of a lane's own columns

    // The probabilities of scores. Where too large ones are among those of the warp, the references are raised, and what was
    // summed so far is multiplied accordingly, here and in `out`.
    template <typename T, int cols, int out_cols>
    __device__ __forceinline__ void exponentiate(kittens::rt<T, 16, cols>& p, const kittens::rt_fl<16, cols>& scores,
                                                 kittens::rt_fl<16, out_cols>& out) {
        kittens::col_vec added;
        kittens::exp2_scaled(p, added, scores, scale_log2, shift);
        const bool is_outgrown = added[0] > kMost || added[1] > kMost;
        if (__builtin_expect(__any_sync(kittens::kAllLanes, is_outgrown), 0)) {
            kittens::mul_row(out, raise(scores));
            kittens::exp2_scaled(p, added, scores, scale_log2, shift);
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) sum[i] += added[i];
    }

  private:
    // Takes the largest scores as references where they are larger. Returns by what all that was summed is to be multiplied.
    template <int cols>
    __device__ __forceinline__ kittens::col_vec raise(const kittens::rt_fl<16, cols>& scores) {
        kittens::col_vec largest, correction;
        kittens::row_max(largest, scores);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float raised = fmaxf(shift[i], largest[i] * scale_log2);
            correction[i] = kittens::exp2(shift[i] - raised);
            shift[i] = raised;
            sum[i] *= correction[i];
        }
        return correction;
    }
};
