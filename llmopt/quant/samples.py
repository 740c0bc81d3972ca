"""Where the tokens come from that a model is calibrated on."""

from pathlib import Path

import torch
from torch import Tensor

from llmopt.engine.llm import LLM
from llmopt.engine.params import SamplingParams
from llmopt.errors import InputError
from llmopt.model.builtin_text import calibration_text
from llmopt.model.source import ModelSource
from llmopt.progress import Progress

SELF, BUILTIN = "self", "builtin"
SAMPLED_AT_ONCE = 64


def calibration_tokens(
    calibration: str, source: ModelSource, samples: int, seq_len: int, seed: int, device: str, progress: Progress
) -> Tensor:
    """int64 [samples, seq_len] tokens to calibrate on.

    `calibration` is a text file, `builtin` for prose that every Python carries, or `self` for text that the model
    samples from itself (Liu et al. 2023, "LLM-QAT", arXiv:2305.17888). Texts are cut into windows, of which `samples`
    are drawn without repetition. Raises InputError where the text is too short.
    """
    if calibration == SELF:
        return _sample_from_model(source, samples, seq_len, seed, device, progress)
    text = calibration_text() if calibration == BUILTIN else read_text(calibration)
    tokens = source.tokenizer.encode(text, add_special_tokens=False)
    windows = len(tokens) // seq_len
    if windows < samples:
        raise InputError(
            f"the calibration text has {len(tokens)} tokens, too few for {samples} samples of {seq_len}; give a longer "
            f"text, or --samples of at most {windows}"
        )
    chosen = torch.randperm(windows, generator=torch.Generator().manual_seed(seed))[:samples].sort().values
    return torch.tensor(tokens[: windows * seq_len]).reshape(windows, seq_len)[chosen]


def read_text(path: str) -> str:
    """The content of a text file. Raises InputError where it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"there is no file {path}; give a text file, {SELF!r} or {BUILTIN!r}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as UTF-8 text: {error}") from None


def _sample_from_model(
    source: ModelSource, samples: int, seq_len: int, seed: int, device: str, progress: Progress
) -> Tensor:
    ends = sorted(source.tokenizer.eos_ids)
    opening = [source.tokenizer.bos_id if source.tokenizer.bos_id is not None else ends[0] if ends else 0]
    length = seq_len - len(opening)
    llm = LLM(
        str(source.path),
        max_num_seqs=min(samples, SAMPLED_AT_ONCE),
        max_model_len=seq_len,
        seed=seed,
        device=device,
        dtype="float32",
    )
    params = [SamplingParams(max_tokens=length, ignore_eos=True, seed=seed + i) for i in range(samples)]

    def report(step: int) -> None:
        progress("sampling calibration text", step, length * -(-samples // SAMPLED_AT_ONCE))

    outputs = llm.generate([opening] * samples, params, on_step=report)
    return torch.tensor([opening + output.outputs[0].token_ids for output in outputs])
