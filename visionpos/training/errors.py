"""Mistakes and faults that end a command with one line on stderr instead of a traceback."""

import difflib
import sys
import threading
from collections.abc import Callable, Sequence

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "Interrupted",
    "NonFiniteError",
    "did_you_mean",
    "one_line",
    "run_command",
]


class ConfigError(ValueError):
    """Report a wrong configuration or command line; the text names the field, what was given and what is accepted."""


class DataError(ValueError):
    """Report what is wrong with the data, in one printable line."""

    def __init__(self, message: str):
        super().__init__(" ".join("".join(c if c.isprintable() else " " for c in message).split()))


class CheckpointError(RuntimeError):
    """Report that a checkpoint cannot be written, or that none of those at hand can be read."""


class NonFiniteError(RuntimeError):
    """Report that the loss or a weight is NaN or infinite."""


class Interrupted(Exception):
    """Report that a signal stopped the run, after everything was saved.

    Args:
        signal: The signal's number.
        text: What happened.
    """

    def __init__(self, signal: int, text: str):
        super().__init__(text)
        self.signal = signal


EXIT_CODES = {ConfigError: 2, DataError: 2, CheckpointError: 3, NonFiniteError: 4}


def one_line(text: object) -> str:
    """Return `text` with every run of white space, line breaks included, as one space."""
    return " ".join(str(text).split())


def did_you_mean(given: str, accepted: Sequence[str], listed: bool = True) -> str:
    """Return a hint: the closest of `accepted`, if one is close, and all of them if they are to be listed."""
    close = difflib.get_close_matches(given, accepted, n=1)
    return (f"did you mean {close[0]!r}? " if close else "") + (f"accepted: {', '.join(accepted)}" if listed else "")


def run_command(command: Callable[[], object]) -> int:
    """Run `command` and return its exit code; the errors above and Ctrl-C become one line on stderr."""
    threading.excepthook = _leave_to_main
    try:
        command()
    except Interrupted as stopped:
        print(one_line(stopped), file=sys.stderr)
        return 128 + stopped.signal
    except KeyboardInterrupt:
        print("stopped by SIGINT", file=sys.stderr)
        return 130
    except tuple(EXIT_CODES) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return next(code for kind, code in EXIT_CODES.items() if isinstance(error, kind))
    return 0


def _leave_to_main(fault: threading.ExceptHookArgs) -> None:
    """Print a thread's traceback, but not of a file that TensorBoard cannot write: main gets that error too."""
    if not isinstance(fault.exc_value, OSError):
        threading.__excepthook__(fault)
