"""Entry point of ``python -m benchmarks``."""

import sys

# What "samopt[bench]" brings, by import name.
EXTRA = ("docstring_parser", "jsonargparse", "matplotlib", "numpy", "rich", "scipy", "sklearn")

if __name__ == "__main__":
    try:
        if sys.argv[1:2] == ["gpu"]:  # runs where nothing but torch, numpy and triton is installed
            from benchmarks.studies.gpu import command

            code = command(sys.argv[2:])
        else:
            from benchmarks.harness.cli import main

            code = main()
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRA:
            raise
        sys.exit(
            f"error: the benchmarks need {', '.join(EXTRA)}; {package} is not installed; install them with: "
            'python -m pip install "samopt[bench]", or in a checkout: python -m pip install -e ".[bench]"'
        )
    sys.exit(code)
