"""The part of FastVideo's Triton kernels that is imported from outside, by vsa_jit."""
