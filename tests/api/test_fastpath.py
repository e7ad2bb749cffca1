"""A call that looks like an earlier one takes a shorter way, and gives the same; one that looks different does not."""

import ast
import gc
import itertools
import pkgutil
import re
import weakref
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.utils.checkpoint
from support.problems import Case, Inputs
from support.watches import WATCHES
from support.wrong_arguments import WRONG_CALLS, WRONG_INDICES, indices, qkv

import vsa_jit
from vsa_jit import api, fastpath
from vsa_jit.fastpath import CallCache

call = vsa_jit.block_sparse_attn_from_indices


class Claims(int):
    """A number that says that it is another."""

    def __repr__(self):
        return "64"


class Raises:
    def __repr__(self):
        raise RuntimeError


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(api, "_known_calls", CallCache())


@pytest.fixture
def unchecked(monkeypatch):
    """Makes checks fail, so that only a call that looks like one before it succeeds."""
    return lambda: monkeypatch.setattr(api, "_check", None)


def inputs_of(**changes) -> Inputs:
    inputs = Inputs(Case("seen", **{"q_len": 192, "heads": 4, "kv_heads": 2, **changes}), "cpu", torch.float16)
    for name in "qkv":
        setattr(inputs, name, getattr(inputs, name).detach())
    return inputs


@pytest.mark.parametrize("order", ["plain", "tiled", "raster"])
def test_it_is_not_checked_again_and_right(order, unchecked):
    changes = {
        "plain": {"q_len": 200, "kv_len": 330},
        "tiled": {"sizes": (64, 17, 0)},
        "raster": {"grid": (5, 6, 7), "q_len": 210, "layout": "bshd"},
    }[order]
    for i in range(3):
        inputs = inputs_of(**changes)
        idx, num, block_map = inputs.uneven_indices()
        out, lse = call(inputs.q, inputs.k, inputs.v, idx, num, **inputs.order_of_blocks)
        inputs.check_forward(inputs.bhsd(out), lse, block_map)
        if i == 0:
            unchecked()


@pytest.mark.parametrize(("argument", "changes", "error", "message"), WRONG_CALLS)
def test_a_wrong_argument_is_found_after_a_right_call(argument, changes, error, message):
    call(**qkv(), **indices())
    for _ in range(2):
        with pytest.raises(error, match=message):
            call(**qkv(**changes), **indices())


@pytest.mark.parametrize(("changes", "error", "message"), WRONG_INDICES)
def test_wrong_indices_are_found_after_a_right_call(changes, error, message):
    call(**qkv(), **indices())
    for _ in range(2):
        with pytest.raises(error, match=message):
            call(**qkv(), **indices(**changes))


@pytest.mark.parametrize(
    ("setting", "right", "wrong"),
    [
        ("block_size", 64, 64.0),
        ("block_size", (1, 1, 64), (1.0, 1, 64)),
        ("block_size", 64, Claims(128)),
        ("block_size", 64, Raises()),
        ("softmax_scale", 1, True),
        ("layout", "bhsd", "BHSD"),
        ("backend", "torch", "TORCH"),
    ],
)
def test_a_setting_that_equals_or_resembles_a_right_one_is_wrong(setting, right, wrong):
    call(**qkv(), **indices(), **{setting: right})
    with pytest.raises((TypeError, ValueError), match=rf"({setting}|q2k_idx): expected"):
        call(**qkv(), **indices(), **{setting: wrong})


class Grid(Sequence):
    """A video whose size changes."""

    sides = (5, 6, 7)

    def __len__(self):
        return 3

    def __getitem__(self, axis):
        return self.sides[axis]


def test_a_setting_that_changes_is_looked_at_again():
    inputs, grid = inputs_of(grid=(5, 6, 7), q_len=210), Grid()
    idx, num, _ = inputs.uneven_indices()
    call(inputs.q, inputs.k, inputs.v, idx, num, grid=grid)
    grid.sides = (5, 6, 8)
    with pytest.raises(ValueError, match="grid: expected"):
        call(inputs.q, inputs.k, inputs.v, idx, num, grid=grid)


def test_lists_are_settings_too(unchecked):
    inputs = inputs_of(grid=(5, 6, 7), q_len=210)
    idx, num, _ = inputs.uneven_indices()
    settings = {"grid": [5, 6, 7], "block_size": [4, 4, 4]}
    first = call(inputs.q, inputs.k, inputs.v, idx, num, **settings)
    unchecked()
    torch.testing.assert_close(call(inputs.q, inputs.k, inputs.v, idx, num, **settings), first, rtol=0, atol=0)


