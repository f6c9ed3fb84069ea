"""AttentionInfluence: how much worse does a text become when the retrieval heads are blinded?

The heads come from key-value samples, the documents from anywhere; both halves can be used alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch.nn.functional import cross_entropy

from headscope.data.natural import bundled, read_documents
from headscope.errors import DataError, ProbeError, refusal
from headscope.probes.active import ActiveProbe, Findings, Unit, Work
from headscope.probes.answers import Mode
from headscope.probes.base import Metric
from headscope.probes.key_values import key_value_trials
from headscope.probes.retrieval import Retrieval
from headscope.probes.trials import Trial, context_of, is_synthetic
from headscope.profile.journal import Journal, digest

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from headscope.scope import Scope

Head = tuple[int, int]
SHARE = 0.05
"""The paper's share of heads that count as retrieval heads."""
ROWS = 512
"""Rows of logits whose loss is taken at a time."""


@dataclass(frozen=True)
class AttentionInfluence(ActiveProbe):
    """Retrieval heads by key-value samples, and what texts lose without them.

    Heads: a prompt holds a JSON object of pairs {random key: sentence} and asks for the value of one key; retrieval_kv is the retrieval
    score (as in probe `retrieval`, set version) of the answers. The top 5 % are the retrieval heads.

    Documents: the reference model is the same model with these heads' weights replaced by uniform ones. With L the mean loss per token,

        influence(document) = (L_reference - L) / L

    (table `attention_influence`). A high value is a text whose tokens follow from far-away ones; the paper keeps the highest fifth of a
    corpus for training, and compares within one domain only. Its figure divides by L_reference; this is its equation, which divides by L.

    Departures: uniform is over the keys that the query may see (1/L over all of them would show a causal model its future); examples come
    from the sample's own object; 16 samples (the paper: 800), of which those answered rightly count (ROUGE-1 recall > `accept`, None: all);
    documents are the bundled essays, or the texts given as data, and long ones are read in windows of the context.
    """

    name: ClassVar[str] = "attention_influence"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("retrieval_kv", "share of the value", "copies the value of the key that was asked for"),
    )
    data: ClassVar[str] = "key-value samples, documents"
    requires: ClassVar[tuple[str, ...]] = ("text", "causal", "generation", "tokenizer")
    cost: ClassVar[str] = "16 prefills with an answer; two passes per document"
    source: ClassVar[str] = "AttentionInfluence, arXiv:2505.07293 (no official code)"

    samples: int = 16
    shots: int = 3
    key_length: int = 32
    pairs: int | None = None
    share: float = SHARE
    accept: float | None = 0.5
    mode: Mode = "decode"
    chat: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise refusal(ProbeError, f"share={self.share!r}", "it is a share of the heads", "pass e.g. share=0.05")

    def measure(self, scope: Scope, data: Any, work: Work) -> Findings:
        """`data`: Trials in place of the key-value samples, or texts in place of the documents."""
        given = isinstance(data, Sequence) and not isinstance(data, str) and bool(data) and isinstance(data[0], Trial)
        limit = context_of(scope, work.context, 50)
        trials = list(data) if given else self.trials(scope, limit, work.seed)
        found = Retrieval(accept=self.accept, mode=self.mode).findings(scope, trials, work, "key-value samples")
        score = found.scores["retrieval"]
        heads = top_share(score, scope.topology.layers, self.share)
        findings = Findings(
            {"retrieval_kv": score},
            {"retrieval_kv_accepted": found.numbers["retrieval_accepted"], "retrieval_kv_masked": float(len(heads))},
            list(found.data),
            {"attention_influence_trials": found.tables["retrieval_trials"]},
            [*found.notes, "masked for the influence: " + ", ".join(f"{layer}.{head}" for layer, head in heads)],
        )
        documents = _documents(scope, None if given else data)
        if documents:
            table = attention_influence(scope, documents, heads, context=limit, journal=work.journal, progress=work.progress)
            findings.tables["attention_influence"] = table
        return findings

    def trials(self, scope: Scope, length: int, seed: int) -> list[Trial]:
        """The key-value samples."""
        return key_value_trials(
            scope,
            length=length,
            samples=self.samples,
            shots=self.shots,
            key_length=self.key_length,
            pairs=self.pairs,
            chat=self.chat,
            seed=seed,
        )


