"""Products that add up over the tiles of a row."""

import triton
import triton.language as tl


@triton.jit
def add_product(acc, a, b, EXACT: tl.constexpr):
    """acc + a · b, in fp32. ``EXACT`` adds up each tile's product by itself first: one sum over thousands of keys, term
    after term, would round more than PyTorch's blocked sums do, which matters for fp32 inputs alone."""
    if EXACT:
        # A multiply-add, because the compiler would turn a product plus acc back into a product that starts from acc.
        return tl.fma(tl.dot(a, b, input_precision="ieee"), 1.0, acc)
    return tl.dot(a, b, acc, input_precision="ieee")
