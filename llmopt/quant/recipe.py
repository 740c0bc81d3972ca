"""What exactly is to be done to a model: every choice made, every combination checked, before anything runs."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmopt.backend.select import find_device
from llmopt.errors import InputError
from llmopt.model.architectures import ARCHITECTURES
from llmopt.model.config import ModelConfig
from llmopt.model.decoder import config_groups
from llmopt.model.source import HEAD, layer_name
from llmopt.quant.methods.awq import AWQ
from llmopt.quant.methods.base import Method
from llmopt.quant.methods.gptq import GPTQ
from llmopt.quant.methods.rtn import RoundToNearest
from llmopt.quant.methods.smoothquant import SmoothQuant
from llmopt.quant.mixed_precision import MixedPrecision, mixed_precision
from llmopt.quant.options import KEEP, Export, Options
from llmopt.quant.schemes import choose_schemes, gguf_names, head_scheme, main_scheme, outer_schemes
from llmopt.weights.formats import FORMATS
from llmopt.weights.formats.gguf_mixes import MIXES
from llmopt.weights.scheme import Scheme, nearest

METHODS = ("rtn", "gptq", "awq", "smoothquant")
GGUF = "gguf"
ALL_FORMATS = (*FORMATS, GGUF)
_HOME_FORMAT = {"gptq": "gptq", "awq": "awq"}
SELF = "self"


@dataclass(frozen=True)
class Recipe:
    """The resolved options of one quantization.

    Attributes:
        options: with every default filled in; `llmopt.json` holds them, and they are enough to do the same again.
        main: the scheme that was asked for; of a mix of GGUF types, that of most layers.
        schemes: the scheme of every linear layer that is quantized, by its full name, its group size settled.
        outer: the schemes of embedding and head where they are quantized, by their parameters' names: both in GGUF; the
            head's alone in a folder, where it is asked for.
        calibration: where samples come from, None where none are needed.
        device: `cpu` or `cuda`.
        mixture: where `schemes` are only where a search for better ones within a budget begins, what it may choose.
    """

    options: Options
    main: Scheme
    schemes: Mapping[str, Scheme]
    outer: Mapping[str, Scheme]
    calibration: str | None
    device: str
    mixture: MixedPrecision | None = None

    @property
    def head(self) -> Scheme | None:
        """The scheme of a folder's head; None where it stays as it is, and for GGUF, whose head is rounded as it is
        written."""
        return None if self.options.head is None else self.outer[HEAD]

    @property
    def modules(self) -> dict[str, Scheme]:
        """The scheme of every module that is reported on, by its full name: linear layers, and the head of a folder."""
        head = {} if self.head is None else {HEAD.removesuffix(".weight"): self.head}
        return {**self.schemes, **head}

    def build_method(self, config: ModelConfig) -> Method:
        match self.options.method:
            case "gptq":
                return GPTQ(self.options.damp, self.options.desc_act)
            case "awq":
                return AWQ(config.head_dim, config.norm_offset)
            case "smoothquant":
                return SmoothQuant(config.head_dim, config.norm_offset)
        return RoundToNearest()

    def layer_schemes(self, layer: int) -> dict[str, Scheme]:
        """The schemes of one decoder layer, by the names within it."""
        prefix = layer_name(layer, "")
        return {name.removeprefix(prefix): s for name, s in self.schemes.items() if name.startswith(prefix)}

    def to_dict(self) -> dict[str, Any]:
        return self.options.model_dump(mode="json", exclude={"exports", "spill"})


def resolve(options: Options, config: ModelConfig) -> Recipe:
    """Settle the options against a model. Raises InputError for what does not exist or does not go together."""
    method, known = options.method, METHODS
    if method not in known:
        raise InputError(f"unknown method {method!r}{nearest(method, known)}; known: {', '.join(known)}")
    main = main_scheme(options.scheme)
    exports = tuple(Export(output=e.output, format=_find_format(e, method, main)) for e in options.exports)
    for export in exports:
        _check_output(export)
    gguf = all(export.format == GGUF for export in exports)
    if ARCHITECTURES[config.architecture].gguf_name is None and any(export.format == GGUF for export in exports):
        raise InputError(f"{config.architecture} models are not written to gguf; give --format {', '.join(FORMATS)}")
    is_mix = gguf and options.scheme in MIXES
    main = main.with_group_size(options.group_size) if options.group_size is not None else main
    main = main if is_mix else main.for_widths(config.linear_widths())
    schemes = choose_schemes(options, main, is_mix, config)
    for scheme in {main, *schemes.values()}:
        for export in exports:
            check_combination(method, scheme, str(export.format), options.desc_act)
    mixture = _mixture(options, main, schemes, exports, config)
    outer = outer_schemes(options.scheme, config) if gguf else {}
    outer |= head_scheme(options, [str(export.format) for export in exports], config)
    calibration = options.calibration or (None if method == "rtn" and mixture is None else SELF)
    if calibration is not None:
        _check_calibration(options, config)
    if not gguf:
        _check_shared_inputs(schemes, config)
    settled = options.model_copy(update={"exports": exports, "calibration": calibration})
    device = find_device("auto", options.device)
    return Recipe(settled, main, schemes, outer, calibration, device, mixture)


def check_combination(method: str, scheme: Scheme, format: str, desc_act: bool) -> None:
    """Raise InputError where a method, a scheme and a format do not go together, naming what would."""
    if format == GGUF:
        if not scheme.gguf_type:
            raise InputError(f"gguf does not hold {scheme.name}; it holds {', '.join(gguf_names())}")
    else:
        FORMATS[format].check(scheme)
    if method == "awq" and (scheme.number, scheme.scales, scheme.activations) != ("int", "float16", None):
        raise InputError(f"awq does not go with {scheme.name}; gptq, smoothquant and rtn may")
    if method == "awq" and format == GGUF:
        raise InputError("awq is not written to gguf; gptq and rtn are")
    if method == "smoothquant" and scheme.activations is None and not scheme.is_dense:
        raise InputError(f"smoothquant is for schemes that round activations, w8a8 and fp8, not {scheme.name}")
    if desc_act and (method, format) != ("gptq", "gptq"):
        raise InputError("--desc-act needs --method gptq and --format gptq, the only format with a group index")


def _find_format(export: Export, method: str, scheme: Scheme) -> str:
    is_file = Path(export.output).suffix == ".gguf"
    only_gguf = scheme.gguf_type and not any(scheme.name in format.schemes for format in FORMATS.values())
    name = export.format or (GGUF if is_file or only_gguf else _home_format(method, scheme))
    if name not in ALL_FORMATS:
        raise InputError(f"unknown format {name!r}{nearest(name, ALL_FORMATS)}; known: {', '.join(ALL_FORMATS)}")
    return name


def _home_format(method: str, scheme: Scheme) -> str:
    """The method's own format, where that holds the scheme."""
    home = _HOME_FORMAT.get(method, "compressed-tensors")
    return home if scheme.name in FORMATS[home].schemes or method == "awq" else "compressed-tensors"


