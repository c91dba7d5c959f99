"""Weights by name: timm:NAME, and hf:OWNER/NAME of the Hugging Face Hub; and how their pixels were made."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import InputError, nearest
from .pixels import Pixels

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
SETTINGS_FILES = ("config.json", "preprocessor_config.json")  # timm's pretrained_cfg; transformers'
HASH = re.compile(r"[-_][0-9a-f]{8}$")  # at the end of a published file's name
RESAMPLE = {2: "bilinear", 3: "bicubic"}  # PIL's numbers


class WeightsError(InputError):
    """A checkpoint that cannot be read or does not fit the model: says which tensors, and why."""


def from_timm(name: str) -> dict[str, Any]:
    """A pretrained model's state dict. Raises WeightsError."""
    import timm

    if not timm.is_model(name.partition(".")[0]):
        raise WeightsError(f"timm:{name}: timm has no such model{nearest(name, timm.list_models())}")
    try:
        return timm.create_model(name, pretrained=True).state_dict()
    except Exception as error:  # no network, no such weights, no space: each hub client has its own errors
        raise WeightsError(f"timm:{name}: cannot be fetched ({first_line(error)})") from None


def from_hub(name: str) -> Path:
    """OWNER/NAME, or OWNER/NAME/FILE: the first of `WEIGHTS` that it has, or that one, as a file on disk.

    What the Hub's cache holds is taken as it is, without network. Raises WeightsError.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError

    owner, _, rest = name.partition("/")
    model, _, file = rest.partition("/")
    repository, files = f"{owner}/{model}", [file] if file else WEIGHTS
    if not owner or not model:
        raise WeightsError(f"hf:{name}: must be hf:OWNER/NAME, or hf:OWNER/NAME/FILE")
    try:
        for file in files:
            if isinstance(cached := try_to_load_from_cache(repository, file), str):
                return Path(cached)
        for file in files:
            try:
                return Path(hf_hub_download(repository, file))
            except RemoteEntryNotFoundError:
                continue
    except LocalEntryNotFoundError:
        raise WeightsError(
            f"hf:{name}: not in the cache of the Hugging Face Hub, and the Hub cannot be reached (offline?)"
        ) from None
    except Exception as error:  # no such repository, no access, no space
        raise WeightsError(f"hf:{name}: cannot be fetched ({first_line(error)})") from None
    raise WeightsError(f"hf:{name}: holds no {' and no '.join(files)}; hf:OWNER/NAME/FILE names another")


def published_pixels(source: Any) -> Pixels | None:
    """What the publisher of timm:NAME or hf:OWNER/NAME says of them; None: nothing, or no such source."""
    kind, _, name = str(source).partition(":")
    if isinstance(source, Mapping) or kind not in ("timm", "hf"):
        return None
    if kind == "timm":
        import timm

        config = timm.get_pretrained_cfg(name)
        return config and _pixels(config.to_dict(), "mean", "std")
    for file in SETTINGS_FILES:
        try:
            repository = "/".join(name.split("/")[:2])
            values = json.loads(from_hub(f"{repository}/{file}").read_text())
        except (WeightsError, OSError, ValueError):
            continue
        timms = values.get("pretrained_cfg", values)
        pixels = _pixels(timms, "mean", "std") or _pixels(values, "image_mean", "image_std")
        if pixels is not None:
            return pixels
    return None


def pixels_by_name(path: str | Path) -> Pixels | None:
    """Those of the timm models whose name a file has, as `vit_tiny_patch16_224_in1k.safetensors`; None: it
    has no such name, or timm's models of that name differ."""
    import timm

    model, *words = HASH.sub("", Path(path).stem).split(".", 1)
    while model and not (tags := timm.list_pretrained(f"{model}.*")):
        model, _, word = model.rpartition("_")
        words.insert(0, word)
    said = set("_".join(words).split("_")) - {""}
    if not model or said == {"ft"}:  # whatever it was tuned from
        return None
    tags = [tag for tag in tags if said <= set(tag.partition(".")[2].split("_"))]
    every = {published_pixels(f"timm:{tag}") for tag in tags}
    return every.pop() if len(every) == 1 else None


def _pixels(values: Mapping[str, Any], mean: str, std: str) -> Pixels | None:
    try:
        numbers = [tuple(map(float, values[key])) for key in (mean, std)]
    except (KeyError, TypeError, ValueError):
        return None
    said = values.get("interpolation") or RESAMPLE.get(values.get("resample"))
    return Pixels(*numbers, "bicubic" if said == "bicubic" else "bilinear")


def first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
