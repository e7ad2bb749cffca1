"""Calls under PyTorch's function transforms and in traced programs: the same as call by call, derivatives too."""

import importlib

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from support import reference as ref
from support.problems import BACKENDS, INTERPRETED, Case, Inputs
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import vsa_jit

CALLS = 3
GATES = [None, 0.5, 0.0, "full"]
# Of the norm: products of another order, and of another size of the batch.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}


@pytest.fixture(params=BACKENDS, ids=lambda run: "-".join(run))
def run(request):
    return request.param


@pytest.fixture(params=GATES, ids=str)
def gate(request):
    return request.param


class Calls:
    """A function of q, k, v and perhaps a gate, tensors for several calls of it, and what those give one by one."""

    def __init__(self, run, gate, selection_dtype=None):
        self.backend, device = run
        self.selection_dtype = selection_dtype
        self.dtype = torch.float32 if device == "cpu" else torch.float16
        self.gate = gate
        shape = (CALLS, 1, 2, 200, 64)
        count = 4 if gate == "full" else 3
        self.inputs = [torch.randn(shape, dtype=self.dtype, device=device) for _ in range(count)]
        self.dout = torch.randn(shape, dtype=self.dtype, device=device)
        self.of_one = [x[0] for x in self.inputs]
        self.apart = [self.differentiate(self.call, [x[i] for x in self.inputs], self.dout[i]) for i in range(CALLS)]
        self.together = [torch.stack(xs) for xs in zip(*self.apart, strict=True)]

    def call(self, q, k, v, gate=None):
        weight = self.gate if gate is None else gate
        return vsa_jit.video_sparse_attn(
            q,
            k,
            v,
            topk=2,
            compress_attn_weight=weight,
            selection_dtype=self.selection_dtype,
            backend=self.backend,
        )

    @property
    def function(self):
        """With no argument that has a default, for tracers that count arguments."""
        if self.gate == "full":
            return lambda q, k, v, gate: self.call(q, k, v, gate)
        return lambda q, k, v: self.call(q, k, v)

    @staticmethod
    def differentiate(function, inputs, dout):
        """Output and gradients."""
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = function(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, dout)]

    def check(self, results, expected):
        for result, wanted in zip(results, expected, strict=True):
            assert result.shape == wanted.shape
            assert ref.error(result, wanted) <= TOLERANCE[self.dtype]


def test_vmap(run, gate):
    calls = Calls(run, gate)
    calls.check(calls.differentiate(torch.vmap(calls.call), calls.inputs, calls.dout), calls.together)


def test_vmap_of_some_tensors(run):
    """The others are the same in all calls, and get the sum of their gradients."""
    calls = Calls(run, None)
    qs, (_, k, v) = calls.inputs[0], calls.of_one
    results = calls.differentiate(torch.vmap(calls.call, in_dims=(0, None, None)), [qs, k, v], calls.dout)
    apart = [calls.differentiate(calls.call, [q, k, v], dout) for q, dout in zip(qs, calls.dout, strict=True)]
    out, dq, dk, dv = (torch.stack(xs) for xs in zip(*apart, strict=True))
    calls.check(results, [out, dq, dk.sum(0), dv.sum(0)])


def test_vmap_over_sizes_of_blocks(run):
    calls = Calls(run, None)
    q, k, v = (x[..., :192, :] for x in calls.inputs)
    sizes = torch.tensor([[64, 3, 9], [0, 64, 1], [5, 6, 7]], device=q.device)

    def call(q, k, v, sizes):
        return vsa_jit.video_sparse_attn(q, k, v, sizes, topk=2, backend=calls.backend)

    apart = [call(*xs) for xs in zip(q, k, v, sizes, strict=True)]
    calls.check([torch.vmap(call)(q, k, v, sizes)], [torch.stack(apart)])


@pytest.mark.parametrize("dims", [(0, 0, 0), (0, None, None)])
def test_vmap_of_no_calls(dims):
    """As of PyTorch's operators: results without an element."""
    shapes = [(0, 2, 2, 200, 64) if dim == 0 else (2, 2, 200, 64) for dim in dims]
    tensors = [torch.randn(shape) for shape in shapes]
    calls = Calls(("torch", "cpu"), 0.5)
    assert torch.vmap(calls.call, in_dims=dims)(*tensors).shape == (0, 2, 2, 200, 64)
    block_map = torch.ones(4, 4, dtype=torch.bool)
    out, lse = torch.vmap(lambda *x: vsa_jit.block_sparse_attn(*x, block_map), in_dims=dims)(*tensors)
    assert (out.shape, lse.shape) == ((0, 2, 2, 200, 64), (0, 2, 2, 200))


