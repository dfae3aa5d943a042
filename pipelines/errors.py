"""Errors of the data side; the command line turns them into exit codes."""


class DataError(ValueError):
    """The data cannot be used as asked: the message gives cause, path and mend (exit code 4)."""


class BadImage(ValueError):
    """One image cannot be decoded exactly; the message is the reason, without the path."""


class MissingBackend(ImportError):
    """A backend was asked for whose package is not installed; the message names the command."""
