"""The programs that can be measured, by the names that they have in rows: PROGRAM-KIND, such as llama.cpp-Q4_0."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench_artifacts import bfloat16_folder, llama_cpp_gguf, our_artifact
from bench_engines import Engine, LlamaCpp, Llmopt, Vllm
from bench_in_process import InProcess
from bench_servers import llama_server, llmopt_serve, vllm_serve
from environments import LLAMA_CPP, VLLM, make

OURS = "llmopt"


@dataclass(frozen=True)
class Program:
    """A program of a family that runs the same files.

    Attributes:
        family: llmopt, or the environment of the peer.
        open: the engine of a file, loaded if it stays loaded. Raises LlmoptError where it fails.
    """

    family: str
    open: Callable[[Path], Engine]


PROGRAMS = {
    "llmopt": Program(OURS, Llmopt),
    "llmopt-in-process": Program(OURS, InProcess),
    "llmopt-serve": Program(OURS, llmopt_serve),
    "llama.cpp": Program(LLAMA_CPP, LlamaCpp),
    "llama-server": Program(LLAMA_CPP, llama_server),
    "vllm": Program(VLLM, Vllm),
    "vllm-serve": Program(VLLM, vllm_serve),
}


def open_engine(engine: str, file: Path) -> Engine:
    """Raises LlmoptError where it fails."""
    return _program(engine).open(file)


def file_name(engine: str) -> str:
    """What is run, as FAMILY-KIND: several programs of a family run the same."""
    program, kind = _split(engine)
    return f"{PROGRAMS[program].family}-{kind}"


def prepare(engine: str) -> None:
    """Make the environment that a peer needs."""
    if _program(engine).family != OURS:
        make(_program(engine).family)


def make_file(engine: str) -> Path:
    """What the engine runs of the built-in model, made if it is missing."""
    name, kind = file_name(engine), _split(engine)[1]
    makers = {OURS: lambda: our_artifact(name), LLAMA_CPP: lambda: llama_cpp_gguf(kind), VLLM: bfloat16_folder}
    return makers[_program(engine).family]()


def _program(engine: str) -> Program:
    return PROGRAMS[_split(engine)[0]]


def _split(engine: str) -> tuple[str, str]:
    """Program and kind. Of the programs that an engine's name begins with, the longest: llmopt-serve, not llmopt."""
    program = max((name for name in PROGRAMS if engine.startswith(f"{name}-")), key=len)
    return program, engine.removeprefix(f"{program}-")
