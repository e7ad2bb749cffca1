// Transaction barriers in shared memory (PTX mbarrier), and barriers that have only threads to wait for. A phase ends when
// every arrival came and every byte landed; phases alternate between 0 and 1.
#pragma once

#include "kittens/types.cuh"

namespace kittens {

struct semaphore {
    uint64_t state;
};

__device__ __forceinline__ void init_semaphore(semaphore& sem, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&sem)), "r"(arrivals) : "memory");
}

// Makes initialised semaphores visible to the asynchronous copies of TMA.
__device__ __forceinline__ void fence_init_semaphores() {
    asm volatile("fence.mbarrier_init.release.cluster;\n fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void wait(semaphore& sem, int phase) {
    asm volatile(
        "{\n"
        " .reg .pred done;\n"
        "again:\n"
        " mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        " @!done bra again;\n"
        "}" ::"r"(shared_address(&sem)),
        "r"(phase)
        : "memory");
}

// Whether a phase has ended.
__device__ __forceinline__ bool test(semaphore& sem, int phase) {
    uint32_t done;
    asm volatile(
        "{\n"
        " .reg .pred done;\n"
        " mbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\n"
        " selp.u32 %0, 1, 0, done;\n"
        "}"
        : "=r"(done)
        : "r"(shared_address(&sem)), "r"(phase)
        : "memory");
    return done;
}

__device__ __forceinline__ void arrive(semaphore& sem, int count = 1) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&sem)), "r"(count) : "memory");
}

// One of the sixteen barriers of a thread block that take no memory. It opens when so many threads have come, of which those
// wait that call `sync`. Number 0 is that of __syncthreads.
template <int number, int threads>
struct named_barrier {
    __device__ __forceinline__ static void sync() {
        asm volatile("barrier.cta.sync.aligned %0, %1;" ::"n"(number), "n"(threads) : "memory");
    }
    __device__ __forceinline__ static void arrive() {
        asm volatile("barrier.cta.arrive.aligned %0, %1;" ::"n"(number), "n"(threads) : "memory");
    }
};

}  // namespace kittens
