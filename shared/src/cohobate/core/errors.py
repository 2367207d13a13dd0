"""The one exception that means "your input is wrong", and how the command prints it: one line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any


class InputError(ValueError):
    """Something the user gave is wrong: a file, an option, a shape.

    The message is a single line that names the file (or option, or tensor) and the fault. The
    command prints it and exits with code 2; a library user catches it as a ``ValueError``.

    Example:
        >>> raise InputError("imagesTr/a.nii.gz: no label of that name in labelsTr")
        Traceback (most recent call last):
        ...
        cohobate.core.errors.InputError: imagesTr/a.nii.gz: no label of that name in labelsTr
    """


def guard(action: Callable[[], Any], prog: str) -> int:
    """Run an action; bad input becomes one line on standard error.

    Args:
        action: What to do; an integer it returns is the exit code.
        prog: Name that starts the line.

    Returns:
        Exit code: 0, 2 for bad input, 130 when interrupted.
    """
    try:
        result = action()
    except KeyboardInterrupt:
        print(f"{prog}: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0
    except Exception as error:
        # Libraries wrap what a loader or transform raised; the cause is what the user can mend.
        found = _input_error(error)
        if found is None:
            raise
        return _complain(prog, found)
    return result if isinstance(result, int) else 0


def _input_error(error: BaseException | None) -> InputError | None:
    """The `InputError` that a library wrapped, or that a data worker sent as text."""
    while error is not None:
        if isinstance(error, InputError):
            return error
        error = error.__cause__
    return None


def _complain(prog: str, error: Exception) -> int:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    # A data worker's error arrives as the whole trace; its last line is the message.
    text = lines[-1] if lines else type(error).__name__
    print(f"{prog}: {text.removeprefix('cohobate.core.errors.InputError: ')}", file=sys.stderr)
    return 2
