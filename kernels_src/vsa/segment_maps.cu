// The tensor maps of all segments of q, k, v and tensors like them: each is that of a whole tensor with another place and other
// extents, see segments.cuh. A thread makes one map.
#include "kittens/tma.cuh"
#include "vsa/params.cuh"

using namespace kittens;

namespace {

constexpr int kTensors = VSA_TENSORS;

// A segment as TMA sees it: of plain tokens a single row of a single frame.
struct alignas(16) SegmentExtent {
    int first_token;
    int t, h, w;
    int is_plain;
};
static_assert(sizeof(SegmentExtent) == VSA_SEGMENT_EXTENT_BYTES);

// A tensor: its maps for boxes of videos and for those of plain tokens, which have the address and strides of the first token.
struct MappedTensor {
    tensor_map of_video, of_plain;
    uint64_t address;
    int64_t token_bytes;  // from one token to the next
};

struct Params {
    MappedTensor tensors[kTensors];
    const SegmentExtent* segments;
    tensor_map* maps;  // [tensors, segments]
    int num_tensors, num_segments;
};
VSA_CHECK_PARAMS;

}  // namespace

extern "C" __global__ void __launch_bounds__(VSA_THREADS) segment_maps(const __grid_constant__ Params params) {
    const int index = blockIdx.x * VSA_THREADS + threadIdx.x;
    if (index >= params.num_tensors * params.num_segments) return;
    const int which = index / params.num_segments;
    const MappedTensor& tensor = params.tensors[which];
    const SegmentExtent& segment = params.segments[index - which * params.num_segments];
    tensor_map* map = params.maps + index;
    *map = segment.is_plain ? tensor.of_plain : tensor.of_video;
    tma::set_address(map, tensor.address + segment.first_token * tensor.token_bytes);
    tma::set_extent<1>(map, segment.w);
    tma::set_extent<2>(map, segment.h);
    tma::set_extent<3>(map, segment.t);
    // What is one long is never stepped along; in the map that this one comes from it may have been.
    if (segment.w > 1) tma::set_stride<1>(map, tensor.token_bytes);
    if (segment.h > 1) tma::set_stride<2>(map, tensor.token_bytes * segment.w);
    if (segment.t > 1) tma::set_stride<3>(map, tensor.token_bytes * segment.w * segment.h);
    tma::release_maps();
}
