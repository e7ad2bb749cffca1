"""Hopper GPUs: ``launches`` runs the CUDA kernels of ``kernels_src``, ``support`` says what they cover."""