def test_sizes_of_keys_are_not_those_of_queries():
    """Tensors that look alike, as one argument, as the other, and as both."""
    blocks = torch.arange(2, dtype=torch.int32).expand(1, 2, 4, 2)
    tensors, where = qkv(), indices(q2k_idx=blocks, q2k_num=torch.full((1, 2, 4), 2, dtype=torch.int32))
    sizes = torch.tensor([64, 3, 0, 64])
    whole = torch.full_like(sizes, 64)
    with_sizes = {
        name: call(**tensors, **where, variable_block_sizes=of_keys, q_variable_block_sizes=of_queries)
        for name, of_keys, of_queries in (("q", whole, sizes), ("k", sizes, whole), ("both", sizes, sizes.clone()))
    }
    for _ in range(2):
        of_queries = call(**tensors, **where, q_variable_block_sizes=sizes)
        of_keys = call(**tensors, **where, variable_block_sizes=sizes)
        of_both = call(**tensors, **where, variable_block_sizes=sizes, q_variable_block_sizes=sizes)
        torch.testing.assert_close(of_queries, with_sizes["q"], rtol=0, atol=0)
        torch.testing.assert_close(of_keys, with_sizes["k"], rtol=0, atol=0)
        torch.testing.assert_close(of_both, with_sizes["both"], rtol=0, atol=0)
    assert not torch.equal(of_keys[0], of_both[0])


def test_the_same_sizes_for_both(unchecked):
    tensors, where = qkv(), indices()
    sizes = torch.tensor([64, 3, 0, 64])
    first = call(**tensors, **where, variable_block_sizes=sizes, q_variable_block_sizes=sizes)
    unchecked()
    again = call(**tensors, **where, variable_block_sizes=sizes, q_variable_block_sizes=sizes)
    torch.testing.assert_close(again, first, rtol=0, atol=0)


