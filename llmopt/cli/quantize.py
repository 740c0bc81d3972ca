"""`llmopt quantize`: read the options, call, show what came out, and hold it against the recipe's gate."""

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmopt.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from llmopt.quant.options import Options
    from llmopt.quant.plan import Plan
    from llmopt.quant.recipe_file import GateOptions, RecipeFile

EXAMPLES = (
    "llmopt quantize smollm2 --method gptq --group-size 64 --output out/smollm2-gptq",
    "llmopt quantize MODEL --method rtn --scheme q4_k_m --calibration notes.txt --output out/model.gguf",
    "llmopt quantize MODEL --recipe recipes/vllm-gpu.yaml --output out/model --dry-run",
)
MOST_FALLBACKS = 5  # that are told of one by one
_ERRORS = "relative error of the outputs"

_OPTIONS = "What to do"
_CALIBRATION = "Calibration"
_RUN = "How to run"
# Flags that are keys of `Options` under the same name; `format` is the first export's.
_KEYS = (
    "method", "scheme", "group_size", "head", "target_bpw", "desc_act", "damp", "ignore", "calibration", "samples",
    "seq_len", "seed", "device", "spill", "quantizer", "format",
)  # fmt: skip


def quantize(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL", help="A checkpoint's folder, a .gguf file, a hub id, or smollm2.", show_default=False
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", help="A folder, or FILE.gguf for the gguf format.", show_default=False),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            help="A YAML file with any of these options (group_size for --group-size), and overrides, several exports "
            "and a gate. Flags that are given beside it go before what it says; MODEL and --output may be left to it.",
            show_default=False,
        ),
    ] = None,
    method: Annotated[str, typer.Option(help="rtn, gptq, awq or smoothquant.", rich_help_panel=_OPTIONS)] = "gptq",
    scheme: Annotated[
        str,
        typer.Option(
            help="Integers: w4a16, w4a16-asym, also of 2, 3 and 8 bits, and w8a8. Floating point: fp8, nvfp4, mxfp4. "
            "For gguf its types and mixes, such as q4_k_m, q8_0, f16.",
            rich_help_panel=_OPTIONS,
        ),
    ] = "w4a16",
    format: Annotated[
        str | None,
        typer.Option(
            help="gptq, awq, gguf or compressed-tensors; by default the method's own.",
            show_default=False,
            rich_help_panel=_OPTIONS,
        ),
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(
            help="Weights that share a scale; -1 for whole rows. By default the largest of 128, 64 and 32 that "
            "divides the model's rows.",
            show_default=False,
            rich_help_panel=_OPTIONS,
        ),
    ] = None,
    head: Annotated[
        str | None,
        typer.Option(
            metavar="SCHEME",
            help="Also quantize the output layer (lm_head), rounded to nearest: w8a16 or another integer scheme of the "
            "gptq or compressed-tensors format. A head that is tied to the embedding becomes a matrix of its own, and "
            "the embedding stays in 16 bits. By default the head stays as the model has it.",
            show_default=False,
            rich_help_panel=_OPTIONS,
        ),
    ] = None,
    target_bpw: Annotated[
        float | None,
        typer.Option(
            help="Bits a weight, scales included, that the linear layers may take on average: more go to the layers "
            "that suffer most, as is measured first. Embedding and head do not count.",
            show_default=False,
            rich_help_panel=_OPTIONS,
        ),
    ] = None,
    desc_act: Annotated[
        bool,
        typer.Option(
            help="Form groups in the order of activation energy (GPTQ; slower in some runtimes).",
            rich_help_panel=_OPTIONS,
        ),
    ] = False,
    damp: Annotated[
        float,
        typer.Option(help="GPTQ's damping, a share of the Hessian's mean diagonal.", rich_help_panel=_OPTIONS),
    ] = 0.01,
    ignore: Annotated[
        list[str] | None,
        typer.Option(
            help="Regular expression of linear layers to leave as they are; may be repeated.",
            show_default=False,
            rich_help_panel=_OPTIONS,
        ),
    ] = None,
    quantizer: Annotated[
        str,
        typer.Option(
            help="native; auto-gptq or autoawq run the original packages in an environment of their own, on CUDA.",
            rich_help_panel=_OPTIONS,
        ),
    ] = "native",
    calibration: Annotated[
        str | None,
        typer.Option(
            help="A text file; a .jsonl file with {text} or {messages} in each line; a hub data set as ORG/NAME, with "
            "/CONFIG and :SPLIT where needed; self, text that the model samples from itself, which is the default of "
            "methods that need any; builtin, Python's own manual. With rtn it weighs the inputs, as llama.cpp's "
            "importance matrix does.",
            show_default=False,
            rich_help_panel=_CALIBRATION,
        ),
    ] = None,
    samples: Annotated[int, typer.Option(help="Calibration samples.", rich_help_panel=_CALIBRATION)] = 64,
    seq_len: Annotated[int, typer.Option(help="Tokens in a sample.", rich_help_panel=_CALIBRATION)] = 512,
    seed: Annotated[int, typer.Option(help="The same seed gives the same weights.", rich_help_panel=_CALIBRATION)] = 0,
    device: Annotated[
        str, typer.Option(help="auto, cpu or cuda: where calibration runs.", rich_help_panel=_CALIBRATION)
    ] = "auto",
    spill: Annotated[
        bool | None,
        typer.Option(
            help="Keep the samples' activations on the disk. By default where they would take much of the free memory.",
            show_default=False,
            rich_help_panel=_CALIBRATION,
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Check shapes, disk, memory and time, print the plan, and stop there.",
            rich_help_panel=_RUN,
        ),
    ] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on with the layers that an interrupted run of the same command has finished.",
            rich_help_panel=_RUN,
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an output that exists.", rich_help_panel=_RUN)
    ] = False,
    json_file: Annotated[
        str | None,
        typer.Option(
            "--json",
            metavar="FILE",
            help="Write the result, or the plan, as JSON; - for standard output.",
            rich_help_panel=_RUN,
        ),
    ] = None,
) -> None:
    from llmopt.cli import console
    from llmopt.quant.pipeline import run

    written = None
    if recipe is not None:
        from llmopt.quant.recipe_file import read_recipe

        written = read_recipe(recipe)
    flags = {key: context.params[key] for key in _KEYS if console.is_given(context, key)}
    options = _settle(written, model, output, flags)
    _refuse_what_does_nothing(context, options, written, flags)
    gate = None if written is None or written.gate is None else _Gate(written.path, written.gate, options.model)
    if dry_run:
        _plan(options, overwrite, resume, json_file)
        if gate is not None:
            console.output(json_file).print(f"then the gate measures {gate.asked.windows} windows, beside this time")
        return
    with console.progress_bar() as progress:
        manifests = run(options, overwrite, progress, resume)
        if gate is not None:
            for manifest in manifests:
                manifest["gates"] = gate.judge(manifest["output"], progress)
    result = _result(manifests)
    _show(result, json_file)
    console.write_json(result, json_file)
    if gate is not None:
        from llmopt.evaluate.gates import exit_status

        raise typer.Exit(exit_status(result["gates"]))


