"""`llmopt quantize`: read the options, call, show what came out."""

from typing import Annotated

import typer

EXAMPLE = (
    "Example: llmopt quantize smollm2 --method gptq --scheme w4a16 --group-size 64 --output out/smollm2-gptq\n\n"
    "The result loads in this engine (llmopt serve out/smollm2-gptq) and in the runtimes that read its format."
)


def quantize(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="A checkpoint's folder, a .gguf file, a hub id, or smollm2.")],
    output: Annotated[str, typer.Option("--output", "-o", help="A folder, or FILE.gguf for the gguf format.")],
    method: Annotated[str, typer.Option(help="rtn, gptq or awq.")] = "gptq",
    scheme: Annotated[str, typer.Option(help="w4a16, w4a16-asym, w8a16, w8a8; for gguf f16, q8_0, q4_0.")] = "w4a16",
    format: Annotated[
        str | None,
        typer.Option(help="gptq, awq, gguf or compressed-tensors; by default the method's own.", show_default=False),
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(
            help="Weights that share a scale; -1 for whole rows. By default the largest of 128, 64 and 32 that "
            "divides the model's rows.",
            show_default=False,
        ),
    ] = None,
    desc_act: Annotated[
        bool, typer.Option(help="Form groups in the order of activation energy (GPTQ; slower in some runtimes).")
    ] = False,
    damp: Annotated[float, typer.Option(help="GPTQ's damping, a share of the Hessian's mean diagonal.")] = 0.01,
    ignore: Annotated[
        list[str] | None,
        typer.Option(help="Regular expression of linear layers to leave as they are; may be repeated."),
    ] = None,
    calibration: Annotated[
        str,
        typer.Option(help="A text file; self: text that the model samples from itself; builtin: Python's own manual."),
    ] = "self",
    samples: Annotated[int, typer.Option(help="Calibration samples.")] = 64,
    seq_len: Annotated[int, typer.Option(help="Tokens in a sample.")] = 512,
    seed: Annotated[int, typer.Option(help="The same seed gives the same weights.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda: where calibration runs.")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an output that exists.")] = False,
    json_file: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Write the result as JSON; - for standard output.")
    ] = None,
) -> None:
    from llmopt.cli import console
    from llmopt.quant.pipeline import quantize as run

    if method == "rtn":
        console.refuse(
            context, ("calibration", "samples", "seq_len", "seed", "device"), "methods that calibrate: gptq and awq"
        )
    if method != "gptq":
        console.refuse(context, ("damp", "desc_act"), "--method gptq")
    with console.progress_bar() as progress:
        result = run(
            model,
            output,
            method=method,
            scheme=scheme,
            format=format,
            group_size=group_size,
            desc_act=desc_act,
            damp=damp,
            ignore=tuple(ignore or ()),
            calibration=calibration,
            samples=samples,
            seq_len=seq_len,
            seed=seed,
            device=device,
            overwrite=overwrite,
            progress=progress,
        )
    _show(result, json_file)
    console.write_json(result, json_file)


quantize.__doc__ = f"Write a quantized copy of a model.\n\n{EXAMPLE}"


def _show(result: dict, json_file: str | None) -> None:
    from rich.table import Table

    from llmopt.cli import console

    out = console.output(json_file)
    kinds: dict[str, list[float]] = {}
    for module in result["modules"]:
        kinds.setdefault(module["name"].split(".", 3)[-1], []).append(module["error"])
    if kinds:
        table = Table("linear layer", "layers", "mean error", "worst error", title="relative error of the outputs")
        for kind, found in kinds.items():
            table.add_row(kind, str(len(found)), f"{sum(found) / len(found):.3%}", f"{max(found):.3%}")
        out.print(table)
    fallbacks = [module for module in result["modules"] if module["fallback"]]
    for module in fallbacks:
        out.print(f"[yellow]{module['name']}: {module['fallback']}[/yellow]")
    out.print(
        f"{result['output']}: {result['format']} {result['scheme']} by {result['method']}, "
        f"{result['size_bytes'] / 1e6:.1f} MB, {result['bits_per_weight']:.2f} bits a weight, "
        f"{result['seconds']:.0f} s\nnext: llmopt eval {result['output']} --reference MODEL, "
        f"or llmopt serve {result['output']}",
        highlight=False,
    )
