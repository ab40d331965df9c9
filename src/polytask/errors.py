"""The two ways in which polytask says no.

Each message is one line: what was wrong, where (file, line, field), and what to do about it.
"""


class PolytaskError(Exception):
    """The work failed: a file is damaged, data cannot be used, an adapter does not fit. Exit status 1."""

    status = 1


class UsageError(PolytaskError):
    """The caller asked for something that is not there: a path, a column, a method, an option. Exit status 2."""

    status = 2