def test_saved_tensors_that_come_back_in_another_order_of_memory(run):
    """As hooks may give them: the same values with other strides."""
    calls = Calls(run, 0.5)

    def restrided(x):
        return x.transpose(1, 2).contiguous().transpose(1, 2) if x.dim() > 2 else x

    def call(*inputs):
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x, restrided):
            return calls.call(*inputs)

    calls.check(calls.differentiate(call, calls.of_one, calls.dout[0]), calls.apart[0])


def traced(calls):
    return make_fx(calls.function)(*calls.of_one)


def traced_before_dispatch(calls):
    return make_fx(calls.function, pre_dispatch=True)(*calls.of_one)


def exported(calls, strict=False):
    class Module(torch.nn.Module):
        def forward(self, *inputs):
            return calls.call(*inputs)

    return torch.export.export(Module(), tuple(calls.of_one), strict=strict).module()


def exported_strictly(calls):
    return exported(calls, strict=True)


def traced_by_jit(calls):
    return torch.jit.trace(calls.function, tuple(calls.of_one), check_trace=False)


def compiled(calls):
    return torch.compile(calls.function, fullgraph=True, backend="aot_eager")


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "program", [traced, traced_before_dispatch, exported, exported_strictly, traced_by_jit, compiled]
)
def test_a_program_that_was_traced_without_gradients_has_them(run, gate, program):
    calls = Calls(run, gate)
    with torch.no_grad():
        function = program(calls)
    calls.check(calls.differentiate(function, calls.of_one, calls.dout[0]), calls.apart[0])


@pytest.mark.parametrize("program", [traced, exported, compiled])
def test_a_program_computes_in_the_selection_dtype(run, program):
    calls = Calls(run, 0.5, torch.bfloat16)
    calls.check(calls.differentiate(program(calls), calls.of_one, calls.dout[0]), calls.apart[0])


def test_machine_code_computes_in_the_selection_dtype(run):
    """Where PyTorch's compiler sees conversions to a narrower dtype and back, it drops them."""
    calls = Calls(run, 0.5, torch.bfloat16)
    compiled_out = torch.compile(calls.function, fullgraph=True)(*calls.of_one)
    calls.selection_dtype = None
    in_fp32, in_bf16 = calls.call(*calls.of_one), calls.apart[0][0]
    assert 10 * ref.error(compiled_out, in_bf16) < ref.error(in_fp32, in_bf16)


def test_vmap_in_a_selection_dtype(run):
    calls = Calls(run, 0.5, torch.bfloat16)
    calls.check(calls.differentiate(torch.vmap(calls.call), calls.inputs, calls.dout), calls.together)


def test_grad(run, gate):
    calls = Calls(run, gate)
    argnums = tuple(range(len(calls.inputs)))

    def loss(*inputs):
        return (calls.call(*inputs).float() * calls.dout[0].float()).sum()

    calls.check(torch.func.grad(loss, argnums)(*calls.of_one), calls.apart[0][1:])


def test_vmap_of_grad(run, gate):
    calls = Calls(run, gate)
    argnums = tuple(range(1, 1 + len(calls.inputs)))

    def loss(dout, *inputs):
        return (calls.call(*inputs).float() * dout.float()).sum()

    calls.check(torch.vmap(torch.func.grad(loss, argnums))(calls.dout, *calls.inputs), calls.together[1:])


def test_compiled_transforms():
    calls = Calls(("torch", "cpu"), 0.5)

    def loss(dout, *inputs):
        return (calls.call(*inputs) * dout).sum()

    transformed = torch.vmap(torch.func.grad(loss, (1, 2, 3)))
    calls.check(
        torch.compile(transformed, fullgraph=True, backend="aot_eager")(calls.dout, *calls.inputs), calls.together[1:]
    )


def test_jacobian_by_rows(run):
    """vmap over the backward of one call."""
    calls = Calls(run, 0.5)

    def mean(q):
        return calls.call(q, *calls.of_one[1:]).float().mean((0, 2, 3))

    units = torch.eye(2, device=calls.dout.device)
    rows = [torch.autograd.functional.vjp(mean, calls.of_one[0], unit)[1] for unit in units]
    calls.check([torch.func.jacrev(mean)(calls.of_one[0])], [torch.stack(rows)])


