// Rings of stages between the warps of a thread block.
#pragma once

#include "kittens/semaphore.cuh"
#include "vsa/layout.cuh"

// The barriers of a ring: `full` ends a phase when the stage has been written, `empty` when it may be written again.
template <int kStages>
struct StageBarriers {
    kittens::semaphore full[kStages], empty[kStages];
};

template <int n>
__device__ __forceinline__ void init_all(kittens::semaphore (&barriers)[n], int arrivals) {
    for (kittens::semaphore& barrier : barriers) kittens::init_semaphore(barrier, arrivals);
}

// How many loads fill a stage, and how many arrivals empty it.
template <int kStages>
__device__ __forceinline__ void init_stage_barriers(StageBarriers<kStages>& barriers, int loads, int readers) {
    init_all(barriers.full, loads);
    init_all(barriers.empty, readers);
}

// Where the n-th use of a ring of N stages is: the stage, and the phase of its barriers.
template <int N>
struct PipelineState {
    uint32_t index, phase;
    __device__ __forceinline__ explicit PipelineState(uint32_t count) : index(count % N), phase(count / N % 2) {}
};

// Waits for two barriers. Their tests overlap, and usually both have completed.
__device__ __forceinline__ void wait_both(kittens::semaphore& a, int phase_a, kittens::semaphore& b, int phase_b) {
    const bool a_completed = kittens::test(a, phase_a), b_completed = kittens::test(b, phase_b);
    if (__builtin_expect(!(a_completed && b_completed), 0)) {
        kittens::wait(a, phase_a);
        kittens::wait(b, phase_b);
    }
}

// Gives a stage back, once for each warp that has read it.
__device__ __forceinline__ void release(kittens::semaphore& empty) {
    if (kittens::laneid() == 0) kittens::arrive(empty);
}

// A warp that loads boxes calls this first.
template <typename... Tensors>
__device__ __forceinline__ void acquire_maps(const Tensors&... tensors) {
    (tensors.acquire_maps(), ...);
}

// Starts the load of a box of tokens.
template <typename Tile>
__device__ __forceinline__ void load_box(Tile& tile, const TokenTensor& tensor, int batch, int head, const BoxOrigin& origin,
                                         kittens::semaphore& full) {
    kittens::coordinates from = tensor.at(batch, head, origin);
    const kittens::tensor_map& map = tensor.map_of(origin);
    kittens::tma::expect_bytes(full, Tile::bytes);
#pragma unroll
    for (int panel = 0; panel < Tile::panels; ++panel, from.x[0] += Tile::panel_cols) {
        kittens::tma::load_async(tile.panel(panel), map, from, full);
    }
}

// Starts the load of an array.
template <typename T, int n>
__device__ __forceinline__ void load_array(T (&destination)[n], const T* source, kittens::semaphore& full) {
    kittens::tma::expect_bytes(full, sizeof(destination));
    kittens::tma::load_async(destination, source, sizeof(destination), full);
}
