"""Every host, the same promises: an exception, nested captures, two models in turn, two threads, and nothing keeps a model alive.

What is compared before and after is everything that a capture may touch: the tables of attention functions of transformers and diffusers,
torch's function and its stack of modes, cloudpickle's registry, and of every module its attributes, its hooks and its configuration.
"""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import cloudpickle
import nnsight
import pytest
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from transformer_lens.model_bridge import TransformerBridge
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from headscope.capture.nnsight import trace_statistics
from headscope.interventions import HeadMask
from headscope.scope import Scope

from .diffusion_models import inputs, sd3
from .test_host_nnsight import words as word_tokenizer
from .test_host_sdpa import net, rows
from .test_host_transformer_lens import words
from .tiny_models import ids, llama, make

__all__ = ["words"]  # a fixture


@dataclass
class Case:
    """A model as its library holds it, the torch module inside, and one run; `size` is how long the input is."""

    given: Any
    module: Any
    run: Callable[[int], None]


def changed(module: Any, seed: int) -> Any:
    """The model with other weights for another seed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in module.parameters():
            if seed and value.dim() > 1:
                value.add_(torch.randn(value.shape, generator=generator) * 0.3)
    return module


def transformers_case(seed: int, tokenizer: Any) -> Case:
    model = changed(make(llama), seed)
    return Case(model, model, lambda size: model(ids(1, size)))


def diffusers_case(seed: int, tokenizer: Any) -> Case:
    model = changed(sd3(), seed)
    return Case(model, model, lambda size: model(**inputs("sd3", batch=size - 5)))


def sdpa_case(seed: int, tokenizer: Any) -> Case:
    model = changed(net(is_causal=True), seed)
    return Case(model, model, lambda size: model(rows(n=size)))


def bridge_case(seed: int, tokenizer: Any) -> Case:
    model = changed(make(llama), seed)
    model.config.architectures = [type(model).__name__]
    bridge = TransformerBridge.boot_transformers("tiny", hf_model=model, tokenizer=tokenizer, device="cpu")
    return Case(bridge, bridge.original_model, lambda size: bridge(ids(1, size)))


def nnsight_case(seed: int, tokenizer: Any) -> Case:
    model = changed(make(llama), seed)
    traced = nnsight.TransformersModel(model, tokenizer=word_tokenizer(), task="text-generation")

    def run(size: int) -> None:
        tokens = ids(1, size)
        with traced.trace(tokens):
            traced.model.layers[0].output.save()

    return Case(traced, model, run)


HOSTS = {
    "transformers": transformers_case,
    "diffusers": diffusers_case,
    "module": sdpa_case,
    "transformer_lens": bridge_case,
    "nnsight": nnsight_case,
}


@pytest.fixture(params=HOSTS)
def build(request, words) -> Callable[[int], Case]:
    """Makes the host's model with weights of a seed."""
    return lambda seed=0: HOSTS[request.param](seed, words)


def state(module: Any) -> dict[str, Any]:
    """Everything that a capture may touch."""
    return {
        "functions": dict(AttentionInterface._global_mapping),
        "own functions": dict(ALL_ATTENTION_FUNCTIONS._local_mapping),
        "masks": dict(AttentionMaskInterface._global_mapping),
        "look-up": AttentionInterface.get_interface,
        "backends": dict(_AttentionBackendRegistry._backends),
        "torch": torch.nn.functional.scaled_dot_product_attention,
        "modes": list(torch.overrides._get_current_function_mode_stack()),
        "by value": set(cloudpickle.list_registry_pickle_by_value()),
        "implementation": getattr(getattr(module, "config", None), "_attn_implementation", None),
        "attributes": [set(vars(part)) for part in module.modules()],
        "classes": [type(part) for part in module.modules()],
        "hooks": [(len(part._forward_hooks), len(part._forward_pre_hooks)) for part in module.modules()],
        "training": [part.training for part in module.modules()],
    }


@contextmanager
def broken(module: Any, error: type[BaseException]) -> Iterator[None]:
    """The last module with weights, below the last attention, raises when it is reached."""

    def fail(*_: Any) -> None:
        raise error("in the middle")

    linear = [part for part in module.modules() if isinstance(part, torch.nn.Linear)][-2]
    handle = linear.register_forward_pre_hook(fail)
    try:
        yield
    finally:
        handle.remove()


def seen(stats: Any) -> list[tuple[int, ...]]:
    """Shape of the first layer's entropy in each pass."""
    return [tuple(one["entropy"][one.layers[0]].shape) for one in stats.passes]


def attempt(case: Case, scope: Scope) -> None:
    with torch.no_grad(), scope.observe("entropy"), scope.intervene(HeadMask(heads=[(0, 0)])):
        case.run(7)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_after_an_exception_inside_the_model(build, error: type[BaseException]) -> None:
    case = build()
    with torch.no_grad():
        case.run(7)  # what the library itself leaves on its first run
    scope = Scope(case.given)
    before = state(case.module)
    with pytest.raises(BaseException, match="in the middle"), broken(case.module, error):
        attempt(case, scope)
    assert state(case.module) == before
    with torch.no_grad(), scope.observe("entropy") as stats:
        case.run(7)
    assert len(seen(stats)) == 1


