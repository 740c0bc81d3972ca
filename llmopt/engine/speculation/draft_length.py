"""How many tokens to draft: as many as pay, by what was accepted so far and by what the rows of a step cost."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from llmopt.engine.request import Request
from llmopt.engine.speculation.acceptance_rate import AcceptanceRate
from llmopt.engine.speculation.confidence import Confidence
from llmopt.engine.speculation.linear_cost import LinearCost

_PROBING = 0.01
"""The share of the time that may go into drafts that are not expected to pay, to see whether that is still so."""
_MOST_FOR_PROBES = 0.25
"""Seconds that are put by for that at most, so that they are not all spent at once one day."""
_FIRST_STEPS, _PERIOD = 2, 64
"""The first steps, and one in so many later on, go without drafts."""
_LEAST_ROW = 0.02
"""What a row costs at least, as a share of what a token costs without drafts: before anything is known of it, too."""
_SAVED = 0.25
"""The share of its time that a request's decoding is expected to save by drafts, where that is to be guessed."""
_MEMORY, _MEMORY_OF_ALL = 0.93, 0.98
"""How much a drafted token still counts after the next one: of the same request, and of any."""
_FIRST_GUESS = 0.7
"""How likely a drafted token is taken to be accepted before there was any."""


@dataclass(frozen=True)
class Candidate:
    """A request for which tokens can be drafted.

    Attributes:
        most: how many of them at most.
        left: how many tokens may still come before the request ends.
        lag: how many tokens the drafter has to compute first.
    """

    request: Request
    most: int
    left: int
    lag: int


class DraftLength:
    """Chooses the numbers of drafted tokens that promise the most tokens a second.

    A request whose next token is drafted with acceptance rate a gets 1 + a + a² + … + aⁿ tokens a step on average for n
    drafted ones (Leviathan et al. 2023, arXiv:2211.17192, equation 1), and the step takes longer by n rows and by n
    passes of the drafter. So lengths grow level by level, for all requests together and for each as long as its share
    is worth a row, and where the ratio is best they stay. Load needs no rule of its own: where many requests fill the
    rows that a step has almost for nothing, a row costs more, and lengths go to zero.

    A drafter that says how likely it found each token is stopped by that instead (`goes_on`): where a first token pays,
    as many may follow as there is room for, and a then is the acceptance rate of first tokens.
    """

    def __init__(self, drafter_seconds: Callable[[int], float], *, by_confidence: bool = False) -> None:
        """`drafter_seconds` tells what a pass of the drafter takes for a number of rows, `by_confidence` whether it
        says how likely it finds what it drafts."""
        self.step = LinearCost()
        self._by_confidence = by_confidence
        self._confidence = Confidence()
        self._row_seconds = self._token_seconds = 0.0  # of the step that is being prepared
        self._drafter_seconds = drafter_seconds
        self._of_all = AcceptanceRate(_MEMORY_OF_ALL, _FIRST_GUESS)
        self._rates: WeakKeyDictionary[Request, AcceptanceRate] = WeakKeyDictionary()
        self._turns: WeakKeyDictionary[Request, int] = WeakKeyDictionary()  # when a request last had a draft
        self._turn = 0
        self._for_probes = 0.0  # seconds

    def choose(self, candidates: Sequence[Candidate], decoding: int) -> list[int]:
        """A number of drafted tokens for each candidate, 0 to its `most`; `decoding` requests get a token anyway."""
        self._turn += 1
        lengths = [0] * len(candidates)
        if self._turn <= _FIRST_STEPS or self._turn % _PERIOD == 0:
            return lengths  # so that it is known what a step takes without drafts
        for level, places in enumerate(self._levels(candidates, decoding)):
            for place in places:
                lengths[place] = candidates[place].most if self._by_confidence else level + 1
        self._probe(candidates, lengths, self._row(decoding))
        for candidate, length in zip(candidates, lengths, strict=True):
            if length:
                self._turns[candidate.request] = self._turn
        return lengths

    def rate(self, request: Request) -> float:
        """The acceptance rate to expect of a request: what all have had together, until it has its own."""
        return self._rates.get(request, self._of_all).value

    def goes_on(self, request: Request, likelihoods: Sequence[float], together: int) -> bool:
        """Whether another token is worth its pass and its row after some that the drafter found so likely; `together`
        requests share the pass."""
        gained = self._confidence(likelihoods) * self.rate(request) * self._token_seconds
        return gained >= self._row_seconds + self._drafter_seconds(together) / together

    def observe(self, request: Request, drafted: int, accepted: int, likelihoods: Sequence[float] = ()) -> None:
        """Take in what became of a draft, and how likely its drafter had found its tokens if it has said so."""
        self._confidence.observe(likelihoods, accepted)
        if self._by_confidence:
            drafted, accepted = min(drafted, 1), min(accepted, 1)
        if request not in self._rates:
            self._rates[request] = AcceptanceRate(_MEMORY, self._of_all.value)
        self._rates[request].observe(drafted, accepted)
        self._of_all.observe(drafted, accepted)

    def observe_step(self, rows: int, seconds: float) -> None:
        """Take in what a step of the target took in which every request was decoding, `rows` with those drafted."""
        self.step.observe(rows, seconds)
        self._for_probes = min(self._for_probes + _PROBING * self.step(rows), _MOST_FOR_PROBES)

    def _levels(self, candidates: Sequence[Candidate], decoding: int) -> list[list[int]]:
        """For the first drafted token, the second, …: the places of the candidates that are to have one."""
        row, tokens, seconds = self._row(decoding), float(decoding), self.step(decoding)
        best, best_seconds, depth = tokens, seconds, 0
        levels: list[list[int]] = []
        places = [place for place, one in enumerate(candidates) if self._repays(one, seconds / decoding)]
        rates = [self.rate(one.request) for one in candidates]
        while places:
            level = len(levels) + 1
            places = [
                place
                for place in places
                if candidates[place].most >= level and rates[place] ** level * best_seconds >= row * best
            ]
            levels.append(places)
            tokens += sum(rates[place] ** level for place in places)
            seconds += row * len(places) + (self._drafter_seconds(len(places)) if places else 0)
            if tokens * best_seconds > best * seconds:
                best, best_seconds, depth = tokens, seconds, level
        self._row_seconds, self._token_seconds = row, best_seconds / best
        return levels[:depth]

    def _repays(self, candidate: Candidate, seconds_a_token: float) -> bool:
        """Whether the time in which the drafter catches up is likely to be won back before the request ends."""
        return self._catching_up(candidate) <= _SAVED * candidate.left * seconds_a_token

    def _catching_up(self, candidate: Candidate) -> float:
        if candidate.lag == 0:
            return 0.0
        return self._drafter_seconds(1 + candidate.lag) - self._drafter_seconds(1)

    def _row(self, decoding: int) -> float:
        """Seconds that one more row of a step takes."""
        return max(self.step.slope, _LEAST_ROW * self.step(decoding) / decoding)

    def _probe(self, candidates: Sequence[Candidate], lengths: list[int], row: float) -> None:
        """Draft one token for a request that is to have none, where time has been put by for that: for the one whose
        drafter has least to catch up with, and of those the one that has been longest without."""
        idle = [place for place, length in enumerate(lengths) if length == 0]
        if not idle:
            return
        place = min(idle, key=lambda i: (candidates[i].lag, self._turns.get(candidates[i].request, 0)))
        cost = row + self._drafter_seconds(1) + self._catching_up(candidates[place])
        if cost <= self._for_probes:
            self._for_probes -= cost
            lengths[place] = 1
