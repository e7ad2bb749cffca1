// What single warps do: products of TF32 numbers, barriers of some of them, and copies to shared memory that go on while they
// compute.
#pragma once

#include "kittens/types.cuh"

namespace kittens {

// d += a · b, 16 x 8 of 16 x 8 and 8 x 8. Lane 4 g + t has rows g and g + 8. Of a it holds (g, t), (g + 8, t), (g, t + 4) and
// (g + 8, t + 4), of b (t, g) and (t + 4, g), of d (g, 2 t), (g, 2 t + 1) and the same of row g + 8. The matrix units ignore
// the 13 lowest bits of the factors.
__device__ __forceinline__ void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// d = a · b.
__device__ __forceinline__ void mm_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %10, %10, %10};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(0.0f));
}

// So many warps meet at one of the sixteen barriers of a thread block that take no memory.
__device__ __forceinline__ void meet_warps(int barrier, int warps) {
    asm volatile("barrier.cta.sync.aligned %0, %1;" ::"r"(barrier), "r"(warps * kWarpThreads) : "memory");
}

// Copies 16 bytes to shared memory, or zeros where there is nothing to copy; the addresses are multiples of 16.
__device__ __forceinline__ void copy_async(void* destination, const void* source, bool exists) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(destination)), "l"(source),
                 "r"(exists ? 16 : 0)
                 : "memory");
}

// Ends a group of this thread's copies.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for all groups of this thread's copies but the newest ones.
template <int newest>
__device__ __forceinline__ void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(newest) : "memory");
}

}  // namespace kittens
