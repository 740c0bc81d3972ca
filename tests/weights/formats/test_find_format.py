import pytest

from llmopt.errors import InputError
from llmopt.weights.formats import FORMATS, find_format
from llmopt.weights.scheme import SCHEMES


@pytest.mark.parametrize("config", [{}, {"quant_method": "bitsandbytes"}, {"quant_method": ["gptq"]}, [], "gptq", None])
def test_unknown_methods_are_refused_with_the_known_ones(config) -> None:
    with pytest.raises(InputError, match="known: gptq, awq, compressed-tensors"):
        find_format(config)


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_reads_its_own_config_of_every_scheme_it_holds(name: str) -> None:
    for scheme_name in FORMATS[name].schemes:
        scheme = SCHEMES[scheme_name]
        settled = scheme if scheme.fixed_group else scheme.with_group_size(64)
        written = FORMATS[name].for_schemes({"m": settled}, damp=0.01 if name == "gptq" else None)
        assert find_format(written.config()).config() == written.config()


@pytest.mark.parametrize("name", FORMATS)
def test_schemes_that_a_format_does_not_hold_are_refused(name: str) -> None:
    refused = [scheme for scheme in SCHEMES.values() if scheme.name not in FORMATS[name].schemes]
    assert refused
    for scheme in refused:
        with pytest.raises(InputError, match="it holds"):
            FORMATS[name].check(scheme)
