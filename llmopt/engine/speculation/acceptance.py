"""Which drafted tokens stay."""

from collections.abc import Sequence


def accepted(drafts: Sequence[int], chosen: Sequence[int]) -> Sequence[int]:
    """The next tokens of a text: the chosen ones, up to and with the first that differs from what was drafted.

    `chosen` holds, for each of the drafts and for the place behind the last, the token that the target chooses there if
    the drafts before it stand. What is given back is therefore what the target would have chosen one by one, to the
    token, greedy or not, since a choice depends on the logits, the request's seed and the position alone (`Sampler`).

    The chance that a draft x is accepted is the target's own p(x), and what comes in place of a rejected one is
    distributed as p without x. For a draft that is certain of its guess, as n-grams are, this is the rejection sampling
    of Leviathan et al. 2023 (arXiv:2211.17192). A draft model draws its guess from its own distribution q, by the same
    random number that the target is going to choose by, so that the two agree wherever p and q share out the number
    alike; Daliri, Musco and Suresh 2024 (arXiv:2408.07978) study such couplings. Rejection sampling that weighs p
    against q accepts somewhat more, but what it gives depends on what was drafted; here a seed means the same text
    whatever is drafted, and whether anything is.
    """
    count = 0
    while count < len(drafts) and drafts[count] == chosen[count]:
        count += 1
    return chosen[: count + 1]
