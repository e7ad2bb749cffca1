// Checks that the host describes a kernel's parameters as C++ lays them out.
#pragma once

// The host passes VSA_FIELDS, a sequence of VSA_AT(offset)VSA_FIELD(path) for every field, and VSA_PARAMS_BYTES. NVRTC before
// CUDA 13.4 has no offsetof: it checks the size alone. nvcc, g++ (the emulator) and newer NVRTC check
// every field.
#if __has_builtin(__builtin_offsetof)
#define VSA_AT(offset) static_assert((offset) ==
#define VSA_FIELD(path) __builtin_offsetof(Params, path), "the host has Params::" #path " at another offset");
#else
#define VSA_AT(offset)
#define VSA_FIELD(path)
#endif
#define VSA_CHECK_PARAMS \
    VSA_FIELDS static_assert(sizeof(Params) == VSA_PARAMS_BYTES, "the host has a structure of another size")
