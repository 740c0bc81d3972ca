"""Recipes in YAML: the options of a quantization, and the gate that its result must pass.

    method: gptq
    scheme: w4a16
    overrides:
      - modules: down_proj
        scheme: w8a16
    exports:
      - output: out/gptq
        format: gptq
      - output: out/vllm
        format: compressed-tensors
    gate:
      file: gates/demo.yaml
      windows: 16

The keys are those of `Options`, and `gate`. Files that a recipe names to be read (its gate, the gate's text, the
calibration text) lie beside the recipe; the model and the outputs are named as on the command line.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from llmopt.errors import InputError
from llmopt.quant.options import Options, Place, Strict, make_options, validated
from llmopt.quant.samples import BUILTIN, SELF

LARGEST = 1 << 18  # bytes; a recipe is written by hand


class GateOptions(Strict):
    """What the result is measured on, and the bounds that it must keep.

    Attributes:
        file: a gate file; None where the bounds stand here, in `version`, `confidence` and `gates` as in such a file.
        text: a UTF-8 text to measure on; None for the built-in one.
        ctx, windows: tokens in a window, and how many.
    """

    file: str | None = None
    version: int = 1
    confidence: float | None = None
    gates: tuple[Mapping[str, Any], ...] = ()
    text: str | None = None
    ctx: int = 1024
    windows: int = 16

    def inline(self) -> dict[str, Any]:
        """The content of a gate file, where there is none."""
        confidence = {} if self.confidence is None else {"confidence": self.confidence}
        return {"version": self.version, **confidence, "gates": [dict(gate) for gate in self.gates]}


@dataclass(frozen=True)
class RecipeFile:
    """A recipe as it was written, without what the command line adds.

    Attributes:
        path: where it is.
        keys: those of `Options` that it gives.
        gate: None where it has none.
    """

    path: Path
    keys: Mapping[str, Any]
    gate: GateOptions | None
    lines: Mapping[Place, int] = field(repr=False)

    def options(self, model: str | None, output: str | None, flags: Mapping[str, Any]) -> Options:
        """The recipe's options, with those of the command line in their place where both give one: `model`; `output`
        and the flag `format`, which are those of the first export; and all other flags, by their names in `Options`.

        Raises InputError, with the line in the file, for a value that is not possible.
        """
        others = {key: value for key, value in flags.items() if key != "format"}
        merged = {**self.keys, **others, **({} if model is None else {"model": model})}
        first = {
            key: value for key, value in (("output", output), ("format", flags.get("format"))) if value is not None
        }
        exports = merged.get("exports") or [{}]
        if first and isinstance(exports, list) and isinstance(exports[0], dict):
            merged["exports"] = [exports[0] | first, *exports[1:]]
        if "model" not in merged:
            raise InputError(f"{self.path} says no model: give MODEL")
        if "exports" not in merged:
            raise InputError(f"{self.path} says no exports: give --output")
        return make_options(self._with_files(merged, flags), self._where)

    def _with_files(self, merged: dict[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
        """With the recipe's calibration text found beside it, if it is there; it may also be a data set's name."""
        named = merged.get("calibration")
        if isinstance(named, str) and "calibration" not in flags and named not in (SELF, BUILTIN):
            beside = self.path.parent / named
            if beside.exists():
                return merged | {"calibration": str(beside)}
        return merged

    def _where(self, place: Place) -> str:
        return _where(self.path, self.lines, place)


def read_recipe(path: str | Path) -> RecipeFile:
    """Read a recipe. Raises InputError, one line with the file's name and the line, for what is none."""
    path = Path(path)
    content, lines = _read_yaml(path)
    gate = content.pop("gate", None)
    return RecipeFile(path, content, None if gate is None else _gate(path, gate, lines), lines)


def _gate(path: Path, given: Any, lines: Mapping[Place, int]) -> GateOptions:
    here = _where(path, lines, ("gate",))
    if isinstance(given, str):
        given = {"file": given}
    if not isinstance(given, dict):
        raise InputError(f"{here}gate must be a gate file's name, or its content with `gates`")
    gate = validated(GateOptions, given, lambda place: _where(path, lines, ("gate", *place)) + "gate: ")
    if (gate.file is None) == (not gate.gates):
        raise InputError(f"{here}gate needs either `file`, a gate file's name, or `gates`")
    if gate.file is not None and not {"version", "confidence"}.isdisjoint(given):
        raise InputError(f"{here}gate: version and confidence stand in {gate.file}, so not here")
    beside = {name: str(path.parent / named) for name in ("file", "text") if (named := getattr(gate, name)) is not None}
    return gate.model_copy(update=beside)


def _where(path: Path, lines: Mapping[Place, int], place: Place) -> str:
    """The beginning of a line that complains about a place, or about what is missing there."""
    while place and place not in lines:
        place = place[:-1]
    return f"{path}, line {lines[place]}: " if place in lines else f"{path}: "


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[Place, int]]:
    """The mapping in a YAML file, and the line of each of its keys and entries."""
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
        text = content.decode("utf-8")
    except OSError as error:
        raise InputError(f"the recipe {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"the recipe {path} is not UTF-8 text") from None
    if len(content) > LARGEST:
        raise InputError(f"the recipe {path} is longer than {LARGEST} bytes, so it is none")
    lines: dict[Place, int] = {}
    try:
        loader = _PlainLoader(text)
        root = loader.get_single_node()
        if root is not None:
            _note_lines(root, (), lines)
        plain = None if root is None else loader.construct_document(root)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = "" if mark is None else f", line {mark.line + 1}"
        raise InputError(f"{path}{at}: {error.problem or error.context}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise InputError(f"{path} is not YAML: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(plain, dict) or not all(isinstance(key, str) for key in plain):
        raise InputError(f"{path} is no recipe: it must have keys such as method and scheme")
    return plain, lines


class _PlainLoader(yaml.SafeLoader):
    """Without aliases, by which a short text can stand for an endless one."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.MarkedYAMLError(
                problem="aliases (*) are not possible in a recipe", problem_mark=event.start_mark
            )
        return super().compose_node(parent, index)


def _note_lines(node: yaml.Node, place: Place, lines: dict[Place, int]) -> None:
    """Write down where each key and entry stands. Raises MarkedYAMLError for a key that comes twice, of which PyYAML
    would take the last."""
    if isinstance(node, yaml.SequenceNode):
        for number, member in enumerate(node.value):
            lines[*place, number] = member.start_mark.line + 1
            _note_lines(member, (*place, number), lines)
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = (*place, str(key.value))
            if inner in lines:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key.value!r} comes twice, first in line {lines[inner]}",
                    problem_mark=key.start_mark,
                )
            lines[inner] = key.start_mark.line + 1
            _note_lines(value, inner, lines)
