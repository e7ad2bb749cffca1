"""Of FastVideo's Triton kernels, what its attention classes import: ``index``. Nothing here needs Triton."""
