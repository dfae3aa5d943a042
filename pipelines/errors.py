"""Errors of the data side; the command line turns them into exit codes."""

import sys


class DataError(ValueError):
    """The data cannot be used as asked: the message gives cause, path and mend (exit code 4)."""


class BadImage(ValueError):
    """One image cannot be decoded exactly; the message is the reason, without the path."""


class MissingBackend(ImportError):
    """A package was asked for that is not installed, or cannot be imported; the message names the
    cause and the command."""


def import_problem(name: str, package: str, error: Exception, install: str) -> MissingBackend:
    """What an import of `package` that raised `error` means; an import can raise anything.

    Args:
        name: what users call it.
        install: the command that installs it.
    """
    blocked = sys.modules.get(package, error) is None  # how imports are switched off
    if blocked or (isinstance(error, ModuleNotFoundError) and error.name == package):
        return MissingBackend(f"{name} is not installed: {install}")
    return MissingBackend(
        f"{name} cannot be imported ({type(error).__name__}: {error}): it is installed, so repair "
        f"what it names, or install it again with {install}"
    )
