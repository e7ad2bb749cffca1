"""Run-time compilation of the CUDA sources. Knows nothing about attention."""
