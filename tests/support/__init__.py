"""What tests share: inputs, references, the emulator of the CUDA kernels, small kernels, and calls that must fail."""