def test_a_tensor_that_is_there_twice():
    tensors = qkv()
    tensors["v"] = tensors["k"]
    apart = qkv(q=tensors["q"], k=tensors["k"], v=tensors["k"].clone())
    for _ in range(2):
        torch.testing.assert_close(call(**tensors, **indices()), call(**apart, **indices()), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_gradients_are_recorded_after_a_call_without(name):
    tensors, where = qkv(), indices()
    for _ in range(2):
        assert not call(**tensors, **where)[0].requires_grad
    tensors[name].requires_grad_()
    with torch.no_grad():
        # A leaf that needs a gradient looks the same where none is recorded.
        for _ in range(2):
            assert not call(**tensors, **where)[0].requires_grad
    for _ in range(2):
        out, _ = call(**tensors, **where, backend="auto")
        assert "attend" in out.grad_fn.name()
    out.sum().backward()
    assert tensors[name].grad is not None


def test_checkpoint():
    """Runs without gradients first."""
    tensors, where = qkv(), indices()
    q = tensors.pop("q").requires_grad_()
    out = torch.utils.checkpoint.checkpoint(lambda q: call(q, **tensors, **where)[0], q, use_reentrant=True)
    out.sum().backward()
    (expected,) = torch.autograd.grad(call(q, **tensors, **where)[0].sum(), q)
    torch.testing.assert_close(q.grad, expected)


@pytest.mark.parametrize("watch", WATCHES)
def test_who_watches_sees_a_call_that_looks_like_one_before(watch):
    tensors, where = qkv(), indices()
    call(**tensors, **where)
    assert watch(lambda: call(**tensors, **where)) == ["vsa_jit::attend"]


def test_it_is_compiled_as_a_whole():
    tensors, where = qkv(), indices()
    eager = call(**tensors, **where)
    compiled = torch.compile(lambda: call(**tensors, **where), fullgraph=True)
    torch.testing.assert_close(compiled(), eager, rtol=1e-5, atol=1e-6)


def test_autocast_changes_nothing():
    tensors, where = qkv(), indices()
    expected = call(**tensors, **where)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(call(**tensors, **where), expected, rtol=0, atol=0)


def test_views_that_pytorch_negates_when_they_are_read():
    tensors, where = qkv(), indices()
    call(**tensors, **where)
    expected = call(**{**tensors, "q": -tensors["q"]}, **where)
    lazy = call(**{**tensors, "q": torch._neg_view(tensors["q"])}, **where)
    torch.testing.assert_close(lazy, expected, rtol=0, atol=0)


def test_inference_mode():
    tensors, where = qkv(), indices()
    expected = call(**tensors, **where)
    for _ in range(2):
        with torch.inference_mode():
            out, lse = call(**tensors, **where)
        assert out.is_inference()
        torch.testing.assert_close((out.clone(), lse.clone()), expected, rtol=0, atol=0)


def test_a_variable_that_changes_is_seen(monkeypatch):
    tensors, where = qkv(), indices()
    call(**tensors, **where)
    monkeypatch.setenv("VSA_JIT_BACKEND", "no such one")
    with pytest.raises(ValueError, match="VSA_JIT_BACKEND: expected one of"):
        call(**tensors, **where)


def test_no_tensor_is_kept():
    tensors = qkv()
    call(**tensors, **indices())
    kept = weakref.ref(tensors.pop("q"))
    gc.collect()
    assert kept() is None


@pytest.mark.parametrize("bound", ["_MOST_KEPT", "_MOST_OF_A_KIND"])
def test_what_is_kept_is_bounded(monkeypatch, bound):
    monkeypatch.setattr(fastpath, bound, 3)
    known = CallCache()
    shape = {"_MOST_KEPT": lambda i: torch.empty(i), "_MOST_OF_A_KIND": lambda i: torch.empty(9 * i)[::i][:9]}[bound]
    for i in range(1, 9):
        known.keep((), [shape(i)], i)
        found = [known.find((), [shape(other)]) for other in range(1, 9)]
        assert found[i - 1] == i
        assert sum(x is not None for x in found) <= 3


def test_without_pytorchs_guards_nothing_is_kept(monkeypatch):
    assert fastpath._tensor_guards() is not None
    monkeypatch.setattr(fastpath, "_tensor_guards", lambda: None)
    known = CallCache()
    x = torch.empty(3)
    known.keep((), [x], 1)
    assert known.find((), [x]) is None


def test_looks():
    """Each of these differs from each other, and is like itself."""
    x = torch.randn(4, 6)
    looks = [
        x,
        x[:, :5],
        x.t(),
        x.view(6, 4),
        x.double(),
        x.to("meta"),
        x.clone().requires_grad_(),
        torch.nn.Parameter(x, requires_grad=False),
        torch._neg_view(x),
        x.to_sparse(),
    ]
    known = CallCache()
    for i, look in enumerate(looks[:-1]):
        known.keep((), [look], i)
    for i, look in enumerate(looks[:-1]):
        assert known.find((), [look]) == i
    assert known.find((), [looks[-1]]) is None
    assert known.find((), ["x"]) is None
    assert all(known.find(("other",), [look]) is None for look in looks)
    pairs = list(itertools.permutations(looks[:2]))
    known.keep((), pairs[0], "pair")
    assert [known.find((), pair) for pair in pairs] == ["pair", None]


def private_names(path: Path) -> set[str]:
    """The names that PyTorch keeps private and a module uses, in full."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    # What the module calls them that it imports.
    imported = {"torch": "torch"}
    for node in nodes:
        if isinstance(node, ast.Import):
            imported |= {name.asname: name.name for name in node.names if name.asname}
        elif isinstance(node, ast.ImportFrom):
            imported |= {name.asname or name.name: f"{node.module}.{name.name}" for name in node.names}
    names = {*imported.values(), *(name.name for node in nodes if isinstance(node, ast.Import) for name in node.names)}
    for node in nodes:
        if isinstance(node, ast.Attribute):
            first, *rest = ast.unparse(node).split(".")
            names.add(".".join([imported.get(first, first), *rest]))
    return {name for name in names if re.fullmatch(r"torch(\.\w+)*\._(?!_)\w+(\.\w+)*", name)}


def test_pytorch_has_every_private_name():
    """Where one is gone, ``fastpath`` says what it was for. Those of CUDA are in a PyTorch for CUDA alone."""
    names = private_names(Path(fastpath.__file__))
    assert {"torch._C._dispatch_keys", "torch.autograd.forward_ad._current_level"} <= names
    assert {"torch._C._dynamo.guards.TensorGuards", "torch._dynamo.patch_dynamo_config"} <= names
    gone = []
    for name in names:
        if torch.backends.cuda.is_built() or not name.startswith("torch._C._cuda_"):
            try:
                pkgutil.resolve_name(name)
            except (AttributeError, ImportError):
                gone.append(name)
    assert not gone


def test_no_other_module_uses_a_private_name():
    root = Path(vsa_jit.__file__).parent
    used = {str(path.relative_to(root)): private_names(path) for path in root.rglob("*.py")}
    assert used.pop("fastpath.py")
    assert {path: names for path, names in used.items() if names} == {}
