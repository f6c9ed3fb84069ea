"""From a configuration to a live model: the class that the checkpoint names, its weights all there, the dtype that suits the device.

The checkpoint's own `architectures` decide the class, so a vision-language model keeps its tower and an encoder its head. Two silent
failures are refused here: weights that are missing (transformers fills them with random numbers and only logs it), and code that
would have to be run from the hub.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from headscope.errors import ModelError, UnavailableError, refusal
from headscope.models.progress import bars_only_on_a_terminal

if TYPE_CHECKING:
    import torch

WRAP = "load it yourself and pass hs.Scope(model, tokenizer)"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip


def pick_device(device: str | torch.device | None) -> Any:
    """A torch.device, or "auto" (accelerate spreads the model). None takes CUDA where there is one."""
    import torch

    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device == "auto":
        return "auto"
    try:
        picked = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise refusal(
            ModelError, f"device {device!r}", "torch does not know it", 'pass "cpu", "cuda", "cuda:1", "mps" or "auto"'
        ) from error
    if picked.type == "cuda" and (not torch.cuda.is_available() or (picked.index or 0) >= torch.cuda.device_count()):
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        raise refusal(UnavailableError, f"device {device}", f"this machine has {count} CUDA devices", 'pass device="cpu"')
    return picked


def pick_dtype(dtype: str | torch.dtype | None, device: Any, native: str | torch.dtype | None = None) -> Any:
    """The dtype to load in: the one given; else float32 on CPU (where half precision is slower and rounds), the checkpoint's elsewhere."""
    import torch

    on_cpu = getattr(device, "type", "") == "cpu" or (device == "auto" and not torch.cuda.is_available())
    wanted = dtype if dtype is not None else ("float32" if on_cpu else native or "auto")
    if wanted == "auto":
        return "auto"
    found = getattr(torch, wanted.removeprefix("torch."), None) if isinstance(wanted, str) else wanted
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise refusal(ModelError, f"dtype {dtype!r}", "it is not a floating dtype of torch", 'pass "float32", "bfloat16" or "float16"')
    return found


def model_class(config: Any) -> Any:
    """The transformers class that a configuration names, else the auto class that knows its type."""
    import transformers

    for name in getattr(config, "architectures", None) or []:
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    from transformers.models.auto import modeling_auto as auto

    for mapping, choice in (
        (auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, transformers.AutoModelForImageTextToText),
        (auto.MODEL_FOR_CAUSAL_LM_MAPPING, transformers.AutoModelForCausalLM),
        (auto.MODEL_MAPPING, transformers.AutoModel),
    ):
        if type(config) in mapping:
            return choice
    raise refusal(ModelError, f"model type {getattr(config, 'model_type', '?')!r}", "transformers has no model class for it", WRAP)


def build(
    where: Path, config: Any, *, dtype: Any, device: Any = None, attn_implementation: str | None = None, gguf_file: str | None = None
) -> Any:
    """The model in `where`, in evaluation mode, every weight from the checkpoint. Loader errors pass through; see `first_line`."""
    options: dict[str, Any] = {"config": config, "dtype": dtype, "local_files_only": True, "output_loading_info": True}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if gguf_file is not None:
        options["gguf_file"] = gguf_file
    if device is not None and getattr(device, "type", "") != "cpu":
        options["device_map"] = device if device == "auto" else {"": device}
    with bars_only_on_a_terminal():
        model, info = model_class(config).from_pretrained(where, **options)
    missing = sorted(name for name in info.get("missing_keys", ()) if "pooler." not in name)
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise refusal(
            ModelError,
            f"the checkpoint in {where}",
            f"it lacks {len(missing)} weights of {type(model).__name__} ({shown}), which would be random numbers",
            "use a complete checkpoint",
        )
    return model.eval()


def text_or_processor(where: Path, config: Any) -> Any:
    """The processor of a vision-language model, the image processor of a vision model, the tokenizer of a text model, or None.

    None means that the checkpoint ships none: the Scope then takes token ids or model inputs instead of text.
    """
    import transformers

    has_text = any((where / name).is_file() for name in TOKENIZER_FILES)
    has_images = any((where / name).is_file() for name in ("preprocessor_config.json", "processor_config.json"))
    sees_images = getattr(config, "vision_config", None) is not None
    if has_text and has_images and sees_images:
        return transformers.AutoProcessor.from_pretrained(where, local_files_only=True)
    if has_text:
        return transformers.AutoTokenizer.from_pretrained(where, local_files_only=True)
    if has_images:
        return transformers.AutoImageProcessor.from_pretrained(where, local_files_only=True)
    return None


def first_line(error: BaseException) -> str:
    """The first line of an error's message, for a message of ours."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
