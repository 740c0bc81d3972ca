"""Where the tokens come from that a model is calibrated on: given text, or text that it samples from itself."""

import random
from collections.abc import Iterable

import psutil
import torch
from torch import Tensor

from llmopt.engine.llm import LLM
from llmopt.engine.params import SamplingParams
from llmopt.errors import InputError
from llmopt.model.builtin_text import calibration_text
from llmopt.model.config import ModelConfig
from llmopt.model.source import ModelSource
from llmopt.model.tokenizer import Tokenizer
from llmopt.progress import Progress
from llmopt.quant.documents import a_fixed_day, read_documents

SELF, BUILTIN = "self", "builtin"

READ_PER_TOKEN_NEEDED = 4  # tokens read of a long text for each one needed, so that the windows differ with the seed
CHARACTERS_PER_TOKEN = 8  # at most, on average over a text

SAMPLED_AT_ONCE = 64
SHARE_OF_FREE_MEMORY = 8  # the part of it that the KV cache may take while sampling
TOP_P = 0.95
USERS_WORDS = "llmopt-writes-here"


def calibration_tokens(
    calibration: str, source: ModelSource, samples: int, seq_len: int, seed: int, device: str, progress: Progress
) -> Tensor:
    """int64 [samples, seq_len] tokens to calibrate on.

    `calibration` is `self` for text that the model samples from itself, `builtin` for prose that every Python carries,
    or what `read_documents` takes: a file or a data set. Documents are joined by the model's end token and cut into
    windows, of which `samples` are drawn without repetition; of a long text only the beginning is read. The same
    arguments give the same tokens. Raises InputError where the text is too short or cannot be read.
    """
    tokenizer = source.tokenizer
    if calibration == SELF:
        return _sample_from_model(source, samples, seq_len, seed, device, progress)
    enough = READ_PER_TOKEN_NEEDED * samples * seq_len
    if calibration == BUILTIN:
        documents: Iterable[str] = [calibration_text()]
    else:
        documents = read_documents(calibration, tokenizer, CHARACTERS_PER_TOKEN * enough)
    tokens = _join(documents, tokenizer, enough, progress)
    return _draw_windows(tokens, _opening_of_windows(tokenizer), calibration, samples, seq_len, seed)


def _join(documents: Iterable[str], tokenizer: Tokenizer, enough: int, progress: Progress) -> list[int]:
    """The tokens of the first documents, until there are `enough`."""
    tokens: list[int] = []
    progress("reading calibration text", 0, enough)
    for text in documents:
        if not text.strip():  # as between the paragraphs of some data sets
            continue
        if tokens and tokenizer.eos_id is not None:
            tokens.append(tokenizer.eos_id)
        tokens += tokenizer.encode(text, add_special_tokens=False)
        progress("reading calibration text", min(len(tokens), enough), enough)
        if len(tokens) >= enough:
            break
    return tokens


def _opening_of_windows(tokenizer: Tokenizer) -> list[int]:
    """The token that some tokenizers put before every text, without which their models see nothing that they know."""
    opening = tokenizer.encode("")[:1]
    return opening if opening == [tokenizer.bos_id] else []


def _draw_windows(tokens: list[int], opening: list[int], name: str, samples: int, seq_len: int, seed: int) -> Tensor:
    step = seq_len - len(opening)
    windows = len(tokens) // step
    if windows < samples:
        advice = f"or --samples of at most {windows}" if windows else "or a shorter --seq-len"
        raise InputError(
            f"the calibration text {name} has {len(tokens)} tokens, too few for {samples} samples of {seq_len}; give "
            f"more text, {advice}, or {SELF!r}, which needs none"
        )
    chosen = torch.randperm(windows, generator=torch.Generator().manual_seed(seed))[:samples].sort().values
    cut = torch.tensor(tokens[: windows * step]).reshape(windows, step)[chosen]
    return torch.cat([torch.tensor(opening, dtype=torch.int64).expand(samples, -1), cut], dim=1)


def _sample_from_model(
    source: ModelSource, samples: int, seq_len: int, seed: int, device: str, progress: Progress
) -> Tensor:
    """Text in the model's own words (Liu et al. 2023, "LLM-QAT", arXiv:2305.17888).

    Where the model has a chat template, every other sample begins with what the template puts before a user's words,
    so that the model writes both sides of a conversation (Xu et al. 2024, "Magpie", arXiv:2406.08464). The others
    begin with the token that begins texts. They go on over end tokens.
    """
    plain, chat = _opening_of_texts(source.tokenizer), _opening_of_chats(source.tokenizer)
    if not chat or len(chat) > seq_len // 2:
        chat = plain
    openings = [plain if i % 2 else chat for i in range(samples)]
    seeds = random.Random(seed)  # a seed for each sample; counting up from it would share them with the next seed
    params = [
        SamplingParams(max_tokens=seq_len - len(opening), ignore_eos=True, top_p=TOP_P, seed=seeds.getrandbits(63))
        for opening in openings
    ]
    sample_bytes = _cache_bytes(source.config, seq_len)
    at_once = max(1, min(samples, SAMPLED_AT_ONCE, _free_memory(device) // SHARE_OF_FREE_MEMORY // sample_bytes))
    steps = -(-samples // at_once) * seq_len
    progress("sampling calibration text", 0, steps)
    llm = LLM(
        str(source.path),
        max_num_seqs=at_once,
        max_model_len=seq_len,
        kv_cache_memory_bytes=at_once * sample_bytes,
        seed=seed,
        device=device,
    )

    def report(step: int) -> None:
        progress("sampling calibration text", min(step, steps), steps)

    outputs = llm.generate(openings, params, on_step=report)
    return torch.tensor([o + output.outputs[0].token_ids for o, output in zip(openings, outputs, strict=True)])


def _opening_of_texts(tokenizer: Tokenizer) -> list[int]:
    for token in (tokenizer.bos_id, tokenizer.eos_id):
        if token is not None:
            return [token]
    return [0]


def _opening_of_chats(tokenizer: Tokenizer) -> list[int]:
    """What the chat template puts before a user's words; nothing where there is no template or it shows no such place.

    A template that refuses a conversation of one user's message is no reason not to calibrate: sampling goes on
    without it.
    """
    if tokenizer.chat_template is None:
        return []
    messages = [{"role": "user", "content": USERS_WORDS}]
    try:
        text = tokenizer.render_chat(messages, add_generation_prompt=False, strftime_now=a_fixed_day)
    except InputError:
        return []
    before, found, _ = text.partition(USERS_WORDS)
    return tokenizer.encode(before, add_special_tokens=False) if found else []


def _cache_bytes(config: ModelConfig, length: int) -> int:
    """What the KV cache of one sample takes in float32, the widest that it may be, in blocks of 16 tokens."""
    return -(-length // 16) * 16 * 2 * config.num_layers * config.num_kv_heads * config.head_dim * 4


def _free_memory(device: str) -> int:
    return torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available
