"""Video sparse attention computed densely, token by token, and the rule by which results are compared with it.

Nothing here uses the package: blocks are found from token coordinates, attention is a masked softmax over all keys.
Tensors are [B, H, S, D]; every function runs in the dtype of its inputs, so that the same code gives the float64
reference and "plain PyTorch attention in the input's dtype", whose error is the yardstick.
"""

import torch
from torch import Tensor


def block_of_tokens(length: int, tile, grid=None) -> Tensor:
    """Block number of each token of a sequence."""
    token = torch.arange(length)
    if grid is None:
        return token // (tile[0] * tile[1] * tile[2])
    _, height, width = grid
    t, h, w = token // (height * width), token // width % height, token % width
    tiles_h, tiles_w = -(-height // tile[1]), -(-width // tile[2])
    return (t // tile[0] * tiles_h + h // tile[1]) * tiles_w + w // tile[2]


def valid_tokens(length: int, block: int, sizes: Tensor | None) -> Tensor:
    token = torch.arange(length)
    if sizes is None:
        return torch.ones(length, dtype=torch.bool)
    return token % block < sizes.cpu().clamp(0, block)[token // block]


def token_mask(block_map: Tensor, q_block: Tensor, kv_block: Tensor, q_valid: Tensor, kv_valid: Tensor) -> Tensor:
    """Which key each query attends, bool [B, H, S_q, S_k], from a map of blocks [B, H, n_q, n_k]."""
    mask = block_map[:, :, q_block.to(block_map.device)][..., kv_block.to(block_map.device)]
    return mask & q_valid.to(mask.device)[:, None] & kv_valid.to(mask.device)


def block_means(x: Tensor, block: Tensor, valid: Tensor) -> Tensor:
    """[B, H, n, D]; 0 for a block without valid tokens. ``x`` is 0 where it is not valid."""
    member = torch.zeros(int(block.max()) + 1, len(block), device=x.device, dtype=x.dtype)
    member[block.to(x.device), torch.arange(len(block), device=x.device)] = valid.to(x)
    return member / member.sum(-1, keepdim=True).clamp(min=1) @ x


def select(scores: Tensor, topk: int, kv_nonempty: Tensor) -> Tensor:
    """Map of the ``topk`` highest scores of each row, ties to the lower index, empty blocks never."""
    nonempty = kv_nonempty.nonzero().flatten().to(scores.device)
    order = scores[..., nonempty].double().sort(dim=-1, descending=True, stable=True).indices[..., :topk]
    chosen = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    return chosen.scatter(-1, nonempty[order], True)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Masked softmax attention: out [B, H, S_q, D] and lse [B, H, S_q]; 0 and -inf where a query has no key."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = (q @ k.mT * scale).masked_fill(~mask, float("-inf"))
    has_key = mask.any(-1, keepdim=True)
    p = torch.softmax(scores.masked_fill(~has_key, 0.0), -1).masked_fill(~has_key, 0.0)
    return p @ v, scores.float().logsumexp(-1) if scores.dtype != torch.float64 else scores.logsumexp(-1)


def coarse(q_c: Tensor, k_c: Tensor, v_c: Tensor, kv_nonempty: Tensor, scale: float) -> Tensor:
    mask = kv_nonempty.to(q_c.device).expand(*q_c.shape[:3], k_c.shape[2])
    return attention(q_c, k_c, v_c, mask, scale)[0]


def error(x: Tensor, reference: Tensor) -> float:
    """‖x − reference‖ / ‖reference‖; entries that are infinite alike count as equal, NaN counts as infinitely wrong."""
    x, reference = x.detach().double().cpu(), reference.detach().double().cpu()
    same = torch.isinf(reference) & (x == reference)
    difference = (x - reference).masked_fill(same, 0.0)
    norm = reference.masked_fill(same, 0.0).norm().clamp(min=1e-30)
    ratio = (difference.norm() / norm).item()
    return ratio if ratio == ratio else float("inf")


def assert_close(name: str, x: Tensor, reference: Tensor, plain: Tensor, floor: float = 2e-7) -> None:
    """At most twice the error that plain PyTorch attention makes in the input's dtype on the same data."""
    assert x.shape == reference.shape, f"{name}: shape {tuple(x.shape)}, expected {tuple(reference.shape)}"
    bound = 2 * error(plain, reference) + floor
    assert error(x, reference) <= bound, f"{name}: error {error(x, reference):.3g}, bound {bound:.3g}"


def scaled(products: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Scores in a dtype, rounded before they are scaled and after."""
    return (products.to(dtype).float() * scale).to(dtype).float()


def probabilities(products: Tensor, takes_part: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Softmax over the last dimension in fp64, of scores in a dtype; 0 for what takes no part."""
    scores = products.double() * scale if dtype == torch.float32 else scaled(products, scale, dtype).double()
    scores = scores.masked_fill(~takes_part, float("-inf"))
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return weights / weights.sum(-1, keepdim=True)


def assert_probabilities(p: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """That fp32 probabilities are those of ``probabilities``, or in a narrower dtype what these round to, closely."""
    assert torch.equal(p, p.to(dtype).float())
    if dtype == torch.float32:
        assert error(p, expected) < 1e-6
        torch.testing.assert_close(p.double(), expected, rtol=5e-6, atol=1e-12)
    else:
        info = torch.finfo(dtype)
        torch.testing.assert_close(
            p.double(), expected, rtol=0.51 * info.eps, atol=0.51 * info.smallest_normal * info.eps
        )
