"""The operators that PyTorch sees: each has a fake implementation for tracing, and derivatives where there are any."""
