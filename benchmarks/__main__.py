"""Entry point of ``python -m benchmarks``."""

import sys

EXTRA = ("matplotlib", "numpy", "rich", "scipy", "sklearn")  # what "samopt[bench]" brings, by their import names

try:
    from benchmarks.cli import main
except ModuleNotFoundError as error:
    package = (error.name or "").partition(".")[0]
    if package not in EXTRA:
        raise
    sys.exit(
        f"error: the benchmarks need {', '.join(EXTRA)}; {package} is not installed; install them with: "
        'python -m pip install "samopt[bench]", or in a checkout: python -m pip install -e ".[bench]"'
    )

if __name__ == "__main__":
    sys.exit(main())
