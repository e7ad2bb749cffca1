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

// A tensor map in global memory is changed field by field: where its tensor is, and its extents and strides in bytes, by the
// number of the dimension; the innermost one is 0, and has no stride.
__device__ __forceinline__ void set_address(tensor_map* map, uint64_t address) {
    asm volatile("tensormap.replace.tile.global_address.global.b1024.b64 [%0], %1;" ::"l"(map), "l"(address) : "memory");
}
template <int dimension>
__device__ __forceinline__ void set_extent(tensor_map* map, int extent) {
    asm volatile("tensormap.replace.tile.global_dim.global.b1024.b32 [%0], %1, %2;" ::"l"(map), "n"(dimension), "r"(extent)
                 : "memory");
}
template <int dimension>
__device__ __forceinline__ void set_stride(tensor_map* map, int64_t bytes) {
    // Compilers before CUDA 12.5 store the operand as it is, without the four bits that are always 0.
#if __CUDACC_VER_MAJOR__ == 12 && __CUDACC_VER_MINOR__ < 5
    bytes >>= 4;
#endif
    asm volatile("tensormap.replace.tile.global_stride.global.b1024.b64 [%0], %1, %2;" ::"l"(map), "n"(dimension - 1),
                 "l"(bytes)
                 : "memory");
}

// After maps were changed, and before another thread copies by one that was.
__device__ __forceinline__ void release_maps() { asm volatile("fence.proxy.tensormap::generic.release.gpu;" ::: "memory"); }
__device__ __forceinline__ void acquire_map(const tensor_map* map) {
    asm volatile("fence.proxy.tensormap::generic.acquire.gpu [%0], %1;" ::"l"(map), "n"(sizeof(tensor_map)) : "memory");
}

}  // namespace tma
}  // namespace kittens
