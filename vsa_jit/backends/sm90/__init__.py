"""Hopper GPUs: ``backend`` runs the CUDA kernels of ``kernels_src``, ``support`` says what they cover."""
