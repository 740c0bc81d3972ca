import time

import pytest

from llmopt.errors import InputError
from llmopt.weights.formats.patterns import check_names, compiled, is_named

MODULE = "model.layers.100.self_attn.gate_up_proj"


@pytest.mark.parametrize(
    "pattern",
    [
        r"(a+)+$", r"(\w+)*x", r"([\w.]+)+!", r"(a|a)*$", r"(?:a?){9}",  # a group repeated
        r".*.*.*.*.*.*!", r"a?b?c?d?e?f?", "(m|.)(o|.)(d|.)(e|.)(l|.)(.|.)(l|.)!",  # many choices
        r"(?#[)(\w+)+x]", "(?x)#[\n(\\w+)+x]",  # what would hide them
        "a" * 501, "(", "[", "x{3}{4}", "(?P=n)",
    ],
)  # fmt: skip
def test_patterns_that_could_hang_or_are_none_are_refused(pattern: str) -> None:
    with pytest.raises(InputError, match="pattern") as caught:
        check_names(["lm_head", f"re:{pattern}"])
    assert "\n" not in str(caught.value).replace(repr(pattern), "")


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        (r".*lm_head", False),
        (r"^(?!.*(?:\.mlp\.experts\.)).*", True),
        (r".*\.layers\.\d+\.self_attn\.(q|k|v|gate_up)_proj$", True),
        (r"model\.layers\.(100|1)\..*", True),
        (r".*[.](self_|a)?attn", True),
        (r"self_attn", False),
        (r"(?i).*SELF_ATTN", True),
    ],
)
def test_patterns_of_real_checkpoints_match_from_the_beginning(pattern: str, found: bool) -> None:
    assert is_named(MODULE, ["lm_head", f"re:{pattern}"]) == found


@pytest.mark.parametrize("pattern", [".*.*.*.*.*!", "(?=.*.*)(?=.*.*.*!)", "(l|.|m)(o|.)(d|.).*.*!", r"\w*\.?.*\w*.*!"])
def test_the_worst_that_is_let_through_is_quick(pattern: str) -> None:
    started = time.perf_counter()
    assert compiled(pattern).match(MODULE) is None
    assert time.perf_counter() - started < 1


def test_names_without_a_mark_are_no_patterns() -> None:
    assert is_named("a.b", ["a.b"])
    assert not is_named("aab", ["a.b", "a.", ".*"])