quantize.__doc__ = (
    "Write a quantized copy of a model.\n\nExamples:\n\n" + "\n\n".join(EXAMPLES) + "\n\n"
    "The result loads in this engine (llmopt serve OUTPUT) and in the runtimes that read its format. Exit status 1 "
    "where a recipe's gate failed, 4 where that is not certain; the result stays."
)


def _plan(options: "Options", overwrite: bool, resume: bool, json_file: str | None) -> None:
    from llmopt.cli import console
    from llmopt.quant.plan import make_plan

    with console.progress_bar() as progress:
        plan = make_plan(options, overwrite, resume, progress)
    _show_plan(console.output(json_file), plan)
    console.write_json(plan.to_dict(), json_file)


def _settle(written: "RecipeFile | None", model: str | None, output: str | None, flags: dict[str, Any]) -> "Options":
    """The options of recipe and flags together."""
    from llmopt.quant.options import make_options

    if written is not None:
        return written.options(model, output, flags)
    if model is None or output is None:
        raise InputError(f"give {'MODEL' if model is None else '--output'}, or a --recipe that says it")
    exports = [{"output": output, "format": flags.pop("format", None)}]
    return make_options({"model": model, "exports": exports, **flags})


def _refuse_what_does_nothing(
    context: typer.Context, options: "Options", written: "RecipeFile | None", flags: Collection[str]
) -> None:
    from llmopt.cli import console

    idle: list[tuple[tuple[str, ...], str]] = []
    if options.method == "rtn" and options.calibration is None and options.target_bpw is None:
        needs = "--calibration or methods that calibrate: gptq, awq and smoothquant"
        idle.append((("samples", "seq_len", "seed", "device", "spill", "resume"), needs))
    if options.method != "gptq":
        idle.append((("damp", "desc_act"), "--method gptq"))
    for names, needs in idle:
        console.refuse(context, names, needs)
        if written is not None and "method" not in flags:  # what a flag has made idle is no mistake of the recipe's
            for key in written.keys.keys() & set(names):
                raise InputError(f"{written.path}: {key} only goes with {needs}")


class _Gate:
    """A recipe's gate. What it needs is read before anything runs."""

    def __init__(self, recipe: Path, asked: "GateOptions", reference: str) -> None:
        from llmopt.evaluate.gates import make_gates, read_gates
        from llmopt.evaluate.text import cut_windows, read_text
        from llmopt.model.tokenizer import load_tokenizer

        self.asked, self.reference = asked, reference
        self.gates = make_gates(asked.inline(), f"{recipe}: gate") if asked.file is None else read_gates(asked.file)
        cut_windows(load_tokenizer(reference), read_text(asked.text), asked.ctx, asked.windows)

    def judge(self, output: str, progress: Any) -> list[dict[str, Any]]:
        """The verdicts on an artifact, with its name."""
        from llmopt.evaluate.evaluate import evaluate

        found = evaluate(
            output,
            reference=self.reference,
            text=self.asked.text,
            ctx=self.asked.ctx,
            windows=self.asked.windows,
            gates=self.gates,
            progress=progress,
        )
        return [{"output": output, **verdict} for verdict in found["gates"]]


