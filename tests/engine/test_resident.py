"""What a server keeps is not looked at again by Python's garbage collector."""

import gc

from llmopt.engine.resident import keep_resident


def test_what_lives_is_not_looked_at_until_it_is_given_back() -> None:
    kept = [[]]
    try:
        keep_resident()
        assert gc.get_freeze_count() > 0
        assert not any(value is kept for value in gc.get_objects())
    finally:
        gc.unfreeze()
    assert any(value is kept for value in gc.get_objects())
