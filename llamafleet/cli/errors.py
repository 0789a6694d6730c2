"""What a command line can be wrong in."""


class UsageError(Exception):
    """The command line is invalid; the message says what it should be."""
