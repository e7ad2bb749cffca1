#pragma once

#include "kittens/types.cuh"

namespace kittens {

struct semaphore {
    uint16_t expected, missing;  // arrivals
    int32_t phase : 1;
    int32_t bytes : 31;  // still to land
};
static_assert(sizeof(semaphore) == sizeof(uint64_t), "the kernels lay out shared memory with it");

inline bool has_ended(const semaphore& sem, int phase) { return (sem.phase & 1) != (phase & 1); }

inline void end_phase_if_complete(semaphore& sem) {
    if (sem.missing > 0 || sem.bytes != 0) return;
    sem.phase = ~sem.phase;
    sem.missing = sem.expected;
    ++emulator::progress;
}

inline void init_semaphore(semaphore& sem, int arrivals) {
    sem.expected = sem.missing = arrivals;
    sem.phase = sem.bytes = 0;
}

inline void fence_init_semaphores() {}

inline void wait(semaphore& sem, int phase) {
    emulator::wait_until("a semaphore", [&] { return has_ended(sem, phase); });
}

// Sometimes too early to see it.
inline bool test(semaphore& sem, int phase) { return has_ended(sem, phase) && emulator::random_below(4) > 0; }

inline void arrive(semaphore& sem, int count = 1) {
    if (sem.missing < count) emulator::fail("more arrivals at a semaphore than it expects");
    sem.missing -= count;
    end_phase_if_complete(sem);
    // Others may see it before this thread's next instruction.
    while (emulator::random_below(4) == 0) emulator::yield();
}

inline void add_bytes(semaphore& sem, int bytes) {
    sem.bytes += bytes;
    end_phase_if_complete(sem);
}

template <int number, int threads>
struct named_barrier {
    static void sync() { emulator::meet(emulator::named_barriers[number], threads, "a named barrier"); }
    static void arrive() { emulator::arrive(emulator::named_barriers[number], threads); }
};

}  // namespace kittens
