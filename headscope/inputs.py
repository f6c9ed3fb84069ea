"""What a user passes to a Scope, turned into model inputs, and refused in one clear line where it cannot be.

The silent failures this avoids: a text cut to the model's context, ids of another tokenizer, a batch whose padding nobody masked, labels
made for another text. Everything is checked before the model sees it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch

from headscope.errors import DataError, StatisticError, refusal

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.scope import Scope
    from headscope.statistics import StatisticsRequest

Data = Any
"""What can be captured: a text, texts, ids [N] or [B, N], or a dict of model inputs."""


def reads_ids(scope: Scope) -> bool:
    """Whether the model's forward takes token ids; a vision tower or a diffusion transformer does not."""
    model = scope.model
    return scope.host.takes_text and (model.main_input_name == "input_ids" or "input_ids" in signature(model.forward).parameters)


def model_inputs(scope: Scope, data: Data, attention_mask: Tensor | None, left: bool, beyond_context: bool) -> dict[str, Any]:
    """Model inputs for any kind of data, checked."""
    if not scope.host.takes_text:
        raise refusal(
            DataError,
            f"a {type(data).__name__}",
            f"{scope.name} does not read token ids",
            "pass scope.capture a dict of its forward's arguments, a tuple of them, or one tensor",
        )
    if isinstance(data, Mapping):
        if attention_mask is not None:
            raise refusal(DataError, "attention_mask= beside a dict", "the dict is passed to the model as it is", "put it into the dict")
        inputs = {key: value.to(scope.device) if isinstance(value, torch.Tensor) else value for key, value in data.items()}
        ids = inputs.get("input_ids")
        if isinstance(ids, torch.Tensor):
            _check_ids(scope, ids, inputs.get("attention_mask"), beyond_context)
        return inputs
    if not reads_ids(scope):
        name = scope.model.main_input_name
        raise refusal(DataError, f"a {type(data).__name__}", f"{scope.name} reads {name}", f"pass a dict: scope.capture({{{name!r}: ...}})")
    if isinstance(data, str):
        ids = scope.encode(data)
    elif isinstance(data, Sequence) and data and all(isinstance(one, str) for one in data):
        if attention_mask is not None:
            raise refusal(DataError, "attention_mask= beside texts", "padding of texts makes its own", "pass ids to mask them yourself")
        ids, attention_mask = _padded(scope, [scope.encode(one)[0] for one in data], left)
    else:
        ids = _as_ids(data).to(scope.device)
    mask = None if attention_mask is None else _as_mask(attention_mask, ids).to(scope.device)
    _check_ids(scope, ids, mask, beyond_context)
    inputs = {scope.model.main_input_name if scope.model.main_input_name == "input_ids" else "input_ids": ids}
    if mask is not None:
        inputs["attention_mask"] = mask
    return inputs


def _padded(scope: Scope, rows: list[Tensor], left: bool) -> tuple[Tensor, Tensor | None]:
    """[B, N] ids and mask. Padding follows each text, so that token t of every text stands at position t; a batch that is to
    be continued by generation is padded in front instead, as generate() needs it."""
    length = max(len(row) for row in rows)
    tokenizer = scope.text_tokenizer
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    ids = torch.full((len(rows), length), int(pad), dtype=torch.int64, device=scope.device)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        where = slice(length - len(row), length) if left else slice(0, len(row))
        ids[index, where] = row
        mask[index, where] = 1
    return ids, None if bool(mask.all()) else mask


def _check_ids(scope: Scope, ids: Tensor, mask: Tensor | None, beyond_context: bool) -> None:
    if ids.dim() != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise refusal(DataError, f"ids {list(ids.shape)} of {ids.dtype}", "token ids are integers [N] or [B, N]", "pass a LongTensor")
    if not ids.numel():
        raise refusal(DataError, f"ids of shape {list(ids.shape)}", "there is no token to attend to", "pass at least one token")
    size = scope.vocabulary
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or (size is not None and high >= size):
        wrong = low if low < 0 else high
        raise refusal(
            DataError,
            f"token id {wrong}",
            f"{scope.name} knows ids 0..{(size or 0) - 1}",
            "encode the text with this model's own tokenizer",
        )
    if isinstance(mask, torch.Tensor) and mask.dim() == 2:
        if mask.shape != ids.shape:
            raise refusal(
                DataError,
                f"attention_mask {list(mask.shape)} for ids {list(ids.shape)}",
                "they must agree",
                "pass a mask of the ids' shape",
            )
        if not bool(mask.bool().any(1).all()):
            raise refusal(DataError, "attention_mask", "it hides every token of a sequence", "leave at least one token of each")
    limit = scope.max_length
    table = _position_table(scope)
    if beyond_context and table is not None and ids.shape[1] > table:
        raise refusal(DataError, f"{ids.shape[1]} tokens", f"{scope.name} has a learned table of {table} positions", "pass a shorter text")
    if limit is not None and ids.shape[1] > limit and not beyond_context:
        raise refusal(
            DataError,
            f"{ids.shape[1]} tokens",
            f"{scope.name} was made for {limit}",
            "pass a shorter text, or beyond_context=True if you mean it",
        )


