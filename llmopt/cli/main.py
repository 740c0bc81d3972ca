"""The command line: one file for each subcommand, heavy imports only inside the one that runs."""

import sys

import typer

from llmopt import quiet_barriers
from llmopt.cli import bench, eval, quantize, serve
from llmopt.errors import LlmoptError

EXTRA_OF = dict.fromkeys(("fastapi", "starlette", "uvicorn", "uvloop", "prometheus_client"), "serve")
EXTRA_OF["aiohttp"] = "bench"

app = typer.Typer(
    name="llmopt",
    help="Make language-model inference cheap, and prove that nothing was broken.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("quantize")(quantize.quantize)
app.command("serve")(serve.serve)
app.command("bench")(bench.bench)
app.command("eval")(eval.evaluate)


@app.callback(invoke_without_command=True)
def version(show: bool = typer.Option(False, "--version", help="Print the version.")) -> None:
    if show:
        from llmopt import __version__

        print(__version__)
        raise typer.Exit


def main() -> None:
    """Run the command line. Exit status: 0 done, 1 a gate failed, 2 wrong usage or input, 3 it could not be done,
    4 a gate is inconclusive."""
    quiet_barriers()
    try:
        app()
    except LlmoptError as error:
        _fail(str(error), error.exit_status)
    except ModuleNotFoundError as error:
        extra = EXTRA_OF.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        _fail(f"{error.name} is not installed; this needs: pip install 'llmopt[{extra}]'", LlmoptError.exit_status)


def _fail(message: str, status: int) -> None:
    sys.stderr.write(f"llmopt: error: {message}\n")
    sys.exit(status)


if __name__ == "__main__":
    main()
