"""Entry point of ``python -m samopt.sharpness``."""

import sys

from samopt.sharpness.cli.command import main

__all__: list[str] = []

if __name__ == "__main__":
    sys.exit(main())
