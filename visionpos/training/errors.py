"""Mistakes and faults that end a command with one line on stderr instead of a traceback."""

import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

from visionpos.suggestion import closest

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "Interrupted",
    "NonFiniteError",
    "did_you_mean",
    "one_line",
    "reason",
    "reporting",
    "run_command",
    "run_script",
]

LONGEST_LINE = 1500  # characters of a message, of which the middle is cut out


class ConfigError(ValueError):
    """Report a wrong configuration or command line; the text names the field, what was given and what is accepted."""


class DataError(ValueError):
    """Report what is wrong with the data, in one printable line."""

    def __init__(self, message: str):
        super().__init__(one_line(message))


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


EXIT_CODES = {ConfigError: 2, DataError: 2, CheckpointError: 3, NonFiniteError: 4, OSError: 2, UnicodeError: 2}


def one_line(text: object) -> str:
    """Return `text` as one printable line: white space and control characters are one space, a long middle is cut."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    return line if len(line) <= LONGEST_LINE else f"{line[: LONGEST_LINE - 300]} ... {line[-295:]}"


def did_you_mean(given: str, accepted: Sequence[str], listed: bool = True) -> str:
    """Return a hint: the closest of `accepted`, if one is close, and all of them if they are to be listed."""
    meant = closest(given, accepted)
    return (f"did you mean {meant!r}? " if meant else "") + (f"accepted: {', '.join(accepted)}" if listed else "")


@contextmanager
def reporting(problem: str, kind: type[Exception] = ConfigError) -> Iterator[None]:
    """Turn whatever a library raises in the block about what a user gave into one line that starts with `problem`."""
    try:
        yield
    except (ConfigError, DataError, CheckpointError, NonFiniteError, Interrupted):
        raise
    except Exception as error:
        raise kind(f"{problem}: {reason(error)}") from error


def reason(error: Exception) -> str:
    """Return what an exception says, after its type where that is a single word, such as the key of a KeyError."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return str(error) if " " in str(error) else f"{type(error).__name__} {error}".strip()


def run_command(command: Callable[[], object], debug: bool = False) -> int:
    """Run `command` and return its exit code.

    The errors above, those of files, a want of memory and Ctrl-C become one line on stderr, with `debug` after the
    traceback. Anything else is a fault of the program, and is raised.
    """
    threading.excepthook = _leave_to_main
    try:
        command()
    except Interrupted as stopped:
        print(one_line(stopped), file=sys.stderr)
        return 128 + stopped.signal
    except KeyboardInterrupt:
        print("stopped by SIGINT", file=sys.stderr)
        return 130
    except Exception as error:
        codes = [code for kind, code in EXIT_CODES.items() if isinstance(error, kind)]
        if not codes and not _wants_memory(error):
            raise
        if debug:
            traceback.print_exc()
        print(f"error: {one_line(error if codes else f'not enough memory: {reason(error)}')}", file=sys.stderr)
        return codes[0] if codes else 2
    return 0


def run_script(command: Callable[[list[str]], object]) -> NoReturn:
    """Run the command line of this process and exit with its code; `--debug` anywhere in it shows tracebacks."""
    argv = [text for text in sys.argv[1:] if text != "--debug"]
    sys.exit(run_command(lambda: command(argv), debug=len(argv) < len(sys.argv) - 1))


def _wants_memory(error: Exception) -> bool:
    """Return whether an error is a want of memory, for which PyTorch has a type on a GPU alone."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and any(words in str(error) for words in ("allocate memory", "out of memory", "size calculation overflowed"))
    )


def _leave_to_main(fault: threading.ExceptHookArgs) -> None:
    """Print a thread's traceback, but not of a file that TensorBoard cannot write: main gets that error too."""
    if not isinstance(fault.exc_value, OSError):
        threading.__excepthook__(fault)
