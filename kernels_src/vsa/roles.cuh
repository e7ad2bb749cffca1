// What the warpgroups of a thread block do.
#pragma once

#include "kittens/warpgroup.cuh"

// The first kConsumers warpgroups consume, the last one produces. All threads are launched with as many registers, then the
// consumers take some from the producers. kThreadBlocks share the registers of a multiprocessor.
template <int kConsumers, int kProducerRegisters, int kConsumerRegisters, int kThreadBlocks = 1, typename Produce,
          typename Consume>
__device__ __forceinline__ void run_roles(Produce produce, Consume consume) {
    using namespace kittens;
    constexpr int kThreads = (kConsumers + 1) * kWarpgroupThreads,
                  kLaunchRegisters = 65536 / (kThreadBlocks * kThreads) / 8 * 8;
    static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <= (kConsumers + 1) * kLaunchRegisters);
    const int index = broadcast(threadIdx.x / kWarpgroupThreads);
    if (index == kConsumers) {
        warpgroup::decrease_registers<kProducerRegisters>();
        produce();
    } else {
        warpgroup::increase_registers<kConsumerRegisters>();
        consume(index);
    }
}
