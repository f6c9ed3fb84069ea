"""Scope: a live model, its tokenizer, and everything headscope can do with the pair.

A scope changes nothing by existing. Capturing, observing and intervening are context managers (or calls that open one) which fasten
themselves to the model and come off again, also after an exception; the attention implementation, the config, the training flag and the
weights of the model stay the user's.

Inputs are checked in `headscope.inputs`, before the model sees them.
"""

from __future__ import annotations

import html
import inspect
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch

from headscope.capture.attach import Attachment
from headscope.capture.hosts import Host, open_host
from headscope.errors import CaptureError, DataError, HeadscopeError, InterventionError, StatisticError, refusal, unknown_name
from headscope.inputs import Data, check_room, check_tables, model_inputs, moved
from headscope.statistics import HeadStatistics, StatisticsRequest
from headscope.statistics.request import expand_names
from headscope.topology import Topology

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.interventions import Intervention
    from headscope.plans import SparsePlan
    from headscope.plans.execute import PlanExecutor
    from headscope.profile import HeadProfile


@dataclass(frozen=True, slots=True)
class Generation:
    """What `Scope.generate` wrote: `ids` [B, N] int64 with the prompt first, `prompt_length` N of the prompt, `text` of the new tokens."""

    text: str | list[str] | None
    ids: Tensor
    prompt_length: int

    @property
    def new_ids(self) -> Tensor:
        """[B, n] the generated ids only."""
        return self.ids[:, self.prompt_length :]

    def __repr__(self) -> str:
        return f"Generation({self.text!r}, {self.new_ids.shape[1]} new tokens after {self.prompt_length})"


