"""``python -m cohobate.core`` is the command ``cohobate``."""

from cohobate.core.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
