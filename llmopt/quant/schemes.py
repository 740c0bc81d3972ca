"""Which scheme each weight matrix gets: the one that was asked for, a mix of GGUF's, an override, or none."""

import re
from collections.abc import Iterator, Mapping, Sequence

from llmopt.errors import InputError
from llmopt.model.config import ModelConfig
from llmopt.model.decoder import linear_names
from llmopt.model.source import EMBEDDING, HEAD
from llmopt.quant.options import KEEP, Options, Override
from llmopt.weights.formats import FORMATS
from llmopt.weights.formats.gguf_mixes import MIXES, tensor_type
from llmopt.weights.numbers import INT
from llmopt.weights.scheme import SCHEMES, Scheme, nearest


def main_scheme(name: str) -> Scheme:
    """The scheme of that name; of a mix, the one of most matrices. Raises InputError that lists the known names."""
    known = dict.fromkeys((*SCHEMES, *MIXES))
    if name not in known:
        raise InputError(f"unknown scheme {name!r}{nearest(name, known)}; known: {', '.join(known)}")
    return SCHEMES[name] if name in SCHEMES else SCHEMES[MIXES[name].usual.lower()]


def gguf_names() -> list[str]:
    """The schemes and mixes that a GGUF file holds."""
    return list(dict.fromkeys((*(name for name, scheme in SCHEMES.items() if scheme.gguf_type), *MIXES)))


def choose_schemes(options: Options, main: Scheme, is_mix: bool, config: ModelConfig) -> dict[str, Scheme]:
    """The scheme of every linear layer that is quantized, by its full name, with its group size settled.

    `main` is settled, but where `is_mix` says that the scheme's name is that of a mix. Raises InputError for an
    override's scheme that does not go, and for patterns that match nothing.
    """
    names = linear_names(config)
    ignored = [_pattern("--ignore", pattern, names) for pattern in options.ignore]
    overrides = [(_pattern("an override", o.modules, names), o) for o in options.overrides]
    if is_mix:
        usual = _mixed(options.scheme, {name: config.linear_shape(name) for name in names}, config)
    else:
        usual = dict.fromkeys(names, main)
    schemes: dict[str, Scheme] = {}
    for name in names:
        chosen = usual[name]
        for pattern, override in overrides:
            if pattern.search(name):
                chosen = _overriding(override, config.linear_shape(name)[1])
        if not chosen.is_dense and not any(pattern.search(name) for pattern in ignored):
            schemes[name] = chosen
    return schemes


def outer_schemes(mix: str, config: ModelConfig) -> dict[str, Scheme]:
    """The schemes of embedding and head in a GGUF file, by their parameters' names; a lone type keeps them in Q8_0."""
    shape = (config.vocab_size, config.hidden_size)
    if mix in MIXES:
        return {f"{name}.weight": scheme for name, scheme in _mixed(mix, _outer(shape), config).items()}
    fits = shape[1] % SCHEMES["q8_0"].row_multiple == 0
    return dict.fromkeys((EMBEDDING, HEAD), SCHEMES["q8_0" if fits else "f16"])


def head_scheme(options: Options, formats: Sequence[str], config: ModelConfig) -> dict[str, Scheme]:
    """The scheme that `--head` gives the output layer of folders, by its parameter's name, its group size settled;
    nothing where it is not given. Raises InputError for a format without a place for one, and for a scheme that is not
    of integers for weights alone, or that a format does not hold."""
    name = options.head
    if name is None:
        return {}
    for format in formats:
        if format not in FORMATS:
            raise InputError("--head is for folders: in a GGUF file its types decide, such as --scheme q4_k_m or q8_0")
        if not FORMATS[format].quantizes_head:
            homes = " or ".join(other.name for other in FORMATS.values() if other.quantizes_head)
            raise InputError(f"{format} keeps the head in 16 bits: give --head with --format {homes}")
    known = [scheme for scheme in SCHEMES if all(_suits_head(SCHEMES[scheme], format) for format in formats)]
    if name not in known:
        what = f"{name!r} is no scheme of a head in" if name in SCHEMES else f"unknown scheme {name!r} of a head in"
        where = " and ".join(dict.fromkeys(formats))
        raise InputError(f"{what} {where}{nearest(name, known)}; there are {', '.join(known)}")
    scheme = SCHEMES[name]
    if options.group_size is not None:
        scheme = scheme.with_group_size(options.group_size)
    return {HEAD: scheme.for_widths({config.hidden_size})}


def _suits_head(scheme: Scheme, format: str) -> bool:
    only_weights = scheme.number == INT and not scheme.is_dense and scheme.activations is None
    return only_weights and scheme.name in FORMATS[format].schemes


def _outer(shape: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    return {name.removesuffix(".weight"): shape for name in (EMBEDDING, HEAD)}


def _mixed(mix: str, shapes: Mapping[str, tuple[int, ...]], config: ModelConfig) -> dict[str, Scheme]:
    """What a mix gives to each module, by its full name."""

    def types() -> Iterator[tuple[str, str]]:
        for name, shape in shapes.items():
            layer = int(name.split(".")[2]) if name.startswith("model.layers.") else None
            yield (
                name,
                tensor_type(
                    mix,
                    f"{name}.weight",
                    layer,
                    shape,
                    layers=config.num_layers,
                    tied=config.tie_word_embeddings,
                    grouped=config.num_kv_heads < config.num_heads,
                ),
            )

    return {name: SCHEMES[kind.lower()] for name, kind in types()}


def _overriding(override: Override, width: int) -> Scheme:
    if override.scheme == KEEP:
        return SCHEMES["f16"]
    scheme = SCHEMES.get(override.scheme)
    if scheme is None:
        known = (KEEP, *SCHEMES)
        raise InputError(
            f"unknown scheme {override.scheme!r} in an override{nearest(override.scheme, known)}; known: "
            f"{', '.join(known)}"
        )
    if override.group_size is not None:
        scheme = scheme.with_group_size(override.group_size)
    return scheme.for_widths({width})


def _pattern(what: str, pattern: str, names: list[str]) -> re.Pattern[str]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise InputError(f"{what} {pattern!r} is no regular expression: {error}") from None
    if not any(compiled.search(name) for name in names):
        raise InputError(f"{what} {pattern!r} matches no linear layer; they are named like {names[0]}")
    return compiled
