"""`llmopt serve`: read the options, run the server, say where it is."""

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.panel import Panel
from rich.text import Text

from llmopt.cli.console import errors

if TYPE_CHECKING:
    from llmopt.serve.lifecycle import Started


def serve(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder, a .gguf file, a hub id, or smollm2.")],
    host: Annotated[
        str,
        typer.Option(
            help="Address to listen on. The default is open to this machine only, because there is no key unless you "
            "give one; 0.0.0.0 is open to the network."
        ),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="LLMOPT_API_KEY",
            show_default=False,
            help="Key that requests under /v1 must carry. Prefer the variable: other users can see options.",
        ),
    ] = None,
    served_model_name: Annotated[
        list[str] | None, typer.Option(help="Name of the model in the API, in place of MODEL; may be repeated.")
    ] = None,
    max_model_len: Annotated[int | None, typer.Option(help="Tokens of prompt and output together, at most.")] = None,
    max_num_seqs: Annotated[int, typer.Option(help="Requests that run at once.")] = 64,
    max_num_batched_tokens: Annotated[int, typer.Option(help="Tokens computed in one step, at most.")] = 2048,
    kv_cache_dtype: Annotated[
        str, typer.Option(help="auto (as the activations), float32, bfloat16, float16, int8 or fp8.")
    ] = "auto",
    kv_cache_memory_bytes: Annotated[int | None, typer.Option(help="Size of the KV cache.")] = None,
    block_size: Annotated[int, typer.Option(help="Tokens in a block of the KV cache.")] = 16,
    enable_prefix_caching: Annotated[
        bool, typer.Option(help="Compute the beginning that prompts share once, and keep it while there is room.")
    ] = True,
    chunked_prefill_size: Annotated[
        int | None,
        typer.Option(
            help="Tokens of prompts in a step that also decodes, at most, so that none stalls running streams; 0 for "
            "no limit of its own. By default, on a CPU, prompts of over 512 tokens are spread over steps so that each "
            "stays about two and a half times as long."
        ),
    ] = None,
    batching: Annotated[
        str,
        typer.Option(
            help="continuous lets requests in at every step; static only when a batch has ended; dynamic also gathers "
            "them first."
        ),
    ] = "continuous",
    batching_window: Annotated[
        float | None, typer.Option(help="Milliseconds that dynamic batching waits for a batch to fill.  [100]")
    ] = None,
    scheduling_policy: Annotated[
        str, typer.Option(help="fcfs, or priority: requests of the lowest `priority` first.")
    ] = "fcfs",
    speculative_config: Annotated[
        str | None,
        typer.Option(
            metavar="JSON",
            help='Draft tokens, and verify them in one pass: {"method": "ngram"} from the text itself, '
            '{"method": "draft_model", "model": MODEL} by a smaller model with the same vocabulary, such as a 4-bit '
            "artifact of this one. Further keys: num_speculative_tokens, prompt_lookup_max, prompt_lookup_min.",
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of activations: auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    backend: Annotated[str, typer.Option(help="auto, reference or cpu.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads; by default one a core.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seeds requests that bring no seed.")] = None,
    chat_template: Annotated[
        str | None, typer.Option(metavar="FILE", help="Jinja chat template in place of the model's own.")
    ] = None,
    shutdown_timeout: Annotated[
        float, typer.Option(help="Seconds that running requests get to finish after Ctrl-C or SIGTERM.")
    ] = 30.0,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
) -> None:
    """Serve MODEL behind an OpenAI-compatible HTTP API.

    Example: llmopt serve smollm2 --port 8000

    Then: curl localhost:8000/v1/completions -H 'Content-Type: application/json' -d '{"prompt": "Once upon a time"}'
    """
    from llmopt.engine.config import EngineConfig
    from llmopt.engine.speculation.config import SpeculativeConfig
    from llmopt.serve.lifecycle import run_server
    from llmopt.serve.settings import ServerSettings

    choices: dict[str, Any] = {  # the configuration refuses what it does not know, with the names that it does
        "device": device,
        "backend": backend,
        "dtype": dtype,
        "kv_cache_dtype": kv_cache_dtype,
        "scheduling_policy": scheduling_policy,
        "batching": batching,
    }
    engine = EngineConfig(
        model=model,
        **choices,
        kv_cache_memory_bytes=kv_cache_memory_bytes,
        block_size=block_size,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        chunked_prefill_size=chunked_prefill_size,
        batching_window=batching_window,
        enable_prefix_caching=enable_prefix_caching,
        speculative_config=SpeculativeConfig.parse(speculative_config),
        threads=threads,
        seed=seed,
    )
    settings = ServerSettings(
        engine=engine,
        host=host,
        port=port,
        api_key=api_key,
        served_model_name=tuple(served_model_name or ()),
        shutdown_timeout=shutdown_timeout,
        chat_template=chat_template,
        log_level=log_level,
    )
    raise typer.Exit(run_server(settings, _announce))


def _announce(started: "Started") -> None:
    ready = started.ready
    lines = (
        f"model    {', '.join(started.model_names)}",
        f"address  {started.url}/v1",
        f"length   {ready.max_model_len} tokens, prompt and output together",
        f"cache    {ready.blocks} blocks of {ready.block_size} tokens",
    )
    errors.print(Panel(Text("\n".join(lines)), title="llmopt serve", expand=False))
    # Unwrapped and in one piece: scripts wait for this line and read the address from it.
    errors.print(f"ready in {started.seconds:.1f} s at {started.url}", soft_wrap=True, highlight=False, markup=False)
