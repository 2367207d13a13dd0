"""The one exception that means "your input is wrong", printed as one line by the command."""

from __future__ import annotations


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
