"""Triton kernels, for every GPU that Triton runs on."""
