"""ModelOpt's sparse_attention_config: skip-softmax with layers left dense."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

from headscope.errors import ExportError, refusal
from headscope.export.base import Export, Format
from headscope.export.files import dump, read_json
from headscope.export.fitting import Fitted, layers
from headscope.export.imported import SHOWN, Found, Hints
from headscope.export.words import same
from headscope.plans.dynamic import TopBlocks
from headscope.plans.patterns import BLOCK, Dense, Pattern
from headscope.plans.plan import PlanModel, SparsePlan

NAME = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)(?:\.|$)")


class ModelOpt(Format):
    """The `sparse_attention_config` entry of a model's config.json (NVIDIA/Model-Optimizer, skip-softmax, arXiv:2512.12087): one group with
    target_sparsity, the share of key blocks to skip, and `ignore`, the attention modules left dense. vLLM's and TensorRT-LLM's readers need
    its threshold calibrated: ModelOpt's calibration fills threshold_scale_factor in and keeps `ignore`.
    """

    name: ClassVar[str] = "modelopt"
    title: ClassVar[str] = "ModelOpt skip-softmax config"
    engine: ClassVar[str] = "ModelOpt 0.40 and later (NVIDIA/Model-Optimizer), TensorRT-LLM, vLLM through ModelOpt's plugin"
    reader: ClassVar[str] = "modelopt ... load_from_checkpoint_metadata, match_sparse_config"
    main: ClassVar[str] = "sparse_attention_config.json"
    holds: ClassVar[tuple[str, ...]] = ("which layers are dense", "one share of blocks to skip in all others, chosen per input")
    lacks: ClassVar[tuple[str, ...]] = (
        "heads that differ within a layer",
        "windows, sinks, columns, fixed blocks",
        "shares that differ between layers",
        "calibrated thresholds, which ModelOpt measures",
    )

    def fit(self, plan: SparsePlan, export: Export) -> Fitted:
        """Layers dense, or one share of blocks for all others."""
        fitted = Fitted.of(plan)
        sparse = [members for members in layers(plan.model) if any(not isinstance(fitted.patterns[place], Dense) for place in members)]
        shares = [one.share for members in sparse for one in [fitted.patterns[members[0]]] if isinstance(one, TopBlocks) and one.share]
        length = export.length or plan.parameters.get("length") or SHOWN
        kept = [fitted.patterns[place].density(int(length)) for members in sparse for place in members]
        share = shares[0] if len(set(shares)) == 1 and len(shares) == len(sparse) else round(sum(kept) / len(kept), 4) if kept else 1.0
        chosen: Pattern = TopBlocks(share=1 - (1 - share), rule="exact", block=BLOCK) if 0 < share < 1 else Dense()
        for members in sparse:
            for place in members:
                if not same(fitted.patterns[place], chosen):
                    fitted.change(
                        place, chosen, "skip-softmax skips one share of all key blocks, the same for every head of every sparse layer"
                    )
        fitted.notes += [
            "which blocks are skipped is chosen per input by their largest scores; the share is a target",
            "not calibrated: run ModelOpt's calibration on the model with this entry, which fills in threshold_scale_factor",
            "decoding stays dense: the entry names the prefill only",
        ]
        return fitted

    def encode(self, export: Export) -> dict[str, bytes]:
        """The entry."""
        plan, model = export.patterns(), export.model
        dense = [layer for layer in model.layers if isinstance(plan[layer, 0], Dense)]
        chosen = next((one for one in plan.patterns.values() if isinstance(one, TopBlocks)), None)
        groups: dict[str, Any] = {}
        if chosen is not None:
            groups["group_0"] = {
                "algorithm": "skip_softmax",
                "targets": ["Attention"],
                "ignore": [module_name(export, layer) for layer in dense],
                "target_sparsity": {"prefill": 1 - float(chosen.share or 1.0)},
            }
        return {self.main: dump({"sparse_attention_config": {"config_groups": groups, "producer": {"name": "headscope"}}}, indent=2)}

    def decode(self, path: Path, hints: Hints) -> Found:
        """Dense layers by name, the others with the share."""
        given = read_json(path)
        config = given.get("sparse_attention_config", given) if isinstance(given, dict) else None
        groups = config.get("config_groups") if isinstance(config, dict) else None
        if not isinstance(groups, dict):
            raise refusal(ExportError, str(path), "it has no sparse_attention_config with config_groups", "pass a config.json of ModelOpt")
        group = next((one for one in groups.values() if isinstance(one, dict) and one.get("algorithm") == "skip_softmax"), None)
        if group is None and groups:
            kinds = [one.get("algorithm") for one in groups.values() if isinstance(one, dict)]
            raise refusal(ExportError, str(path), f"its algorithms are {kinds}", "skip_softmax is read")
        ignored = group.get("ignore", []) if group is not None else []
        if not isinstance(ignored, list) or not all(isinstance(one, str) for one in ignored):
            raise refusal(ExportError, str(path), "ignore is no list of names", "correct it")
        dense = {int(found.group(1)) for one in ignored if (found := NAME.search(one))}
        target = group.get("target_sparsity", 0.5) if group is not None else 0.0
        target = target.get("prefill", 0.0) if isinstance(target, dict) else target
        if isinstance(target, bool) or not isinstance(target, int | float) or not 0 <= target <= 1:
            raise refusal(ExportError, str(path), f"target_sparsity {target!r}", "it is a share; correct it")
        model = _model(given, hints, dense, path)
        share = min(max(1 - float(target), NOTHING), 1.0)
        chosen: Pattern = TopBlocks(share=share, rule="exact", block=BLOCK) if share < 1 else Dense()
        patterns: dict[tuple[int, int], Pattern] = {
            place: Dense() if group is None or place[0] in dense else chosen for place in model.places
        }
        notes = ["skip-softmax chooses blocks by their largest scores; here the blocks of largest mass stand for them"]
        return Found(model, SparsePlan(model, patterns, "imported from ModelOpt", {}, tuple(notes)), {}, notes)

    def load(self, export: Export) -> str:
        """Into the model's config.json."""
        return (
            "import json, pathlib; at = pathlib.Path('MODEL_DIRECTORY/config.json')\n"
            f"at.write_text(json.dumps(json.loads(at.read_text()) | json.load(open('{self.main}'))))"
        )


NOTHING = 1e-9


def module_name(export: Export, layer: int) -> str:
    """The attention module of a layer, as the model names it."""
    if export.profile is not None:
        rows = export.profile.table
        found = rows.loc[rows["layer"] == layer, "module"].tolist()
        if found and NAME.search(str(found[0])):
            return str(found[0])
    return f"model.layers.{layer}.self_attn"


def _model(given: Any, hints: Hints, dense: set[int], path: Path) -> PlanModel:
    if hints.model is not None:
        return hints.model
    count, heads = given.get("num_hidden_layers"), given.get("num_attention_heads")
    if not isinstance(count, int) or not isinstance(heads, int) or count < 1 or heads < 1:
        raise refusal(ExportError, str(path), "it does not say how many layers and heads there are", "pass the model with like= (--like)")
    kv_heads = given.get("num_key_value_heads") or heads
    return hints.shape([heads] * count, kv_heads=[int(kv_heads)] * count)
