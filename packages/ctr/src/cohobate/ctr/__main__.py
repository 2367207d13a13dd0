"""``python -m cohobate.ctr`` and ``cohobate-ctr``: the command restricted to this package."""

from cohobate.core.cli import main as _main


def main() -> int:
    """Run the command on the papers of this package only."""
    return _main(domain="ctr")


if __name__ == "__main__":
    raise SystemExit(main())
