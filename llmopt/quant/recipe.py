"""What exactly is to be done to a model: every choice made, every combination checked, before anything runs."""

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmopt.backend.select import find_device
from llmopt.errors import InputError
from llmopt.model.config import ModelConfig
from llmopt.model.decoder import LINEAR_GROUPS, linear_names
from llmopt.model.source import layer_name
from llmopt.quant.methods.awq import AWQ
from llmopt.quant.methods.base import Method
from llmopt.quant.methods.gptq import GPTQ
from llmopt.quant.methods.rtn import RoundToNearest
from llmopt.weights.formats import FORMATS
from llmopt.weights.scheme import SCHEMES, Scheme, find_scheme, nearest

METHODS = ("rtn", "gptq", "awq")
ALL_FORMATS = (*FORMATS, "gguf")
_HOME_FORMAT = {"gptq": "gptq", "awq": "awq", "rtn": "compressed-tensors"}


@dataclass(frozen=True)
class Recipe:
    """The resolved options of one quantization; `llmopt.json` holds it, and it is enough to do the same again.

    Attributes:
        ignore: regular expressions; a linear layer whose full name one of them matches stays as it is.
    """

    model: str
    output: str
    method: str
    scheme: Scheme
    format: str
    desc_act: bool
    damping: float
    ignore: tuple[str, ...]
    calibration: str
    samples: int
    seq_len: int
    seed: int
    device: str

    def build_method(self) -> Method:
        if self.method == "gptq":
            return GPTQ(self.damping, self.desc_act)
        return AWQ() if self.method == "awq" else RoundToNearest()

    def ignores(self, module: str) -> bool:
        return any(re.search(pattern, module) for pattern in self.ignore)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def resolve(
    config: ModelConfig,
    *,
    model: str,
    output: str,
    method: str,
    scheme: str,
    format: str | None,
    group_size: int | None,
    desc_act: bool,
    damping: float,
    ignore: tuple[str, ...],
    calibration: str,
    samples: int,
    seq_len: int,
    seed: int,
    device: str,
) -> Recipe:
    """Settle the options against a model. Raises InputError for what does not exist or does not go together."""
    chosen = find_scheme(scheme)
    if method not in METHODS:
        raise InputError(f"unknown method {method!r}{nearest(method, METHODS)}; known: {', '.join(METHODS)}")
    format = format or _default_format(method, chosen, output)
    if format not in ALL_FORMATS:
        raise InputError(f"unknown format {format!r}{nearest(format, ALL_FORMATS)}; known: {', '.join(ALL_FORMATS)}")
    check_combination(method, chosen, format, output, desc_act)
    if group_size is not None:
        chosen = chosen.with_group_size(group_size)
    widths = {shape[1] for shape in config.layer_shapes().values() if len(shape) == 2}
    chosen = chosen.for_widths(widths)
    if method != "rtn":
        _check_calibration(samples, seq_len, damping, config)
    for pattern in ignore:
        _check_pattern(pattern, config)
    recipe = Recipe(
        model=model,
        output=output,
        method=method,
        scheme=chosen,
        format=format,
        desc_act=desc_act,
        damping=damping,
        ignore=ignore,
        calibration=calibration,
        samples=samples,
        seq_len=seq_len,
        seed=seed,
        device=find_device("auto", device),
    )
    if chosen.activations is not None:
        _check_shared_inputs(recipe.ignores, config)
    return recipe


def check_combination(method: str, scheme: Scheme, format: str, output: str, desc_act: bool) -> None:
    """Raise InputError where a method, a scheme and a format do not go together, naming what would."""
    is_gguf_file = Path(output).suffix == ".gguf"
    if format == "gguf":
        if not is_gguf_file:
            raise InputError(f"the gguf format writes one file: give an --output that ends in .gguf, not {output}")
        if not scheme.gguf_type:
            raise InputError(f"gguf does not hold {scheme.name}; it holds {', '.join(gguf_schemes())}")
        if method != "rtn":
            raise InputError(f"gguf artifacts are written with --method rtn, not {method}")
    else:
        if is_gguf_file:
            raise InputError(f"{output} names a GGUF file, but the format is {format}; give a folder or --format gguf")
        FORMATS[format].check(scheme)
    if method == "awq" and scheme.activations is not None:
        raise InputError(f"awq does not go with {scheme.name}, which rounds activations; rtn does")
    if method == "gptq" and scheme.activations is not None:
        raise InputError(f"gptq does not go with {scheme.name}, which rounds activations; rtn does")
    if desc_act and (method, format) != ("gptq", "gptq"):
        raise InputError("--desc-act needs --method gptq and --format gptq, the only format with a group index")


def gguf_schemes() -> list[str]:
    return [name for name, scheme in SCHEMES.items() if scheme.gguf_type]


def _default_format(method: str, scheme: Scheme, output: str) -> str:
    return "gguf" if scheme.gguf_type or Path(output).suffix == ".gguf" else _HOME_FORMAT[method]


def _check_calibration(samples: int, seq_len: int, damping: float, config: ModelConfig) -> None:
    if samples < 1:
        raise InputError(f"--samples must be at least 1, not {samples}")
    if not 8 <= seq_len <= config.max_position:
        raise InputError(f"--seq-len must be between 8 and the model's {config.max_position}, not {seq_len}")
    if not 0 < damping < 1:
        raise InputError(f"--damp must be between 0 and 1, not {damping}")


def _check_pattern(pattern: str, config: ModelConfig) -> None:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise InputError(f"--ignore {pattern!r} is no regular expression: {error}") from None
    names = linear_names(config)
    if not any(compiled.search(name) for name in names):
        raise InputError(f"--ignore {pattern!r} matches no linear layer; they are named like {names[0]}")


def _check_shared_inputs(ignores: Callable[[str], bool], config: ModelConfig) -> None:
    """Layers that share an input are one operation at run time, which rounds that input for all of them or for none."""
    for layer in range(config.num_layers):
        for members in LINEAR_GROUPS.values():
            ignored = [module for module in members if ignores(layer_name(layer, module))]
            if 0 < len(ignored) < len(members):
                raise InputError(
                    f"w8a8 rounds the input that {', '.join(members)} share: --ignore all of them or none, not only "
                    f"{', '.join(ignored)}"
                )
