// The inverse of a map by itself; prepare_backward.cu makes it beside what else the backward needs.
//
// Specialised at compile time: VSA_INVERSE_SLICE.
#include "vsa/invert_map.cuh"
#include "vsa/params.cuh"

using namespace kittens;

namespace {

constexpr int kThreads = 256;

using Params = Inversion;
VSA_CHECK_PARAMS;

struct SharedStorage {
    uint32_t words[VSA_INVERSE_SLICE];
};
static_assert(sizeof(SharedStorage) == VSA_SMEM_BYTES, "the host launches with other shared memory");

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads) invert_map(const __grid_constant__ Params params) {
    extern __shared__ __align__(128) uint8_t raw[];
    invert_rows<kThreads>(params, blockIdx.x, reinterpret_cast<SharedStorage*>(raw)->words);
}
