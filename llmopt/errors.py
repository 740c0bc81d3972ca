"""The errors that llmopt raises on purpose, each with the exit status the command line gives it."""


class LlmoptError(Exception):
    """Something could not be done or measured. The message is one line: what is wrong, and what would be right."""

    exit_status = 3


class InputError(LlmoptError):
    """What the user gave is wrong: an option, a file, a prompt. Servers answer it with HTTP 400."""

    exit_status = 2
