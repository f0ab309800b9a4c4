"""Runs one step in this process."""

import importlib
import sys

from benchmarks.harness.gpu.step import parse

MODULES = {
    "environment": "machine",
    "tests": "checks",
    "memcheck": "checks",
    "racecheck": "checks",
    "updates": "updates",
    "steps": "whole_steps",
    "training": "training",
}

if __name__ == "__main__":
    options = parse(sys.argv[1:])
    importlib.import_module(f"benchmarks.harness.gpu.{MODULES[options.step]}").run(options)
