// Asynchronous copies of boxes between tensors in global memory and shared memory, by the Tensor Memory Accelerator.
#pragma once

#include "kittens/semaphore.cuh"
#include "kittens/types.cuh"

namespace kittens {

// What cuTensorMapEncodeTiled writes on the host.
struct alignas(64) tensor_map {
    uint64_t opaque[16];
};

// Where a box starts, innermost dimension first.
struct coordinates {
    int x[5];
};

namespace tma {

// Arrives at the semaphore and lets its phase end only when so many bytes have landed.
__device__ __forceinline__ void expect_bytes(semaphore& sem, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&sem)), "r"(bytes) : "memory");
}

// Elements of the box that lie outside the tensor arrive as zeros, and their bytes count.
__device__ __forceinline__ void load_async(void* destination, const tensor_map& map, const coordinates& at, semaphore& sem) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::
            "r"(shared_address(destination)),
        "l"(&map), "r"(shared_address(&sem)), "r"(at.x[0]), "r"(at.x[1]), "r"(at.x[2]), "r"(at.x[3]), "r"(at.x[4])
        : "memory");
}

// Consecutive bytes: a multiple of 16, from and to addresses that are multiples of 16.
__device__ __forceinline__ void load_async(void* destination, const void* source, int bytes, semaphore& sem) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(destination)),
                 "l"(source), "r"(bytes), "r"(shared_address(&sem))
                 : "memory");
}

}  // namespace tma
}  // namespace kittens
