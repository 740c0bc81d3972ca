"""The settings of the server that are not the engine's."""

from dataclasses import dataclass, field

from llmopt.engine.config import EngineConfig
from llmopt.errors import InputError
from llmopt.serve.log import LEVELS


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Settings of one server; each is a flag of `llmopt serve` with dashes for underscores.

    Attributes:
        engine: the engine's settings.
        host: the address to listen on.
        port: 0 takes a free one.
        api_key: what requests under /v1 must carry; None for no check. Kept out of this object's repr.
        served_model_name: the names that requests may use; none for MODEL as it was given.
        shutdown_timeout: seconds that running requests get to finish once the server is told to stop.
        chat_template: a file with a Jinja template in place of the model's own.
    """

    engine: EngineConfig
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = field(default=None, repr=False)
    served_model_name: tuple[str, ...] = ()
    shutdown_timeout: float = 30.0
    chat_template: str | None = None
    log_level: str = "info"

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise InputError(f"port must be between 0 and 65535, not {self.port}")
        if self.shutdown_timeout < 0:
            raise InputError(f"shutdown_timeout must be at least 0 seconds, not {self.shutdown_timeout}")
        if self.log_level not in LEVELS:
            raise InputError(f"log_level must be one of {', '.join(LEVELS)}, not {self.log_level!r}")
        if self.api_key is not None and not self.api_key.strip():
            raise InputError("the API key is empty; give one, or leave --api-key and LLMOPT_API_KEY out")

    @property
    def model_names(self) -> tuple[str, ...]:
        return self.served_model_name or (self.engine.model,)
