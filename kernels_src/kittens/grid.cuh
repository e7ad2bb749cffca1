// Launches in turn of which the next may start before the one before has ended (programmatic dependent launch).
#pragma once

#include "kittens/types.cuh"

namespace kittens {

// The next launch may start once every thread block of this one has called this or has ended.
__device__ __forceinline__ void let_next_launch_start() { asm volatile("griddepcontrol.launch_dependents;"); }

// Returns when the launch before has ended: all that it wrote is visible then.
__device__ __forceinline__ void wait_for_launch_before() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// Arrives at a counter in memory: who sees that it has arrived sees all that this thread, and those that it has met, wrote
// before.
__device__ __forceinline__ void arrive_at(int* counter) {
    asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(counter) : "memory");
}

// Waits until so many arrivals have come to a counter in memory.
__device__ __forceinline__ void wait_for(const int* counter, int arrivals) {
    int count;
    do {
        asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(count) : "l"(counter) : "memory");
    } while (count < arrivals);
}

}  // namespace kittens
