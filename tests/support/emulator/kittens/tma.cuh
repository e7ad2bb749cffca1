#pragma once

#include "kittens/semaphore.cuh"

namespace kittens {

// What tests/support/emulate.py writes instead of the driver: bytes, and elements of two bytes.
struct alignas(64) tensor_map {
    uint8_t* address;
    int32_t extents[5], box[5];
    int64_t strides[4];
    int32_t swizzled;
};
static_assert(sizeof(tensor_map) == 128, "the size of a CUtensorMap");

struct coordinates {
    int x[5];
};

namespace tma {

constexpr int kWordBytes = 16;

// Calls a function for every 16 bytes of a box with their place in shared memory and in global memory (null: outside), and
// returns the bytes of the box.
template <typename Function>
int for_each_word(const tensor_map& map, const coordinates& at, Function function) {
    const int row_bytes = map.box[0] * 2;
    int rows = 0;
    for (int e = 0; e < map.box[4]; ++e) {
        for (int d = 0; d < map.box[3]; ++d) {
            for (int c = 0; c < map.box[2]; ++c) {
                for (int b = 0; b < map.box[1]; ++b, ++rows) {
                    const int x[] = {at.x[0], at.x[1] + b, at.x[2] + c, at.x[3] + d, at.x[4] + e};
                    bool inside = x[0] >= 0 && x[0] + map.box[0] <= map.extents[0];
                    int64_t offset = x[0] * 2;
                    for (int i = 1; i < 5; ++i) {
                        inside = inside && x[i] >= 0 && x[i] < map.extents[i];
                        offset += x[i] * map.strides[i - 1];
                    }
                    for (int word = 0; word < row_bytes / kWordBytes; ++word) {
                        const int moved = map.swizzled ? word ^ rows % 8 : word;
                        function(rows * row_bytes + moved * kWordBytes,
                                 inside ? map.address + offset + word * kWordBytes : nullptr);
                    }
                }
            }
        }
    }
    return rows * row_bytes;
}

inline void set_address(tensor_map* map, uint64_t address) { map->address = reinterpret_cast<uint8_t*>(address); }
template <int dimension>
void set_extent(tensor_map* map, int extent) {
    map->extents[dimension] = extent;
}
template <int dimension>
void set_stride(tensor_map* map, int64_t bytes) {
    map->strides[dimension - 1] = bytes;
}
inline void release_maps() {}
inline void acquire_map(const tensor_map*) {}

inline void expect_bytes(semaphore& sem, int bytes) {
    sem.bytes += bytes;
    arrive(sem);
}

inline void load_async(void* destination, const tensor_map& map, const coordinates& at, semaphore& sem) {
    const int alignment = map.swizzled ? 1024 : 128;
    if (__cvta_generic_to_shared(destination) % alignment != 0) emulator::fail("a copy to an address that is not aligned");
    emulator::loads.push_back([=, &map, &sem] {
        const int bytes = for_each_word(map, at, [&](int place, const uint8_t* source) {
            uint8_t* word = static_cast<uint8_t*>(destination) + place;
            source == nullptr ? std::memset(word, 0, kWordBytes) : std::memcpy(word, source, kWordBytes);
        });
        add_bytes(sem, -bytes);
    });
}

inline void load_async(void* destination, const void* source, int bytes, semaphore& sem) {
    if (__cvta_generic_to_shared(destination) % kWordBytes != 0 || reinterpret_cast<uintptr_t>(source) % kWordBytes != 0)
        emulator::fail("a copy from or to an address that is not aligned");
    emulator::loads.push_back([=, &sem] {
        std::memcpy(destination, source, bytes);
        add_bytes(sem, -bytes);
    });
}

}  // namespace tma
}  // namespace kittens
