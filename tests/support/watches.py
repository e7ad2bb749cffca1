"""Everything that watches a call: the names of the operators that each of them sees."""

from concurrent.futures import ThreadPoolExecutor

import torch
from torch.autograd import profiler_legacy
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


class Names(TorchDispatchMode):
    """The names of the operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def names_seen(call) -> list[str]:
    with Names() as mode:
        call()
    return [name for name in mode.names if name.startswith("vsa_jit::")]


def names_profiled(call) -> list[str]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return [event.name for event in profile.events() if event.name.startswith("vsa_jit::")]


def names_traced(call) -> list[str]:
    return names_in(make_fx(lambda _: call())(torch.zeros(1)))


def names_traced_before_dispatch(call) -> list[str]:
    return names_in(make_fx(lambda _: call(), pre_dispatch=True)(torch.zeros(1)))


def names_in(traced: torch.fx.GraphModule) -> list[str]:
    return [node.target.name() for node in traced.graph.nodes if str(node.target).startswith("vsa_jit.")]


def names_scripted(call) -> list[str]:
    graph = torch.jit.trace(lambda _: call(), torch.zeros(1), check_trace=False).graph
    return [node.kind() for node in graph.nodes() if node.kind().startswith("vsa_jit::")]


def names_profiled_as_before(call) -> list[str]:
    with profiler_legacy.profile() as profile:
        call()
    return [event.name for event in profile.function_events if event.name.startswith("vsa_jit::")]


def names_profiled_elsewhere(call) -> list[str]:
    """In a thread that another one profiles."""
    config = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    with (
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], experimental_config=config) as profile,
        ThreadPoolExecutor(1) as pool,
    ):
        pool.submit(call).result()
    return [event.name for event in profile.events() if event.name.startswith("vsa_jit::")]


class FunctionNames(TorchFunctionMode):
    """The names of the operators that Python calls."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name() if isinstance(func, torch._ops.OpOverload) else "")
        return func(*args, **(kwargs or {}))


def names_of_functions(call) -> list[str]:
    with FunctionNames() as mode:
        call()
    return [name for name in mode.names if name.startswith("vsa_jit::")]


def names_seen_beside_another_mode(call) -> list[str]:
    """Modes are of a thread, and a mode that another thread leaves changes nothing."""
    with ThreadPoolExecutor(1) as pool:
        other = Names()
        pool.submit(other.__enter__).result()
        with Names() as mode:
            pool.submit(other.__exit__, None, None, None).result()
            call()
    return [name for name in mode.names if name.startswith("vsa_jit::")]


WATCHES = [
    names_seen,
    names_seen_beside_another_mode,
    names_of_functions,
    names_profiled,
    names_profiled_as_before,
    names_profiled_elsewhere,
    names_traced,
    names_traced_before_dispatch,
    names_scripted,
]
