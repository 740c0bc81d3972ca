"""What a process that only serves keeps for its lifetime."""

import gc


def keep_resident() -> None:
    """Take all objects that live now out of Python's garbage collection.

    For a process that has loaded its engine and keeps it. A full collection looks at every object of torch and of the
    model, which stops all streams for a tenth of a second; afterwards it looks at what requests leave behind only.
    """
    gc.collect()
    gc.freeze()
