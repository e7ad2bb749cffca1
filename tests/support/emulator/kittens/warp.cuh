#pragma once

#include "kittens/types.cuh"

namespace kittens {

inline float tf32_value(uint32_t bits) { return __uint_as_float(bits & ~0x1fffu); }

inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    const auto of_a = emulator::gather(&a[0]), of_b = emulator::gather(&b[0]);
    const int group = emulator::lane() / 4, column = emulator::lane() % 4 * 2;
    for (int i = 0; i < 4; ++i) {
        double sum = d[i];
        for (int k = 0; k < 8; ++k) {
            sum += double(tf32_value(of_a[group * 4 + k % 4][i / 2 + k / 4 * 2])) *
                   tf32_value(of_b[(column + i % 2) * 4 + k % 4][k / 4]);
        }
        // The matrix units know one NaN.
        d[i] = sum != sum ? not_a_number() : float(sum);
    }
    // Nobody changes factors that others read.
    emulator::meet_warp();
}

inline void mm_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    for (float& value : d) value = 0.0f;
    mma_tf32(d, a, b);
}

inline void meet_warps(int barrier, int warps) {
    emulator::meet(emulator::named_barriers[barrier], warps * kWarpThreads, "a barrier of some warps");
}

inline void copy_async(void* destination, const void* source, bool exists) {
    if (__cvta_generic_to_shared(destination) % 16 != 0 || reinterpret_cast<uintptr_t>(source) % 16 != 0)
        emulator::fail("a copy from or to an address that is not aligned");
    const auto copy = [=] { exists ? std::memcpy(destination, source, 16) : std::memset(destination, 0, 16); };
    // At once, or as late as can be.
    if (emulator::random_below(2) > 0) return copy();
    emulator::self().copies.push_back({emulator::self().copy_group, copy});
}

inline void commit_copies() { ++emulator::self().copy_group; }

template <int newest>
void wait_copies() {
    auto& copies = emulator::self().copies;
    const int end = emulator::self().copy_group - newest;
    for (const auto& copy : copies) {
        if (copy.group < end) copy.run();
    }
    std::erase_if(copies, [=](const auto& copy) { return copy.group < end; });
    ++emulator::progress;
}

}  // namespace kittens