def test_nested_captures(build) -> None:
    case = build()
    scope = Scope(case.given)
    with torch.no_grad():
        case.run(7)
        before = state(case.module)
        with scope.observe("entropy") as outer:
            case.run(7)
            with scope.observe("entropy") as inner, Scope(case.given).observe("entropy") as other:
                case.run(9)
            case.run(8)
    assert state(case.module) == before
    assert len(seen(outer)) == 3
    assert seen(inner) == seen(other) == seen(outer)[1:2]
    assert len({*seen(outer)}) == 3
    layer = inner.layers[-1]
    assert torch.equal(outer.passes[1]["entropy"][layer], inner["entropy"][layer])


def test_two_models_in_turn_and_at_once(build) -> None:
    first, second = build(0), build(1)
    alone = []
    for case in (first, second):
        with torch.no_grad(), Scope(case.given).observe("entropy") as stats:
            case.run(7)
        alone.append(stats)
    before = state(first.module), state(second.module)
    with torch.no_grad(), Scope(first.given).observe("entropy") as one, Scope(second.given).observe("entropy") as two:
        first.run(7)
        second.run(7)
    assert (state(first.module), state(second.module)) == before
    layer = one.layers[-1]
    assert torch.equal(one["entropy"][layer], alone[0]["entropy"][layer])
    assert torch.equal(two["entropy"][layer], alone[1]["entropy"][layer])
    assert not torch.equal(one["entropy"][layer], two["entropy"][layer])


def test_two_threads_and_a_third_that_only_runs(build) -> None:
    """Two models captured in two threads at the same time; what runs in the main thread meanwhile is nobody's."""
    cases = {7: build(0), 9: build(1)}
    scopes = {size: Scope(case.given) for size, case in cases.items()}
    with torch.no_grad():
        for size, case in cases.items():
            case.run(size)
    before = [state(case.module) for case in cases.values()]
    barrier, found, failures = threading.Barrier(3), {}, []

    def work(size: int) -> None:
        try:
            with torch.no_grad(), scopes[size].observe("entropy") as stats:
                barrier.wait(timeout=60)
                for _ in range(3):
                    cases[size].run(size)
                barrier.wait(timeout=60)
            found[size] = stats
        except BaseException as error:
            failures.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(size,)) for size in cases]
    for thread in threads:
        thread.start()
    barrier.wait(timeout=60)
    outsider = build(2)
    with torch.no_grad():
        outsider.run(8)
    barrier.wait(timeout=60)
    for thread in threads:
        thread.join()
    assert not failures
    assert [state(case.module) for case in cases.values()] == before
    for size, case in cases.items():
        with torch.no_grad(), scopes[size].observe("entropy") as alone:
            case.run(size)
        layer = alone.layers[-1]
        assert seen(found[size]) == seen(alone) * 3
        assert all(torch.equal(one["entropy"][layer], alone["entropy"][layer]) for one in found[size].passes)


def test_a_captured_model_can_be_collected(build) -> None:
    case = build()
    scope = Scope(case.given)
    with torch.no_grad(), scope.observe("entropy", keep="all") as stats:
        case.run(7)
    with torch.no_grad(), scope.intervene(HeadMask(heads=[(0, 0)])):
        case.run(7)
    gone = weakref.ref(case.module)
    del case, scope
    gc.collect()
    assert gone() is None
    assert len(seen(stats)) == 1


@pytest.mark.parametrize("remote", [False, "local"])
def test_inside_a_trace_too(remote: bool | str) -> None:
    """The observer that is sent with a trace: after an exception, for two models in turn, and when the model goes."""
    case, other = nnsight_case(0, None), nnsight_case(1, None)
    scope, tokens = Scope(case.given), ids(1, 8)
    expected = trace_statistics(scope, tokens, statistics="entropy", remote=remote)
    before = state(case.module)
    with pytest.raises(BaseException, match="in the middle"), broken(case.module, RuntimeError):
        trace_statistics(scope, tokens, statistics="entropy", remote=remote)
    assert state(case.module) == before
    second = trace_statistics(Scope(other.given), tokens, statistics="entropy", remote=remote)
    again = trace_statistics(scope, tokens, statistics="entropy", remote=remote)
    assert torch.equal(again["entropy"][1], expected["entropy"][1])
    assert not torch.equal(second["entropy"][1], expected["entropy"][1])
    twin = copy.deepcopy(case.module)
    torch.testing.assert_close(Scope(twin).capture(tokens)["entropy"][1], expected["entropy"][1], atol=1e-5, rtol=1e-5)
    gone = weakref.ref(case.module)
    del case, scope
    gc.collect()
    assert gone() is None
