"""Runs one cell of the matrix: python cell.py NAME ARTIFACT TEXT RESULT.json

RESULT.json becomes {pass, detail}. A process of its own, so that a crash of one cell is no more than that.
"""

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from agreement import ROUNDING, ROUNDING_FACTOR, TOLERANCES, Tolerance, mean_kl, mean_kl_of_top, our_logits
from cells import CELLS, WRITTEN, Cell
from environments import HERE, python
from llama_cpp import run_perplexity
from safetensors.torch import load_file, save_file

from llmopt.evaluate.divergence import log_likelihoods
from llmopt.model.source import as_dense, open_source
from llmopt.model.tokenizer import load_tokenizer
from llmopt.weights import gguf_tensors
from llmopt.weights.gguf_file import GGUFFile

SEQUENCES, LENGTH = 2, 192  # what logits are compared on
CTX, CHUNKS = 512, 4  # what llama-perplexity computes
PERPLEXITY_TOLERANCE = 0.01
Result = tuple[bool, str]


def main() -> None:
    name, *paths = sys.argv[1:]
    artifact, text, output = (Path(path).resolve() for path in paths)
    cell = next(cell for cell in CELLS if cell.name == name)
    with tempfile.TemporaryDirectory() as scratch:
        passed, detail = CHECKS[cell.peer](cell, artifact, text, Path(scratch))
    output.write_text(json.dumps({"pass": passed, "detail": detail}), "utf-8")


