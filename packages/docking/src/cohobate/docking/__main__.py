"""``python -m cohobate.docking``, ``cohobate-docking``: the command for this package."""

from cohobate.core.cli import main as _main


def main() -> int:
    """Run the command on the papers of this package only."""
    return _main(domain="docking")


if __name__ == "__main__":
    raise SystemExit(main())
