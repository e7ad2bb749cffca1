// What the nvcc engine adds to a kernel: a function that gives its driver handle for the current device, so that both
// engines launch alike. VSA_SOURCE is the kernel's file, VSA_ENTRY its name.
#include <cuda_runtime.h>

#define VSA_QUOTED(name) #name
#define VSA_EXPANDED_AND_QUOTED(name) VSA_QUOTED(name)
#include VSA_EXPANDED_AND_QUOTED(VSA_SOURCE)

extern "C" int vsa_jit_get_function(cudaFunction_t* function) {
    return cudaGetFuncBySymbol(function, reinterpret_cast<const void*>(VSA_ENTRY));
}