def _position_table(scope: Scope) -> int | None:
    """Length of the main stack's table of learned positions, beyond which the model cannot go; None where positions are computed."""
    limit = scope.max_length
    for name, module in scope.model.named_modules():
        leaf = name.rpartition(".")[2]
        learned = isinstance(module, torch.nn.Embedding) and leaf in ("wpe", "embed_positions", "position_embeddings")
        if learned and limit is not None and limit <= module.num_embeddings <= limit + 2:
            return limit
    return None


def check_room(scope: Scope, inputs: dict[str, Any], generate: int | None, beyond_context: bool) -> None:
    """Raises DataError when a prompt and what is to be generated after it do not fit the model's context."""
    ids = inputs.get("input_ids")
    limit = scope.max_length
    if generate is None or limit is None or beyond_context or not isinstance(ids, torch.Tensor) or scope.model.config.is_encoder_decoder:
        return
    if ids.shape[1] + generate > limit:
        raise refusal(
            DataError,
            f"{ids.shape[1]} tokens and {generate} to generate",
            f"{scope.name} was made for {limit}",
            "generate fewer, or pass beyond_context=True if you mean it",
        )


def moved(data: Any, device: torch.device) -> Any:
    """Inputs with their tensors on the model's device."""
    if isinstance(data, torch.Tensor):
        return data.to(device)
    if isinstance(data, Mapping):
        return {key: moved(value, device) for key, value in data.items()}
    return type(data)(moved(value, device) for value in data) if type(data) in (tuple, list) else data


def _as_ids(data: Data) -> Tensor:
    """[B, N] integer ids from ids [N] or [B, N]; DataError for anything else."""
    try:
        ids = data if isinstance(data, torch.Tensor) else torch.as_tensor(data)
    except (TypeError, ValueError, RuntimeError):
        raise refusal(
            DataError, f"a {type(data).__name__}", "it is neither text nor token ids", "pass str, list[str], ids or a dict of inputs"
        ) from None
    if ids.numel() == 0:
        raise refusal(DataError, f"ids of shape {list(ids.shape)}", "there is no token to attend to", "pass at least one token")
    if ids.is_floating_point() or ids.dtype == torch.bool or ids.dim() not in (1, 2):
        raise refusal(DataError, f"a tensor {list(ids.shape)} of {ids.dtype}", "token ids are integers [N] or [B, N]", "pass a LongTensor")
    return ids.long().reshape(1, -1) if ids.dim() == 1 else ids.long()


def _as_mask(given: Any, ids: Tensor) -> Tensor:
    """An attention mask beside ids: [N] or [B, N] of zeros and ones, or the model's own 4-D form. DataError for anything else: what a
    model makes of a mask of another shape, or of 0.5, is nobody's intention."""
    try:
        mask = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError):
        raise refusal(DataError, f"attention_mask: a {type(given).__name__}", "it is no mask", "pass a tensor [B, N] of 0 and 1") from None
    if mask.dim() == 1 and ids.shape[0] == 1:
        mask = mask[None]
    if mask.dim() not in (2, 4):
        raise refusal(DataError, f"attention_mask {list(mask.shape)} for ids {list(ids.shape)}", "they must agree", "pass [B, N]")
    if mask.dim() == 2 and not bool(((mask == 0) | (mask == 1)).all()):
        raise refusal(DataError, "attention_mask", "it holds other values than 0 (padding) and 1 (token)", "pass 0 and 1, or booleans")
    return mask


def check_tables(request: StatisticsRequest, ids: Any, more: int) -> None:
    """Labels, segments and rows that reach past the text, or rows that end before it, belong to another text. The last tokens may have no
    label, and tokens to be generated need neither."""
    if not isinstance(ids, torch.Tensor):
        return
    batch, length = ids.shape
    for name in ("labels", "segments", "rows"):
        table = getattr(request, name)
        if table is None:
            continue
        least = length if name == "rows" else 1
        if not (least <= table.shape[-1] <= length + more and (table.dim() == 1 or len(table) in (1, batch))):
            raise refusal(
                StatisticError,
                f"{name} {list(table.shape)} for ids {list(ids.shape)}",
                "they are given per position, and the text has another number of tokens",
                f"pass [{length}] or [{batch}, {length}]",
            )
