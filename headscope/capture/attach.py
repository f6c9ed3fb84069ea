"""Attachment: what a Scope fastens to its model while something is active on it, and takes off again.

Three kinds of actors may be active, any number of each: interventions, an executor (a sparse plan), observers. On every attention call they
act in that order, so that what is executed and what is measured is what the interventions made of the call. An actor belongs to the thread
that opened it; hooks and the seam are put on when the first actor of any thread comes and taken off when the last one goes, whatever
exception ends the block.

Two guards stand here against an attention module that ran without anyone seeing its attention: forward hooks compare, module by module,
what ran with what reached the seam; and models whose code is already compiled are refused, for compiled code no longer asks for its
attention function.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol
from weakref import WeakKeyDictionary

import torch

from headscope.capture import seam
from headscope.capture.calls import HostCall, build_call
from headscope.capture.edited import exact_heads, untold_heads
from headscope.capture.forward import ForwardState, ModuleRun
from headscope.capture.normaliser import Listening
from headscope.capture.tokens import TokenMemory
from headscope.capture.verify import as_heads
from headscope.errors import CaptureError, refusal

if TYPE_CHECKING:
    from torch import Tensor, nn

    from headscope.call import AttentionCall
    from headscope.topology import AttentionModule, Topology

Stage = Literal["intervention", "executor", "observer"]


class Intervening(Protocol):
    """What an intervention does at the seam; see `headscope.interventions.Intervention`."""

    def before(self, call: AttentionCall) -> AttentionCall: ...
    def after(self, call: AttentionCall, output: Tensor) -> Tensor: ...
    def wants_lse(self, call: AttentionCall) -> bool: ...
    def passes_over(self, module: str) -> bool: ...


class Executing(Protocol):
    """What a plan does at the seam: the call's output [B, Nq, Hq, Dv], or None to leave the call to the host."""

    def execute(self, call: AttentionCall) -> Tensor | None: ...


class Observing(Protocol):
    """What an observer does at the seam: it sees each call after it ran and changes nothing."""

    def observe(self, call: AttentionCall, output: Tensor, host: HostCall, run: ModuleRun, state: ForwardState) -> None: ...


@dataclass(slots=True, eq=False)
class Actor:
    """Something active on a scope, in the thread that opened it. `served` counts the calls it acted on."""

    stage: Stage
    what: Any
    thread: int = field(default_factory=threading.get_ident)
    served: int = 0