def _result(manifests: list[dict[str, Any]]) -> dict[str, Any]:
    """What --json holds: the manifest of the first export; where there are several, all of them as `exports`; and the
    verdicts on all of them as `gates`, where the recipe has a gate."""
    result = dict(manifests[0])
    if len(manifests) > 1:
        result["exports"] = manifests
    if "gates" in result:
        result["gates"] = [verdict for manifest in manifests for verdict in manifest["gates"]]
    return result


def _show(result: dict[str, Any], json_file: str | None) -> None:
    from rich.table import Table

    from llmopt.cli import console

    out = console.output(json_file)
    kinds: dict[str, list[dict[str, Any]]] = {}
    for module in result["modules"]:
        kinds.setdefault(module["name"].split(".", 3)[-1], []).append(module)
    if kinds:
        table = Table("linear layer", "layers", "scheme", "mean error", "worst error", title=_ERRORS)
        for kind, found in kinds.items():
            errors = [module["error"] for module in found]
            schemes = ", ".join(dict.fromkeys(module["scheme"] for module in found))
            table.add_row(kind, str(len(found)), schemes, f"{sum(errors) / len(errors):.3%}", f"{max(errors):.3%}")
        out.print(table)
    _show_fallbacks(out, [module for module in result["modules"] if module["fallback"]])
    _show_phases(out, result)
    for manifest in result.get("exports", [result]):
        out.print(
            f"{manifest['output']}: {manifest['format']} {manifest['scheme']} by {manifest['method']}, "
            f"{manifest['size_bytes'] / 1e6:.1f} MB, {manifest['bits_per_weight']:.2f} bits a weight",
            markup=False,
            highlight=False,
        )
    if "gates" in result:
        console.show_verdicts(out, result["gates"])
    else:
        out.print(
            f"next: llmopt eval {result['output']} --reference {result['recipe']['model']}, "
            f"or llmopt serve {result['output']}",
            markup=False,
            highlight=False,
        )


def _show_fallbacks(out: "Console", fallbacks: list[dict[str, Any]]) -> None:
    for module in fallbacks[:MOST_FALLBACKS]:
        out.print(f"{module['name']}: {module['fallback']}", style="yellow", markup=False, highlight=False)
    if len(fallbacks) > MOST_FALLBACKS:
        out.print(f"and {len(fallbacks) - MOST_FALLBACKS} more like these; --json tells of all", style="yellow")


def _show_phases(out: "Console", result: dict[str, Any]) -> None:
    longest = sorted(result["phases"].items(), key=lambda phase: -phase[1])
    parts = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in longest if seconds >= 0.05)
    out.print(f"{result['seconds']:.1f} s: {parts}", markup=False, highlight=False)


def _show_plan(out: "Console", plan: "Plan") -> None:
    from rich.table import Table
    from rich.text import Text

    recipe = plan.recipe.options
    schemes = ", ".join(f"{count} in {name}" for name, count in plan.schemes.items()) or "none"
    table = Table(show_header=False, title=f"plan: {recipe.model} by {recipe.method}")
    table.add_row("linear layers quantized", schemes)
    if plan.recipe.calibration is not None:
        text = f"{recipe.samples} samples of {recipe.seq_len} tokens of {plan.recipe.calibration}"
        table.add_row("calibration", Text(text))
    for export in plan.exports:
        bits = 8 * export.size_bytes / plan.parameters
        size = f"{export.size_bytes / 1e6:.1f} MB, {bits:.2f} bits a weight"
        table.add_row("writes", Text(f"{export.output}: {export.format}, {size}"))
    for disk in plan.disks:
        needed, free = f"{disk.needed / 1e6:.1f} MB at most", f"{disk.free / 1e9:.1f} GB free"
        table.add_row("disk", Text(f"{needed}, {free} under {disk.path}"))
    largest = sorted(plan.memory.items(), key=lambda part: -part[1])[:3]
    parts = ", ".join(f"{name} {size / 1e6:.0f} MB" for name, size in largest)
    memory = f"{sum(plan.memory.values()) / 1e6:.0f} MB of {plan.memory_available / 1e9:.1f} GB free"
    table.add_row("memory, about", f"{memory}; most of it: {parts}")
    phases = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in plan.seconds.items() if seconds >= 0.5)
    table.add_row("time, about", f"{_duration(sum(plan.seconds.values()))}: {phases}")
    out.print(table)
    out.print("every shape is as the config says, the outputs are free, and nothing was written", highlight=False)
    for note in plan.notes:
        out.print(note, style="yellow", markup=False, highlight=False)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
