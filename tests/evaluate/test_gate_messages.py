import pytest

from llmopt.errors import InputError
from llmopt.evaluate.gates import read_gates


def test_a_misspelt_key_is_named_before_the_key_that_is_missing_because_of_it(tmp_path):
    file = tmp_path / "gates.yaml"
    file.write_text("version: 1\ngate: []")
    with pytest.raises(InputError, match="unknown key gate; did you mean gates"):
        read_gates(file)