def _documents(scope: Scope, data: Any) -> list[str]:
    """Texts as given; without any the bundled essays, unless the model reads no prose."""
    if data is not None:
        return read_documents(data)[1]
    return [] if is_synthetic(scope) else list(bundled().values())


def top_share(score: Tensor, layers: Sequence[int], share: float = SHARE) -> list[Head]:
    """The heads (layer, head) with the highest scores [L, H], `share` of all there are and at least one; heads that score 0 are none."""
    known = score.isfinite()
    count = max(1, round(share * int(known.sum())))
    order = torch.where(known, score, -math.inf).flatten().argsort(descending=True, stable=True)[:count]
    width = score.shape[1]
    return [(layers[int(place) // width], int(place) % width) for place in order if float(score.flatten()[place]) > 0]


def attention_influence(
    scope: Scope,
    documents: Iterable[str | Tensor],
    heads: Iterable[Head],
    *,
    context: int | None = None,
    mode: Literal["uniform", "zero", "noise"] = "uniform",
    first: int = 0,
    journal: Journal | str | Any = None,
    progress: bool | None = None,
) -> pd.DataFrame:
    """One row per document: `document` (its number, from `first` on), `tokens` that were predicted, `base_loss` and `masked_loss` in nats
    per token, and `influence` = (masked_loss - base_loss) / base_loss, NaN for a document of one token.

    `documents`: texts or token ids [N]; a long one is read in windows of `context` tokens (default: 2,048, or the model's length), the
    first token of each not being predicted. `heads`: who is masked; `mode` as HeadMask. `journal`: a folder that keeps finished documents.
    Raises DataError for an empty document.
    """
    import pandas as pd

    from headscope.interventions import HeadMask

    masked = sorted({(int(layer), int(head)) for layer, head, *_ in heads})
    mask = HeadMask(masked, mode=mode)
    window = context_of(scope, context, 0)
    kept = journal if isinstance(journal, Journal) else Journal(journal)
    work = Work(kept, context, 0, progress, f"influence-{digest([scope.fingerprint, masked, mode, window])}")

    rows = []
    for number, document in work.each(list(enumerate(documents, first)), "influence"):

        def both(document: str | Tensor = document, number: int = number) -> Unit:
            ids = _ids(scope, document, number)
            base = losses(scope, ids, window)
            with scope.intervene(mask):
                reference = losses(scope, ids, window)
            count = len(base)
            return {"tokens": count, "base": float(base.mean()) if count else None, "masked": float(reference.mean()) if count else None}

        unit = work.unit(f"{number}-{digest(document)}", both)
        base, reference = (math.nan if unit[name] is None else unit[name] for name in ("base", "masked"))
        rows.append((number, unit["tokens"], base, reference, (reference - base) / base if base else math.nan))
    return pd.DataFrame(rows, columns=["document", "tokens", "base_loss", "masked_loss", "influence"])


def _ids(scope: Scope, document: str | Tensor, number: int) -> Tensor:
    """[N] ids on the CPU; DataError for an empty document."""
    if isinstance(document, torch.Tensor):
        if document.dim() != 1 or document.is_floating_point() or not document.numel():
            raise refusal(
                DataError, f"document {number}: {list(document.shape)} of {document.dtype}", "ids are integers [N]", "pass one row"
            )
        return document.long().cpu()
    if not document.strip():
        raise refusal(DataError, f"document {number}", "it is empty", "leave it out")
    return scope.encode(document)[0].cpu()


@torch.no_grad()
def losses(scope: Scope, ids: Tensor, window: int) -> Tensor:
    """Loss per predicted token in nats, float64; windows follow one another and each loses its first token."""
    out = [torch.zeros(0, dtype=torch.float64)]
    for part in ids.split(window):
        if len(part) < 2:
            continue
        logits = scope.model(input_ids=part[None].to(scope.device), use_cache=False).logits[0, :-1]
        wanted = part[1:].to(logits.device)
        for rows, right in zip(logits.split(ROWS), wanted.split(ROWS), strict=True):
            out.append(cross_entropy(rows.float(), right, reduction="none").double().cpu())
    return torch.cat(out)
