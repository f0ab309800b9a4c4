"""Importing samopt is quick, stays within torch, and changes nothing that a program could notice."""

import json
import os
import statistics
import subprocess
import sys
import textwrap

import pytest

FORBIDDEN = ["accelerate", "lightning", "matplotlib", "pytorch_lightning", "scipy", "sklearn", "transformers", "triton"]


def in_fresh_interpreter(source):
    """Run ``source`` in a new interpreter and return the JSON value it prints."""
    command = [sys.executable, "-c", textwrap.dedent(source)]
    # An installed package has its bytecode; where none may be written, every import would compile the whole source.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="repeats the import in forks of one process that holds torch")
def test_importing_adds_less_than_a_tenth_of_importing_torch():
    # Processor time, as a part of torch's in the same process: what the import costs, however fast the machine is.
    part = in_fresh_interpreter("""
        import gc, json, os, time
        start = time.process_time()
        import torch
        whole = time.process_time() - start
        gc.freeze()  # a collection of torch's objects would come with the next import, whichever that is

        seconds = []
        for _ in range(7):
            read, write = os.pipe()
            if os.fork() == 0:
                start = time.process_time()
                import samopt
                os.write(write, repr(time.process_time() - start).encode())
                os._exit(0)
            os.wait()
            seconds.append(float(os.read(read, 64)))
        print(json.dumps([each / whole for each in seconds]))
    """)
    assert statistics.median(part) < 0.1, part


def test_importing_loads_no_framework():
    loaded = in_fresh_interpreter("""
        import json, sys
        import torch

        before = set(sys.modules)
        import samopt
        print(json.dumps(sorted(set(sys.modules) - before)))
    """)
    assert [name for name in loaded if name.partition(".")[0] in FORBIDDEN] == []


def test_importing_changes_nothing_global():
    changed = in_fresh_interpreter("""
        import atexit, gc, json, logging, os, random, signal, sys, threading, warnings
        import torch
        from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

        def settings():
            return {
                "torch rng": torch.get_rng_state().tolist(),
                "python rng": repr(random.getstate()),
                "default dtype": torch.get_default_dtype(),
                "default device": torch.get_default_device(),
                "grad mode": torch.is_grad_enabled(),
                "anomaly mode": torch.is_anomaly_enabled(),
                "autocast": torch.is_autocast_enabled("cpu"),
                "threads": (torch.get_num_threads(), torch.get_num_interop_threads(), threading.active_count()),
                "deterministic": torch.are_deterministic_algorithms_enabled(),
                "deterministic debug mode": torch.get_deterministic_debug_mode(),
                "matmul precision": torch.get_float32_matmul_precision(),
                "flush denormal": (torch.tensor([1e-40]) * 1).item(),
                "cudnn": (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark),
                "tf32": torch.backends.cudnn.allow_tf32,
                "sharing strategy": torch.multiprocessing.get_sharing_strategy(),
                "safe globals": torch.serialization.get_safe_globals(),
                "optimizer hooks": (_global_optimizer_pre_hooks, _global_optimizer_post_hooks),
                "optimizer class": sorted(vars(torch.optim.Optimizer)),
                "module class": sorted(vars(torch.nn.Module)),
                "tensor class": sorted(vars(torch.Tensor)),
                "warning filters": warnings.filters,
                "showwarning": warnings.showwarning,
                "environment": dict(os.environ),
                "working directory": os.getcwd(),
                "signal handlers": [signal.getsignal(number) for number in sorted(signal.valid_signals())],
                "exception hooks": (sys.excepthook, threading.excepthook, sys.unraisablehook, sys.displayhook),
                "exit handlers": atexit._ncallbacks(),
                "recursion limit": sys.getrecursionlimit(),
                "garbage collector": (gc.isenabled(), gc.get_threshold()),
                "import machinery": (sys.path, sys.meta_path, sys.path_hooks),
                "tracing": (sys.gettrace(), sys.getprofile()),
                "logging": (logging.root.level, logging.root.handlers, logging.root.manager.disable),
            }

        def snapshot():
            return {name: repr(value) for name, value in settings().items()}

        snapshot()  # the first look may itself load something
        before = snapshot()
        import samopt
        after = snapshot()
        print(json.dumps([name for name in before if before[name] != after[name]]))
    """)
    assert changed == []