def test_gradients_through_an_outer_call(run):
    """What an inner transform does not differentiate, the outer one does."""
    calls = Calls(run, 0.5)
    q, k, v = calls.of_one
    leaf = q.detach().requires_grad_()
    out, _ = torch.func.vjp(lambda v: calls.call(leaf, k, v), v)
    calls.check(torch.autograd.grad(out, leaf, calls.dout[0]), [calls.apart[0][1]])


def spy_on(attend, kept):
    def spy(problem, operands, keep_out_s, *others):
        kept.append(keep_out_s)
        return attend(problem, operands, keep_out_s, *others)

    return spy


def test_inference_keeps_nothing(run, monkeypatch):
    """The output of the fine branch is kept where the backward needs it, and nowhere else: not where the gate is a
    number."""
    kept = []
    # On Hopper past the dispatcher, and else.
    names = ["sm90.whole.launch_attend", "sm90.launches.attend"] if run[0] == "sm90" else [f"{run[0]}.launches.attend"]
    for module, function in (name.rsplit(".", 1) for name in names):
        launches = importlib.import_module(f"vsa_jit.backends.{module}")
        monkeypatch.setattr(launches, function, spy_on(getattr(launches, function), kept))
    calls = Calls(run, "full")
    kept.clear()
    calls.call(*calls.of_one)
    make_fx(calls.function)(*calls.of_one)(*calls.of_one)
    with torch.no_grad():
        calls.call(*[x.requires_grad_() for x in calls.of_one])
    Calls(run, 0.5)
    assert len(kept) == 3 + 1 + CALLS
    assert not any(kept)
    calls.call(*calls.of_one)
    assert kept[-1]


@pytest.mark.parametrize("gate", [0.5, 0.0])
def test_checkpoint(run, gate):
    calls = Calls(run, gate)

    def through_checkpoint(*inputs):
        return checkpoint(calls.call, *inputs, use_reentrant=False)

    calls.check(calls.differentiate(through_checkpoint, calls.of_one, calls.dout[0]), calls.apart[0])


TANGENT_CASES = [
    Case("plain", q_len=200, batch=2, heads=4, kv_heads=2, gate="full"),
    Case("cross", q_len=130, kv_len=300, gate=0.5),
    Case("tiled", q_len=192, sizes=(64, 17, 0), gate="full"),
    Case("all empty", q_len=128, sizes=(0, 0)),
    Case("raster", grid=(5, 6, 7), layout="bshd", gate="per channel", topk=3),
    Case("fine only", q_len=200, gate=0.0),
]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("way", ["jvp", "dual", "compiled"])
@pytest.mark.parametrize("case", TANGENT_CASES, ids=lambda case: case.name)
def test_tangent(case, way, device):
    """Against the reference in fp64, whose derivative PyTorch takes."""
    inputs = Inputs(case, device, torch.float32)
    names = ["q", "k", "v"] + (["gate"] if isinstance(inputs.gate, torch.Tensor) else [])
    primals = tuple(getattr(inputs, name).detach() for name in names)
    tangents = tuple(torch.randn_like(x) for x in primals)
    block_map = inputs.block_map()

    def call(q, k, v, gate=inputs.gate):
        return vsa_jit.video_sparse_attn(
            q, k, v, topk=case.topk, compress_attn_weight=gate, backend="torch", **inputs.order
        )

    if way == "dual":
        with fwAD.dual_level():
            duals = [fwAD.make_dual(x, x_t) for x, x_t in zip(primals, tangents, strict=True)]
            out, out_t = fwAD.unpack_dual(call(*duals))
    else:

        def transformed(primals, tangents):
            return torch.func.jvp(call, primals, tangents)

        program = torch.compile(transformed, backend="aot_eager") if way == "compiled" else transformed
        out, out_t = program(primals, tangents)

    def expected(dtype):
        valid = {"q": inputs.q_valid, "k": inputs.kv_valid, "v": inputs.kv_valid}
        clean = []
        for xs in (primals, tangents):
            clean.append([])
            for name, x in zip(names, xs, strict=True):
                x = inputs.bhsd(x).to(dtype)
                if name in valid:
                    x = x.masked_fill(~valid[name].to(device)[:, None], 0.0)
                clean[-1].append(x.nan_to_num(0.0))

        def dense(*xs):
            tensors = dict(zip(names, xs, strict=True))
            return inputs.dense(tensors, block_map)

        return torch.func.jvp(dense, tuple(clean[0]), tuple(clean[1]))

    reference, plain = expected(torch.float64), expected(torch.float32)
    for name, x, wanted, by_plain in zip(("out", "out_t"), (out, out_t), reference, plain, strict=True):
        ref.assert_close(name, inputs.bhsd(x), wanted, by_plain)
    padding = inputs.bhsd(out_t)[:, :, ~inputs.q_valid.to(device)]
    assert torch.equal(padding, torch.zeros_like(padding))


