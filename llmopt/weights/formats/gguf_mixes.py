"""The names that llama-quantize gives to mixes of GGUF's tensor types, and which type each of them gives to a tensor.

A name such as `q4_k_m` says what most of a file is in. More bits go to the tensors that suffer most, the values and
the down projection of some layers, and to the head; the rules are those of llama.cpp (`src/llama-quant.cpp`), so that
a file here has the sizes that its name makes one expect.
"""

from collections.abc import Callable
from dataclasses import dataclass

from llmopt.weights.gguf_file import TENSOR_TYPES

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
VALUE, DOWN = "self_attn.v_proj.weight", "mlp.down_proj.weight"
MANY_LAYERS = 80  # the models of 70 billion weights: their values are few, so that more bits for them cost little


def _never(layer: int, layers: int) -> bool:
    return False


def _first_eighth(layer: int, layers: int) -> bool:
    return layer < layers // 8


def _first_four(layer: int, layers: int) -> bool:
    return layer < 4


def _ends_and_thirds(layer: int, layers: int) -> bool:
    """The first and last eighth of the layers, and every third between them."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


@dataclass(frozen=True)
class Mix:
    """One name.

    Attributes:
        file_type: llama.cpp's number for it, which goes into a file as `general.file_type`.
        usual: the type of matrices that nothing below says otherwise of.
        more: the type of values and down projections in the layers that `more_values` and `more_downs` choose; both
            are given a layer and the number of layers.
        head: the type of the head, also of the embedding where it is the head too.
        embedding: the type of an embedding that is not the head too; None for the usual one.
    """

    file_type: int
    usual: str
    head: str = "Q6_K"
    embedding: str | None = None
    more: str = ""
    more_values: Callable[[int, int], bool] = _never
    more_downs: Callable[[int, int], bool] = _never


# fmt: off
MIXES = {
    "f16":    Mix(1, "F16", head="F16"),
    "bf16":   Mix(32, "BF16", head="BF16"),
    "q8_0":   Mix(7, "Q8_0", head="Q8_0"),
    "q4_0":   Mix(2, "Q4_0"),
    "q4_1":   Mix(3, "Q4_1"),
    "q5_0":   Mix(8, "Q5_0"),
    "q5_1":   Mix(9, "Q5_1"),
    "q4_k_s": Mix(14, "Q4_K", more="Q5_K", more_values=_first_four, more_downs=_first_eighth),
    "q4_k_m": Mix(15, "Q4_K", more="Q6_K", more_values=_ends_and_thirds, more_downs=_ends_and_thirds),
    "q5_k_s": Mix(16, "Q5_K"),
    "q5_k_m": Mix(17, "Q5_K", more="Q6_K", more_values=_ends_and_thirds, more_downs=_ends_and_thirds),
    "q6_k":   Mix(18, "Q6_K"),
    "mxfp4":  Mix(38, "MXFP4", head="Q8_0", embedding="Q8_0"),
}
# fmt: on
"""Every mix by its name. Only `mxfp4` goes its own way: llama-quantize gives MXFP4 to experts alone."""

FILE_TYPES = {name: mix.file_type for name, mix in MIXES.items()} | {"q4_k": 14, "q5_k": 16}
"""llama.cpp's numbers for `general.file_type`; a single K-quant for all layers is nearest to the small mix of it."""

_FALLBACKS = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
"""What takes the place of a K-quant where its blocks do not divide a row."""

_BLOCKS = {name: block for name, block, _ in TENSOR_TYPES.values()}


def tensor_type(
    mix: str, name: str, layer: int | None, shape: tuple[int, ...], *, layers: int, tied: bool, grouped: bool
) -> str:
    """ggml's name of the type of a parameter. Raises KeyError for an unknown mix.

    Args:
        name: the parameter's Hugging Face name, in full or within its layer.
        layer: its decoder layer, None for a parameter of none.
        shape: as torch has it.
        layers: how many the model has.
        tied: whether the embedding is the head too.
        grouped: whether query heads share key and value heads.
    """
    if len(shape) == 1:
        return "F32"
    wanted = _wanted(MIXES[mix], name, layer, layers, tied, grouped)
    if shape[-1] % _BLOCKS[wanted]:
        wanted = _FALLBACKS.get(wanted, "F16")
    return wanted if shape[-1] % _BLOCKS[wanted] == 0 else "F16"


def _wanted(mix: Mix, name: str, layer: int | None, layers: int, tied: bool, grouped: bool) -> str:
    """The type where every type fits."""
    if name == HEAD or (tied and name == EMBEDDING):
        return mix.head
    if name == EMBEDDING:
        return mix.embedding or mix.usual
    if layer is not None and name.endswith(DOWN) and mix.more_downs(layer, layers):
        return mix.more
    if layer is None or not name.endswith(VALUE):
        return mix.usual
    wanted = mix.more if mix.more_values(layer, layers) else mix.usual
    return "Q5_K" if wanted == "Q4_K" and layers == MANY_LAYERS and grouped else wanted
