// The online softmax of the rows of a warp.
#pragma once

#include "kittens/register_tile.cuh"

// The sums of a row are relative to a reference, its largest score at some earlier time. The reference is raised only when a
// tile's probabilities add up to more than a threshold: that is seen from their sum, which is needed anyway, so that no tile
// needs its maximum.
struct Softmax {
    // The largest sum of a lane's probabilities of one row and tile. Each of them then fits fp16, and after the first tile few
    // tiles have scores so far above the reference that the sum exceeds it.
    static constexpr float kRescaleThreshold = 0x1p14f;
    // Before the first tile: probabilities of finite scores are infinite, and those of -inf are 0.
    static constexpr float kNoReference = -3e38f;

    float scale_log2;
    kittens::col_vec shift = {kNoReference, kNoReference};  // the reference, scaled
    kittens::col_vec sum = {0.0f, 0.0f};                    // over a lane's own columns

    // The probabilities of scores. Where their sum exceeds the threshold, the reference is raised, and all that was summed so
    // far is rescaled, here and in `out`.
    template <typename T, int cols, int out_cols>
    __device__ __forceinline__ void exponentiate(kittens::rt<T, 16, cols>& p, const kittens::rt_fl<16, cols>& scores,
                                                 kittens::rt_fl<16, out_cols>& out) {
        kittens::col_vec added;
        kittens::exp2_scaled(p, added, scores, scale_log2, shift);
        const bool exceeds = added[0] > kRescaleThreshold || added[1] > kRescaleThreshold;
        if (__builtin_expect(__any_sync(kittens::kAllLanes, exceeds), 0)) {
            kittens::mul_row(out, rescale(scores));
            kittens::exp2_scaled(p, added, scores, scale_log2, shift);
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) sum[i] += added[i];
    }

  private:
    // Takes the largest scores as references where they are larger, and returns the factors of what was summed before.
    template <int cols>
    __device__ __forceinline__ kittens::col_vec rescale(const kittens::rt_fl<16, cols>& scores) {
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