class Attachment:
    """The fastening of one scope to its model. `modules`: where the topology's names are not paths in the model, the module of each name.

    Other host libraries subclass it: `_fasten_more` puts on what their seam needs, `_read` reads a call, `_not_seen` is their refusal.
    """

    def __init__(self, model: nn.Module, topology: Topology, modules: Mapping[str, nn.Module] | None = None) -> None:
        self._model = model
        self._records: WeakKeyDictionary[nn.Module, AttentionModule] = WeakKeyDictionary()
        for record in topology.modules:
            self._records[model.get_submodule(record.name) if modules is None else modules[record.name]] = record
        self._names = None if modules is not None else tuple(record.name for record in topology.modules)
        self._actors: list[Actor] = []
        self._fastened: ExitStack | None = None
        self._lock = threading.RLock()
        self._local = threading.local()

    # ---- opening and closing ------------------------------------------------------------------------------------

    @contextmanager
    def active(self, stage: Stage, what: Any) -> Iterator[Actor]:
        """Keep an actor active for a `with` block."""
        actor = Actor(stage, what)
        if stage == "intervention":
            from headscope.interventions.stacking import refuse_conflicts

            refuse_conflicts([one.what for one in self._here("intervention")], what)
        with self._lock:
            if self._fastened is None:
                self._fasten()
            self._actors.append(actor)
        seam.count_session(actor.thread, 1)
        try:
            yield actor
        finally:
            seam.count_session(actor.thread, -1)
            with self._lock:
                self._actors.remove(actor)
                if not self.active_here:
                    self._local.__dict__.clear()
                if not self._actors and self._fastened is not None:
                    fastened, self._fastened = self._fastened, None
                    fastened.close()

    @property
    def active_here(self) -> bool:
        """True when this thread has something active."""
        return any(actor.thread == threading.get_ident() for actor in self._actors)

    @property
    def state(self) -> ForwardState:
        """This thread's forward state."""
        if not hasattr(self._local, "state"):
            self._local.state = ForwardState()
        state: ForwardState = self._local.state
        return state

    def module_of(self, record: AttentionModule) -> nn.Module:
        """The live module of a topology's record."""
        return next(module for module, known in self._records.items() if known is record)

    def _here(self, stage: Stage) -> list[Actor]:
        thread = threading.get_ident()
        return [actor for actor in self._actors if actor.stage == stage and actor.thread == thread]

    @property
    def active_besides_executors(self) -> str:
        """What else than plans this thread has open, in words; "" for nothing."""
        stages: tuple[tuple[Stage, str], ...] = (("intervention", "an intervention"), ("observer", "an observer"))
        found = [what for stage, what in stages if self._here(stage)]
        return " and ".join(found)

    def interventions_here(self) -> list[Any]:
        """This thread's interventions, bound to the model, the outermost first."""
        return [actor.what for actor in self._here("intervention")]

    def executors_here(self) -> list[Any]:
        """This thread's executors, the innermost first."""
        return [actor.what for actor in reversed(self._here("executor"))]

    def _fasten(self) -> None:
        from transformers import PreTrainedModel

        self._refuse_changed()
        with ExitStack() as stack:
            for name, module in self._model.named_modules():
                _refuse_compiled(name, module)
                if isinstance(module, PreTrainedModel):
                    stack.callback(module.register_forward_pre_hook(self._model_starts, with_kwargs=True).remove)
                    stack.callback(module.register_forward_hook(self._model_ends, always_call=True).remove)
            capturable = [module for module, record in self._records.items() if not record.capturable]
            for module in capturable:
                # last before the module's own forward, first after it: other hooks may change inputs and outputs
                stack.callback(module.register_forward_pre_hook(self._module_starts, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(self._module_ends, always_call=True, prepend=True).remove)
            stack.enter_context(_uncompiled_generate(self._model))
            self._fasten_more(stack)
            seam.open_seam(self, capturable)
            stack.callback(seam.close_seam, self, capturable)
            self._fastened = stack.pop_all()

    def _refuse_changed(self) -> None:
        """An attention module that was replaced since the scope was made would be missed without a word."""
        for name in self._names or ():
            try:
                known = self._model.get_submodule(name) in self._records
            except AttributeError:
                known = False
            if not known:
                raise refusal(
                    CaptureError,
                    name,
                    "this attention module was replaced or removed since the Scope was made",
                    "make a new Scope of the model",
                )

    def _fasten_more(self, stack: ExitStack) -> None:
        """What another host's seam needs beside the hooks; closing the stack takes it off."""

    # ---- hooks --------------------------------------------------------------------------------------------------

    def _model_starts(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.active_here:
            self.state.enter_model(module, args, kwargs)

    def _model_ends(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.active_here:
            state = self.state
            state.leave_model()
            if not state.models and output is not None:
                for actor in self._here("observer"):
                    actor.what.forward_ended()

    def _module_starts(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.active_here:
            self.state.enter_module(self._records[module], module, args, kwargs)

    def _module_ends(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not self.active_here or not self.state.modules:
            return
        state = self.state
        record = self._records[module]
        run = next((one for one in reversed(state.modules) if one.record is record), None)
        if run is None:
            return
        state.leave_module(run)
        if output is not None and not run.calls:
            raise self._not_seen(record, module)
        if run.calls > 1 and run.rows is not None and run.rows_seen != run.rows:
            raise refusal(
                CaptureError,
                f"{record.name} ({type(module).__name__})",
                f"it called attention {run.calls} times over {run.rows_seen} rows for an input of {run.rows}, so rows have no one place",
                "this model cannot be measured yet",
            )

    def _not_seen(self, record: AttentionModule, module: nn.Module) -> CaptureError:
        """The refusal of a module that ran without its attention having reached the seam."""
        return refusal(
            CaptureError,
            f"{record.name} ({type(module).__name__})",
            "it ran, but its attention never reached transformers' attention interface (its code took another path, e.g. GPT-2's "
            "reorder_and_upcast_attn, or its forward was replaced or compiled)",
            "switch that option off, or call model.set_attn_implementation('sdpa')",
        )

    # ---- the call -----------------------------------------------------------------------------------------------

    def serve(self, run_host: Callable[..., Any], function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """A function that serves one attention call of this scope: interventions, then the executor or the host, then observers."""

        def served(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            host = HostCall.bind(args, kwargs)
            state = self.state
            record = self._records[module]
            run = next((one for one in reversed(state.modules) if one.record is record), None)
            if run is None:  # the module's forward was called without its hooks
                raise refusal(
                    CaptureError,
                    f"{record.name}",
                    "its forward() was called directly, past its hooks, so the positions of its tokens are unknown",
                    "call the module itself, or the model",
                )
            interventions = self._ordered()
            if record.layer is None and not run.cross and self._passed_over(record.name, interventions):
                run.calls += 1
                run.rows_seen += host.query.shape[2]
                return run_host(module, *args, **kwargs)
            call = self._read(host, module, run, state, function, name)
            edited = call
            if interventions:
                call.facts["tokens"] = self._tokens.ids(call, run, state)
            for actor in interventions:
                edited = actor.what.before(edited)
            own = self._execute(edited)
            anew = [] if own is not None or edited is call else untold_heads(edited, call)
            if own is None and len(anew) == call.q.shape[1]:
                own = exact_heads(edited, anew)
            host.ran = own is None
            wanted = self._here("observer") or any(actor.what.wants_lse(edited) for actor in interventions)
            listening = Listening() if host.ran and edited.q.is_cuda and wanted else None
            with listening or nullcontext():
                if own is not None:
                    result: Any = (own, None)
                elif edited is call:
                    result = run_host(module, *args, **kwargs)
                else:
                    result = run_host(module, *_with_edits(host, call, edited), **host.kwargs)
            lse = None if listening is None else listening.lse_of(edited)
            if lse is not None and not anew:
                edited.facts["lse"] = lse
            output = result[0] if isinstance(result, tuple) else result
            if anew and own is None:
                output = _with_heads(output, edited, anew)
                result = (output, *result[1:]) if isinstance(result, tuple) else output
            changed = output
            for actor in interventions:
                heads = actor.what.after(edited, as_heads(changed, edited))
                changed = heads.reshape(output.shape)
                actor.served += 1
            edited.facts.pop("fold", None)  # it holds the call that holds it
            for actor in self._here("observer"):
                actor.what.observe(edited, output, host, run, state)
                actor.served += 1
            run.calls += 1
            run.rows_seen += call.q.shape[2]
            if changed is output:
                return result
            return (changed, *result[1:]) if isinstance(result, tuple) else changed

        return served

    def _passed_over(self, name: str, interventions: list[Actor]) -> bool:
        """Whether nobody has anything to do with a side tower's module, so that its calls need not be read: its layers are small and many,
        and the device waits for each."""
        mine = bool(interventions) and all(actor.what.passes_over(name) for actor in interventions)
        return mine and not self._here("executor") and not self._here("observer")

    def _read(self, host: HostCall, module: nn.Module, run: ModuleRun, state: ForwardState, function: Any, name: str) -> AttentionCall:
        """The AttentionCall of a host's call."""
        return build_call(host, module, run, state, function, name)

    @property
    def _tokens(self) -> TokenMemory:
        """This thread's token ids; forgotten with the last thing active."""
        if not hasattr(self._local, "tokens"):
            self._local.tokens = TokenMemory()
        memory: TokenMemory = self._local.tokens
        return memory

    def _ordered(self) -> list[Actor]:
        """This thread's interventions in the order of their sites."""
        actors = self._here("intervention")
        if len(actors) < 2:
            return actors
        from headscope.interventions.stacking import in_site_order

        by_edit = {id(actor.what): actor for actor in actors}
        return [by_edit[id(what)] for what in in_site_order([actor.what for actor in actors])]

    def _execute(self, call: AttentionCall) -> Tensor | None:
        """The output of an executor, None where none takes the call."""
        for actor in reversed(self._here("executor")):
            output: Tensor | None = actor.what.execute(call)
            if output is not None:
                actor.served += 1
                return output
        return None


def _with_edits(host: HostCall, call: AttentionCall, edited: AttentionCall) -> tuple[Any, ...]:
    """The host's four arguments with edited q, k, v; keys that were cut off (unused room of a static cache) are put back."""

    def put(full: Tensor, old: Tensor | None, new: Tensor | None) -> Tensor:
        if new is None or new is old:
            return full
        if new.shape[2] == full.shape[2]:
            return new
        return torch.cat([new, full[:, :, new.shape[2] :]], 2)

    return edited.q, put(host.key, call.k, edited.k), put(host.value, call.v, edited.v), host.mask


def _with_heads(output: Tensor, call: AttentionCall, heads: list[int]) -> Tensor:
    """The host's output with some heads computed anew, in the host's shape."""
    changed = as_heads(output, call).clone()
    changed[:, :, heads] = exact_heads(call, heads).to(output.dtype)
    return changed.reshape(output.shape)


def _refuse_compiled(name: str, module: nn.Module) -> None:
    compiled = getattr(module, "_compiled_call_impl", None) is not None or type(module).__name__ == "OptimizedModule"
    if compiled:
        raise refusal(
            CaptureError,
            f"{name or type(module).__name__}: a module compiled by torch.compile",
            "compiled code does not ask for its attention function any more, so its attention cannot be seen or changed",
            "use the model as it was before torch.compile",
        )


@contextmanager
def _uncompiled_generate(model: Any) -> Iterator[None]:
    """Keep generate() from compiling the forward pass by itself, as it does for static caches on a GPU."""
    name = "_valid_auto_compile_criteria"
    if not hasattr(model, name):
        yield
        return
    before = vars(model).get(name)
    setattr(model, name, lambda *args, **kwargs: False)
    try:
        yield
    finally:
        if before is None:
            delattr(model, name)
        else:
            setattr(model, name, before)