def _check_output(export: Export) -> None:
    is_file = Path(export.output).suffix == ".gguf"
    if export.format == GGUF and not is_file:
        raise InputError(f"the gguf format writes one file: give an --output that ends in .gguf, not {export.output}")
    if export.format != GGUF and is_file:
        raise InputError(
            f"{export.output} names a GGUF file, but the format is {export.format}; give a folder or --format gguf"
        )


def _mixture(
    options: Options, main: Scheme, schemes: Mapping[str, Scheme], exports: tuple[Export, ...], config: ModelConfig
) -> MixedPrecision | None:
    if options.target_bpw is None:
        return None
    pinned = {name for name in schemes if any(re.search(override.modules, name) for override in options.overrides)}
    formats = [str(export.format) for export in exports if export.format != GGUF]
    return mixed_precision(options.target_bpw, main, options.group_size, schemes, frozenset(pinned), formats, config)


def _check_calibration(options: Options, config: ModelConfig) -> None:
    if options.samples < 1:
        raise InputError(f"--samples must be at least 1, not {options.samples}")
    if not 8 <= options.seq_len <= config.max_position:
        raise InputError(f"--seq-len must be between 8 and the model's {config.max_position}, not {options.seq_len}")
    if not 0 < options.damp < 1:
        raise InputError(f"--damp must be between 0 and 1, not {options.damp}")


def _check_shared_inputs(schemes: Mapping[str, Scheme], config: ModelConfig) -> None:
    """Runtimes of Hugging Face formats make one operation of the layers that share an input, so these must be alike;
    otherwise the checkpoint would be written and then refused."""
    for layer in range(config.num_layers):
        for members in config_groups(config, layer).values():
            found = [schemes.get(layer_name(layer, module)) for module in members]
            if len(set(found)) > 1:
                kinds = sorted({KEEP if scheme is None else scheme.name for scheme in found})
                raise InputError(
                    f"runtimes make one operation of {', '.join(members)}: give all of them one scheme, or ignore all "
                    f"of them or none, not {' and '.join(kinds)}"
                )