class Scope:
    """A model made readable head by head.

    `model`: a loaded `transformers.PreTrainedModel` (language, vision-language, encoder), a diffusers model or pipeline, a TransformerLens
    bridge, an nnsight model, or any torch module that calls scaled_dot_product_attention; it is used as it is, and `scope.model` is the
    torch module underneath. `tokenizer`: a tokenizer, or a processor that holds one; needed for texts only. `name`, `source`, `revision`:
    how the model is called in run cards. `example`: inputs of one forward pass, for a torch module whose attributes do not name its heads.
    Weights may be in any dtype, quantised, spread over devices or offloaded (accelerate): what is read are activations.
    Raises CaptureError for a model whose attention cannot be read, with the reason.

    >>> scope = Scope(model, tokenizer)                                             # doctest: +SKIP
    >>> scope.capture("The cat sat on the mat.", statistics=["entropy"])["entropy"][0].shape  # doctest: +SKIP
    torch.Size([1, 9, 7])
    """

    def __init__(
        self, model: Any, tokenizer: Any = None, *, name: str = "", source: str = "", revision: str = "", example: Any = None
    ) -> None:
        self.host: Host = open_host(model, example)
        self.model: Any = self.host.model
        self.tokenizer = tokenizer
        self.topology: Topology = self.host.topology
        self.name = name or str(getattr(getattr(self.model, "config", None), "_name_or_path", "") or type(self.model).__name__)
        self.source = source
        self.revision = revision
        self._attachment: Attachment = self.host.attachment

    # ---- facts --------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the model's inputs go; for a model whose weights are offloaded (accelerate), where it computes."""
        device: torch.device = self.model.device if self.host.takes_text else next(self.model.parameters(), torch.empty(0)).device
        return device if device.type != "meta" else _execution_device(self.model)

    @property
    def dtype(self) -> torch.dtype:
        """The model's floating-point type."""
        dtype: torch.dtype = self.model.dtype if self.host.takes_text else next(self.model.parameters(), torch.empty(0)).dtype
        return dtype

    @property
    def max_length(self) -> int | None:
        """The longest text the model was made for, in tokens; None where the config names none."""
        if not self.host.takes_text:
            return None
        text = self._text_config
        for field in ("max_position_embeddings", "n_positions", "max_sequence_length", "max_target_positions"):
            value = getattr(text, field, None)
            if isinstance(value, int) and value > 0:
                return value
        return None

    @property
    def _text_config(self) -> Any:
        return self.model.config.get_text_config(decoder=True)

    @property
    def vocabulary(self) -> int | None:
        """Number of token ids the model knows."""
        try:
            embedding = self.model.get_input_embeddings()
        except (AttributeError, NotImplementedError):
            return None
        size = getattr(embedding, "num_embeddings", None)
        return int(size) if size else None

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that two models share only if they are the same model: see `headscope.fingerprint`."""
        from headscope.fingerprint import fingerprint_of

        return fingerprint_of(self.model)

    # ---- inputs -------------------------------------------------------------------------------------------------

    @property
    def text_tokenizer(self) -> Any:
        """The tokenizer itself, also when a processor was given; DataError when there is none."""
        tokenizer = getattr(self.tokenizer, "tokenizer", self.tokenizer)
        if tokenizer is None:
            raise refusal(DataError, "a text", f"{self.name} was scoped without a tokenizer", "pass Scope(model, tokenizer), or token ids")
        if "pixel_values" in getattr(tokenizer, "model_input_names", ()):
            raise refusal(DataError, "a text", f"{self.name} reads pictures", "pass a dict: scope.capture({'pixel_values': ...})")
        return tokenizer

    def encode(self, text: str) -> Tensor:
        """[1, N] int64 ids of a text, on the model's device, with whatever special tokens its tokenizer adds."""
        if not isinstance(text, str):
            raise refusal(DataError, f"a {type(text).__name__}", "encode takes one text", "pass a str")
        if not text.strip():
            raise refusal(DataError, "an empty text", "there is no token to attend to", "pass at least one word")
        ids = torch.tensor([list(self.text_tokenizer(text)["input_ids"])], dtype=torch.int64)
        if not ids.numel():
            raise refusal(DataError, f"the text {text[:40]!r}", "its tokenizer gave no token for it", "pass another text")
        return ids.to(self.device)

    # ---- reading ------------------------------------------------------------------------------------------------

    def request(self, statistics: Any = None, **params: Any) -> StatisticsRequest:
        """A StatisticsRequest from names and parameters (its fields); StatisticError for a parameter that does not exist."""
        if isinstance(statistics, StatisticsRequest):
            if params:
                raise refusal(
                    StatisticError, f"{', '.join(params)} beside a StatisticsRequest", "the request says it all", "use dataclasses.replace"
                )
            return statistics
        known = {field.name for field in fields(StatisticsRequest)} - {"names"}
        for name in params:
            if name not in known:
                raise unknown_name(StatisticError, "parameter of a statistics request", name, known)
        for name in ("layers", "keep"):
            if isinstance(params.get(name), int) or (isinstance(params.get(name), str) and params[name] != "all"):
                params[name] = (params[name],)
            elif isinstance(params.get(name), list | range):
                params[name] = tuple(params[name])
        if params.get("layers") == "all":
            params["layers"] = None
        statistics, params = self.host.completed(statistics, params)
        request = StatisticsRequest(names=expand_names(statistics), **params)
        if request.layers is not None and isinstance(request.keep, tuple):
            measured = {self.topology[layer].name for layer in request.layers}
            for layer in request.keep:
                if self.topology[layer].name not in measured:
                    raise refusal(
                        StatisticError, f"keep={layer!r}", f"only layers {list(request.layers)} are measured", "add it to layers="
                    )
        for layer in (*(request.layers or ()), *(request.keep if isinstance(request.keep, tuple) else ())):
            record = self.topology[layer]
            if record.capturable:
                raise refusal(CaptureError, f"layer {layer!r} ({record.name})", record.capturable, "leave it out")
        return request

    @contextmanager
    def observe(self, statistics: Any = None, *, verify: bool = True, **params: Any) -> Iterator[HeadStatistics]:
        """Measure whatever the model runs inside the block: `with scope.observe() as stats: scope.model.generate(...)`.

        The HeadStatistics is filled when the block ends; each sequence is one of its `passes`. The model runs as it would without:
        same kernels, same masks, same logits to the bit. `verify` recomputes a few rows of each module's first calls and compares
        them with the model's own output. Raises CaptureError for a call that cannot be measured exactly.
        """
        request = self.request(statistics, **params)
        _refuse_checkpointing(self.model)
        observer = self.host.observer(request, verify)
        stats = self.host.result(request)
        stats._why_empty = "the block has not ended"
        try:
            with self._attachment.active("observer", observer):
                yield stats
                observer.forward_ended()
        except BaseException:
            stats._why_empty = "the block ended with an error"
            raise
        stats._fill(observer.passes(), "the model was not run inside the block, or it ran in another thread")

    def capture(
        self,
        data: Data,
        *,
        attention_mask: Tensor | None = None,
        statistics: Any = None,
        chunk: int | None = None,
        generate: int | None = None,
        verify: bool = True,
        beyond_context: bool = False,
        **params: Any,
    ) -> HeadStatistics:
        """Run the model over data and measure its attention.

        `data`: a text, a list of texts (padded to a batch), ids [N] or [B, N], or a dict of model inputs; for a model that does not read
        ids, what its forward takes (a dict, a tuple, one tensor), and for a pipeline a dict of its call's arguments. `statistics`: names
        (None or "passive": all that need nothing else) or a StatisticsRequest; further keywords are its fields. `chunk=n` feeds n tokens
        at a time through a KV cache. `generate=n` lets the model append n tokens greedily (end-of-text does not stop it); their rows
        follow the prompt's, so rows and `tokens` have N + n positions. `beyond_context` allows texts longer than the model was made for.

        Runs without gradients. Raises DataError for unusable data, CaptureError for attention that cannot be measured, StatisticError
        for an unknown statistic.
        """
        request = self.request(statistics, **params)
        for name, value in (("chunk", chunk), ("generate", generate)):
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise refusal(DataError, f"{name}={value!r}", "it counts tokens", f"pass {name}=1 or more, or leave it out")
        if not self.host.takes_text:
            return self._capture_other(data, request, verify, {"attention_mask": attention_mask, "chunk": chunk, "generate": generate})
        inputs = model_inputs(self, data, attention_mask, generate is not None, beyond_context)
        check_room(self, inputs, generate, beyond_context)
        check_tables(request, inputs.get("input_ids"), generate or 0)
        with torch.no_grad(), self.observe(request, verify=verify) as stats:
            if generate is not None:
                self._run_generate(inputs, generate, chunk)
            elif chunk is not None:
                self._run_chunks(inputs, chunk)
            else:
                self._run_once(inputs)
        return stats

    def _capture_other(self, data: Any, request: StatisticsRequest, verify: bool, options: dict[str, Any]) -> HeadStatistics:
        """A run of a model that does not read token ids, over what its own forward (or its pipeline) takes."""
        for name, value in options.items():
            if value is not None:
                raise refusal(DataError, f"{name}=", f"{self.name} does not read token ids", "leave it out, or put it into the inputs")
        if not isinstance(data, Mapping | tuple | list | torch.Tensor):
            model_inputs(self, data, None, False, False)  # refuses
        with torch.no_grad(), self.observe(request, verify=verify) as stats:
            self.host.run(moved(data, self.device))
        return stats

    def _run_once(self, inputs: dict[str, Any]) -> None:
        takes = self._forward_parameters
        if self.model.config.is_encoder_decoder and not {"decoder_input_ids", "decoder_inputs_embeds", "labels"} & inputs.keys():
            raise refusal(
                DataError,
                f"inputs {sorted(inputs)} for {type(self.model).__name__}",
                "an encoder-decoder also needs the tokens its decoder starts from",
                "pass a dict with decoder_input_ids, or generate=n",
            )
        extra: dict[str, Any] = {}
        if "logits_to_keep" in takes:
            extra["logits_to_keep"] = 1
        if "use_cache" in takes and not self.model.config.is_encoder_decoder:
            extra["use_cache"] = False
        self.model(**{**extra, **inputs})

    def _run_chunks(self, inputs: dict[str, Any], chunk: int) -> None:
        self._need_cache("chunk=")
        if set(inputs) - {"input_ids", "attention_mask"}:
            raise refusal(
                DataError,
                f"chunk= with inputs {sorted(inputs)}",
                "only ids and their mask can be cut into chunks",
                "capture it in one pass",
            )
        from transformers import DynamicCache

        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        extra = {"logits_to_keep": 1} if "logits_to_keep" in self._forward_parameters else {}
        cache = DynamicCache(config=self.model.config)
        for start in range(0, ids.shape[1], chunk):
            end = min(start + chunk, ids.shape[1])
            part = {"attention_mask": mask[:, :end]} if mask is not None else {}
            self.model(input_ids=ids[:, start:end], past_key_values=cache, use_cache=True, **part, **extra)

    def _run_generate(self, inputs: dict[str, Any], count: int, chunk: int | None) -> None:
        if not self.model.can_generate():
            raise refusal(CaptureError, f"generate={count}", f"{type(self.model).__name__} cannot generate", "capture without generate=")
        extra: dict[str, Any] = {} if chunk is None else {"prefill_chunk_size": chunk}
        # one token more than asked for: the last token written is never read by the model, and rows are made by reading
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._generate({**inputs}, max_new_tokens=count + 1, min_new_tokens=count + 1, do_sample=False, num_beams=1, **extra)

    def _generate(self, inputs: dict[str, Any], **options: Any) -> Tensor:
        ids = inputs.get("input_ids")
        if "attention_mask" not in inputs and isinstance(ids, torch.Tensor):
            inputs["attention_mask"] = torch.ones_like(ids)
        if "pad_token_id" not in options and getattr(self.model.generation_config, "pad_token_id", None) is None:
            end = getattr(self.model.generation_config, "eos_token_id", None)
            end = end[0] if isinstance(end, list) else end
            options["pad_token_id"] = 0 if end is None else end
        if options.get("do_sample") is False:  # settings of sampling that a checkpoint brings along would only make it warn
            options = {"temperature": None, "top_p": None, "top_k": None, **options}
        for executor in self.executors:
            if "past_key_values" not in options and getattr(executor, "frees", False):
                options["past_key_values"] = executor.new_cache()
        out = self.model.generate(**inputs, **options)
        ids_out: Tensor = out if isinstance(out, torch.Tensor) else out.sequences
        return ids_out

    @property
    def _forward_parameters(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(self.model.forward).parameters

    def _need_cache(self, what: str) -> None:
        causal = all(module.causal for module in self.topology.main)
        if not causal or "past_key_values" not in self._forward_parameters or self.model.config.is_encoder_decoder:
            raise refusal(
                CaptureError, what, f"{type(self.model).__name__} is not a causal model with a KV cache", "capture it in one pass"
            )

    # ---- acting -------------------------------------------------------------------------------------------------

    @contextmanager
    def intervene(self, *interventions: Intervention) -> Iterator[Scope]:
        """Run the model with its attention changed: `with scope.intervene(HeadMask(heads=[(18, 6)])): scope.generate(...)`.

        Edits of heads act in the order of their sites (scores, probabilities, outputs; see `headscope.interventions.stacking`), other
        interventions in the order given, those of an outer block before those of an inner one; the model is as before when the block
        ends. Raises InterventionError for one that does not fit this model, or that conflicts with another; warns when the block ends and
        none ever met a call.
        """
        from headscope.interventions import Intervention

        for one in interventions:
            if not isinstance(one, Intervention):
                raise refusal(
                    InterventionError, repr(one), "it is not an intervention", "pass e.g. headscope.interventions.HeadMask(heads=[(0, 0)])"
                )
        if not interventions:
            raise refusal(InterventionError, "no intervention", "there is nothing to change", "pass at least one")
        bound = [one.bind(self) for one in interventions]
        with ExitStack() as stack:
            for one in bound:
                stack.enter_context(one.opened(self))
            actors = [stack.enter_context(self._attachment.active("intervention", one)) for one in bound]
            yield self
            if not any(actor.served for actor in actors):
                warnings.warn(f"{interventions[0]!r}: the block ended and the model never ran in it, so nothing was changed", stacklevel=3)

    @property
    def interventions(self) -> tuple[Intervention, ...]:
        """The interventions that this thread has open, bound to the model, the outermost first."""
        return tuple(self._attachment.interventions_here())

    @contextmanager
    def executing(self, executor: Any) -> Iterator[Scope]:
        """Let an executor (see `headscope.capture.attach.Executing`) compute attention outputs inside the block."""
        with self._attachment.active("executor", executor):
            yield self

    def execute(
        self, plan: SparsePlan, *, force: bool = False, cache: Literal["model", "free"] = "model", fallback: bool = True
    ) -> AbstractContextManager[PlanExecutor]:
        """Run the model under a sparse plan: `with scope.execute(plan) as run: scope.generate(...)`; `run.report` says what ran how, and
        `run.reasons` why calls were left to the model's own kernel.

        Prefill, chunks, padded batches and decode steps with a KV cache alike; the model is as before when the block ends. With
        `cache="free"` every `scope.generate` in the block uses a cache that drops what no head of a group may see any more; the tokens are
        the same. `run.cache.bytes` is what it holds; a direct call of the model takes `past_key_values=run.new_cache()`.

        On a GPU a call that dense attention would finish sooner is left to the model, which then sees every key; `fallback=False` runs the
        plan there too, for results that depend on no device. Raises PlanError for a plan of another model (`force` lets other weights of
        the same shape pass), and for a cache that this model cannot use.
        """
        from headscope.plans.execute import executing

        return executing(self, plan, force=force, cache=cache, fallback=fallback)

    @property
    def executors(self) -> list[Any]:
        """This thread's executors, the innermost first."""
        return self._attachment.executors_here()

    @property
    def active_besides_plans(self) -> str:
        """What is active on this scope in this thread beside plans, in words; "" for nothing."""
        return self._attachment.active_besides_executors

    def generate(self, prompt: Data, *, max_new_tokens: int = 64, **options: Any) -> Generation:
        """Continue a text or ids; greedy unless do_sample=True. `options` go to the model's own generate()."""
        if not self.host.takes_text or not self.model.can_generate():
            raise refusal(
                CaptureError, type(self.model).__name__, "it cannot generate", "use scope.capture, or a model with a language head"
            )
        inputs = model_inputs(self, prompt, options.pop("attention_mask", None), True, options.pop("beyond_context", False))
        with torch.no_grad():
            ids = self._generate(inputs, max_new_tokens=max_new_tokens, **{"do_sample": False, **options})
        given = inputs.get("input_ids")
        length = 0 if self.model.config.is_encoder_decoder or not isinstance(given, torch.Tensor) else given.shape[1]
        text: str | list[str] | None = None
        if self.tokenizer is not None:
            texts = [str(self.text_tokenizer.decode(row[length:], skip_special_tokens=True)) for row in ids]
            text = texts[0] if len(texts) == 1 else texts
        return Generation(text, ids.cpu(), length)

    def profile(self, probes: Any = "passive", context: int | None = 2048, data: Any = None, **options: Any) -> HeadProfile:
        """What every head does: see `headscope.profile.runner.profile`."""
        from headscope.profile.runner import profile

        return profile(self, probes=probes, context=context, data=data, **options)

    # ---- showing ------------------------------------------------------------------------------------------------

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copying and pickling are refused: a Scope is fastened to one live model, and a copy of it would measure nothing."""
        raise refusal(
            CaptureError,
            f"a copy or pickle of {self!r}",
            "a Scope is fastened to one live model",
            "copy or save the model, and make a Scope of it: Scope(copy.deepcopy(scope.model), scope.tokenizer)",
        )

    def __repr__(self) -> str:
        return f"Scope({self.name!r}, {self.topology!r}, {str(self.dtype).removeprefix('torch.')}, {self.device})"

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        rows = [
            ("model", f"{self.name} ({type(self.model).__name__})"),
            ("attention", repr(self.topology)),
            ("host", "" if self.host.kind == "transformers" else self.host.kind),
            ("implementation", str(getattr(getattr(self.model, "config", None), "_attn_implementation", None) or "")),
            ("dtype, device", f"{str(self.dtype).removeprefix('torch.')}, {self.device}"),
            ("context", str(self.max_length or "no limit named")),
            ("source", " ".join(part for part in (self.source, self.revision) if part)),
        ]
        cells = "".join(
            f"<tr><th style='text-align:left'>{k}</th><td style='text-align:left'>{html.escape(v)}</td></tr>" for k, v in rows if v
        )
        return {"text/plain": repr(self), "text/html": f"<table><tbody>{cells}</tbody></table>"}


def _refuse_checkpointing(model: Any) -> None:
    if model.training and any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise refusal(
            CaptureError,
            "a model in training with gradient checkpointing",
            "its layers run a second time in the backward pass and would be counted twice",
            "call model.gradient_checkpointing_disable() or model.eval()",
        )


def _execution_device(model: Any) -> torch.device:
    """Where accelerate's hooks bring a model's weights when they are needed; "meta" for a model that has none."""
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for one in (hook, *getattr(hook, "hooks", ())):
            place = getattr(one, "execution_device", None)
            if place is not None:
                return torch.device(place)
    return torch.device("meta")


__all__ = ["Generation", "HeadscopeError", "Scope"]
