"""Where FastVideo asks whether its own kernel for Blackwell GPUs can run. It cannot, and FastVideo takes
``block_sparse_attn``, with a warning where that kernel was asked for."""

from torch import Tensor

# FastVideo's FastH3 example reads it before it loads a model.
_HAS_VSA_SM100A = False


def is_supported(q: Tensor, variable_block_sizes: Tensor) -> bool:
    return False