def test_a_tangent_inside_one_of_something_else():
    """Two levels, and the call depends on one of them alone."""
    calls = Calls(("torch", "cpu"), 0.5)
    q, k, v = calls.of_one

    def inner(scale):
        return scale * torch.func.jvp(lambda q: calls.call(q, k, v), (q,), (q,))[1]

    scaled = torch.func.jvp(inner, (torch.tensor(3.0),), (torch.tensor(2.0),))
    torch.testing.assert_close(scaled, (inner(3), inner(2)))


def test_tangent_of_lse_and_of_one_input_alone():
    calls = Calls(("torch", "cpu"), None)
    q, k, v = calls.of_one
    block_map = torch.rand(2, 4, 4) < 0.5

    def attend(k):
        return vsa_jit.block_sparse_attn(q, k, v, block_map, backend="torch")

    along = torch.randn_like(k)
    _, (out_t, lse_t) = torch.func.jvp(attend, (k,), (along,))
    step = 1e-2
    ahead, behind = attend(k + step * along), attend(k - step * along)
    for tangent, after, before in zip((out_t, lse_t), ahead, behind, strict=True):
        difference = ((after - before) / (2 * step)).nan_to_num(0.0)
        assert ref.error(tangent.nan_to_num(0.0), difference) < 1e-3


def test_gradient_beside_a_tangent():
    """As training of consistency models takes them: the tangent of a call, and the gradient of its output."""
    calls = Calls(("torch", "cpu"), 0.5)
    leaves = [x.detach().requires_grad_() for x in calls.of_one]
    along = tuple(torch.randn_like(x) for x in leaves)
    out, out_t = torch.func.jvp(calls.call, tuple(leaves), along)
    grads = torch.autograd.grad(out, leaves, calls.dout[0], retain_graph=True)
    calls.check(grads, calls.apart[0][1:])
    by_gradient = sum((grad * x_t).sum() for grad, x_t in zip(grads, along, strict=True))
    torch.testing.assert_close((out_t * calls.dout[0]).sum(), by_gradient, rtol=1e-3, atol=1e-3)
    with pytest.raises(NotImplementedError, match=r"vsa_jit: .*cannot be differentiated again"):
        out_t.sum().backward()


@pytest.mark.parametrize("run", [*BACKENDS[1:], *INTERPRETED], ids=lambda run: "-".join(run))
def test_a_tangent_on_another_backend_is_refused_by_name(run):
    backend, device = run
    q, k, v = (torch.randn(1, 1, 64, 64, dtype=torch.float16, device=device) for _ in range(3))

    def call(q, k, v):
        return vsa_jit.video_sparse_attn(q, k, v, topk=1, backend=backend)

    with pytest.raises(NotImplementedError, match=rf"vsa_jit: forward-mode .*'torch' only.*runs on '{backend}'"):
        torch.func.jvp(call, (q, k, v), (q, k, v))
    with fwAD.dual_level(), pytest.raises(NotImplementedError, match="vsa_jit: forward-mode"):
        call(q, fwAD.make_dual(k, v), v)


@pytest.mark.parametrize(
    ("derivative", "message"),
    [
        (lambda f, x: torch.func.grad(lambda y: torch.func.grad(f)(y).sum())(x), "cannot be differentiated again"),
        (lambda f, x: torch.func.jvp(torch.func.grad(f), (x,), (x,)), "jvp"),
        (lambda f, x: torch.func.grad(lambda y: torch.func.jvp(f, (y,), (x,))[1])(x), "cannot be differentiated again"),
        (lambda f, x: torch.func.jvp(lambda y: torch.func.jvp(f, (y,), (x,))[1], (x,), (x,)), "jvp"),
        (lambda f, x: torch.func.jacfwd(torch.func.jacfwd(lambda s: f(s * x)))(torch.tensor(1.0)), "jvp"),
    ],
    ids=["grad of grad", "jvp of grad", "grad of jvp", "jvp of jvp", "jacfwd of jacfwd"],
)
def test_second_derivatives_are_refused_by_name(derivative, message):
    calls = Calls(("torch", "cpu"), 0.5)
    _, k, v = calls.of_one
    with pytest.raises(NotImplementedError, match=rf"vsa_jit: .*{message}"):
        derivative(lambda q: calls.call(q, k, v).sum(), calls.of_one[0])