def run_peer(cell: Cell, script: str, *arguments: Path) -> None:
    """Run a script in the peer's environment. What it says last, where it fails, is this process's last word too."""
    path = str(HERE / "peers" / f"{script}.py")
    command = [str(python(cell.environment)), "-W", "ignore", path, *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if done.returncode != 0:
        sys.exit(done.stdout)


def sequences_of(artifact: Path, text: Path) -> list[list[int]]:
    tokens = load_tokenizer(str(artifact)).encode(text.read_text("utf-8"), add_special_tokens=False)
    return [tokens[i * LENGTH : (i + 1) * LENGTH] for i in range(SEQUENCES)]


def peer_logits(cell: Cell, script: str, artifact: Path, sequences: list[list[int]], scratch: Path) -> torch.Tensor:
    tokens, logits = scratch / "tokens.json", scratch / "logits.npy"
    tokens.write_text(json.dumps(sequences), "utf-8")
    run_peer(cell, script, artifact, tokens, logits)
    return torch.from_numpy(np.load(logits))


def judge(kl: float, tolerance: Tolerance) -> Result:
    return kl <= tolerance.mean_kl, f"mean KL {kl:.1e}, at most {tolerance.mean_kl:.1e}: {tolerance.reason}"


def judge_rounding(ours: float, theirs: float) -> Result:
    """Compare what rounding activations costs ours and theirs: mean KL from our logits with unrounded activations."""
    ratio = theirs / ours
    detail = f"rounded activations cost it {theirs:.1e} and us {ours:.1e}, a ratio of {ratio:.2f}, at most "
    return 1 / ROUNDING_FACTOR <= ratio <= ROUNDING_FACTOR, f"{detail}{ROUNDING_FACTOR} either way: {ROUNDING}"


def without_rounding(artifact: Path, scratch: Path) -> Path:
    """The same artifact, but for a config.json that leaves activations as they are."""
    copy = scratch / "unrounded"
    if not copy.exists():
        shutil.copytree(artifact, copy, copy_function=lambda source, target: Path(target).symlink_to(source))
        config = json.loads((artifact / "config.json").read_text("utf-8"))
        for group in config["quantization_config"]["config_groups"].values():
            group["input_activations"] = None
        (copy / "config.json").unlink()
        (copy / "config.json").write_text(json.dumps(config), "utf-8")
    return copy


def rounds_activations(artifact: Path) -> bool:
    groups = json.loads((artifact / "config.json").read_text("utf-8"))["quantization_config"].get("config_groups", {})
    return any(group.get("input_activations") for group in groups.values())


def check_transformers(cell: Cell, artifact: Path, text: Path, scratch: Path) -> Result:
    sequences = sequences_of(artifact, text)
    if not rounds_activations(artifact):
        return judge_logits(cell, "transformers_logits", artifact, sequences, scratch)
    unrounded = without_rounding(artifact, scratch)
    truth = our_logits(str(unrounded), sequences)
    theirs = peer_logits(cell, "transformers_logits", artifact, sequences, scratch)
    as_run = judge_rounding(mean_kl(truth, our_logits(str(artifact), sequences)), mean_kl(truth, theirs))
    weights = judge_logits(cell, "transformers_logits", unrounded, sequences, scratch)
    return as_run[0] and weights[0], f"with unrounded activations {weights[1]}; {as_run[1]}"


def judge_logits(
    cell: Cell, script: str, artifact: Path, sequences: list[list[int]], scratch: Path, ours: str | None = None
) -> Result:
    """A peer's logits of an artifact against ours, of the same one or of `ours`."""
    theirs = peer_logits(cell, script, artifact, sequences, scratch)
    return judge(mean_kl(our_logits(ours or str(artifact), sequences), theirs), TOLERANCES[cell.peer])


def check_auto_gptq(cell: Cell, artifact: Path, text: Path, scratch: Path) -> Result:
    sequences = sequences_of(artifact, text)
    passed, detail = judge_logits(cell, "auto_gptq_logits", artifact, sequences, scratch)
    if passed or not cell.scheme.endswith("-asym"):
        return passed, detail
    lowered = with_lower_zeros(artifact, scratch)
    agrees, and_so = judge_logits(cell, "auto_gptq_logits", lowered, sequences, scratch, ours=str(artifact))
    verdict = "agrees" if agrees else "does not agree either"
    return False, f"{detail}; with every zero point stored one lower it {verdict} ({and_so})"


def with_lower_zeros(artifact: Path, scratch: Path) -> Path:
    """A copy of a 4-bit artifact with each zero point stored one lower, modulo 16, as GPTQ's first version has it."""
    copy = scratch / "lower"
    shutil.copytree(artifact, copy)
    tensors = load_file(copy / "model.safetensors")
    for name, words in tensors.items():
        if name.endswith(".qzeros"):
            nibbles = words.numpy().view(np.uint8)
            tensors[name] = torch.from_numpy(
                (((nibbles & 0xF) - 1) & 0xF | ((((nibbles >> 4) - 1) & 0xF) << 4)).view(np.int32)
            )
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def check_autoawq(cell: Cell, artifact: Path, text: Path, scratch: Path) -> Result:
    if cell.scheme == WRITTEN:
        return check_written_by_autoawq(cell, scratch)
    return judge_logits(cell, "autoawq_logits", artifact, sequences_of(artifact, text), scratch)


def check_written_by_autoawq(cell: Cell, scratch: Path) -> Result:
    folder, weights = scratch / "written", scratch / "weights.safetensors"
    run_peer(cell, "autoawq_write", folder, weights)
    source, theirs = open_source(str(folder)), load_file(weights)
    wrong = [
        name
        for name, weight in theirs.items()
        if not torch.equal(as_dense(source.weight(f"{name}.weight"), torch.float16), weight.t())
    ]
    return not wrong, f"{len(theirs) - len(wrong)} of {len(theirs)} linear layers are equal bit for bit in float16"


def check_vllm(cell: Cell, artifact: Path, text: Path, scratch: Path) -> Result:
    sequences = sequences_of(artifact, text)
    tokens, output = scratch / "tokens.json", scratch / "logprobs.npz"
    tokens.write_text(json.dumps(sequences), "utf-8")
    run_peer(cell, "vllm_logprobs", artifact, tokens, output)
    theirs = np.load(output)
    rounded = rounds_activations(artifact)
    truth = our_logits(str(without_rounding(artifact, scratch) if rounded else artifact), sequences)
    kl = mean_kl_of_top(truth[:, :-1], theirs["ids"], theirs["logprobs"])
    if rounded:
        passed, detail = judge_rounding(mean_kl(truth, our_logits(str(artifact), sequences)), kl)
    else:
        passed, detail = judge(kl, TOLERANCES[cell.peer])
    words = load_tokenizer(str(artifact)).decode(theirs["generated"][0].tolist())
    return passed, f"{detail}; it continues with {words!r}"


def check_llama_cpp(cell: Cell, artifact: Path, text: Path, scratch: Path) -> Result:
    theirs = run_perplexity(artifact, text, CTX, CHUNKS, scratch / "logprobs")
    tokenizer = load_tokenizer(str(artifact))
    tokens = tokenizer.encode(text.read_text("utf-8"))[: CTX * CHUNKS]
    same = theirs.tokens.flatten().tolist() == tokens
    windows = theirs.tokens.tolist()
    if tokenizer.encode("")[:1] == [tokenizer.bos_id]:
        windows = [[tokenizer.bos_id, *window[1:]] for window in windows]
    logits = our_logits(str(artifact), windows)[:, CTX // 2 : -1]
    targets = torch.tensor(windows)[:, CTX // 2 + 1 :]
    perplexity = float(np.exp(log_likelihoods(logits.flatten(0, 1), targets.flatten()).mean()))
    off = theirs.value / perplexity - 1
    tolerance = TOLERANCES["llama.cpp float" if cell.scheme in ("f16", "bf16") else "llama.cpp"]
    passed, detail = judge(mean_kl(logits, torch.from_numpy(theirs.logprobs)), tolerance)
    return (
        passed and same and abs(off) <= PERPLEXITY_TOLERANCE,
        f"perplexity {theirs.value:.3f}, ours {perplexity:.3f} ({off:+.2%}, at most {PERPLEXITY_TOLERANCE:.0%}), the "
        f"{'same' if same else 'text is cut into OTHER'} tokens; {detail}",
    )


def check_gguf(cell: Cell, artifact: Path, text: Path, scratch: Path) -> Result:
    output = scratch / "tensors.json"
    run_peer(cell, "gguf_decode", artifact, output)
    theirs: dict[str, Any] = json.loads(output.read_text("utf-8"))
    file = GGUFFile(artifact)
    wrong = [name for name in file.tensors if digest(file, name) != theirs[name]["sha256"]]
    types = sorted({entry["type"] for entry in theirs.values()})
    return (
        not wrong,
        f"{len(theirs) - len(wrong)} of {len(theirs)} tensors are equal bit for bit, of {', '.join(types)}",
    )


def digest(file: GGUFFile, name: str) -> str:
    """As peers/gguf_decode.py has it."""
    values = as_dense(gguf_tensors.load(file, name)).numpy() + np.float32(0)
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()


CHECKS = {
    "auto-gptq": check_auto_gptq,
    "autoawq": check_autoawq,
    "transformers": check_transformers,
    "vllm": check_vllm,
    "llama.cpp": check_llama_cpp,
    "gguf": check_gguf,
}

if __name__ == "__main__":
    main()
