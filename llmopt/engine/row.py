"""A row of a step's logits, and the choice that it is for."""

from collections.abc import Sequence

from llmopt.engine.request import Request


class Row:
    """One choice: of the token that follows a request's known tokens and, where some are drafted, these.

    Attributes:
        drafts: the drafted tokens before this one; none where it follows the known ones.
    """

    __slots__ = ("drafts", "request")

    def __init__(self, request: Request, drafts: Sequence[int] = ()) -> None:
        self.request = request
        self.drafts = drafts

    @property
    def position(self) -> int:
        """Of the token to choose: how many come before it."""
        return self.request.known + len(self.drafts)

    @property
    def before(self) -> list[int]:
        """The tokens before it: the prompt and then the output."""
        return [*self.request.tokens, *self.drafts] if self.drafts else self.request.tokens
