"""Compiles the Triton kernels ahead of time, for devices that need not be there, and reads what came out."""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

BLOCK = 1024
TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}
WIDTH = {"f64": 8, "f32": 4, "bf16": 2, "f16": 2, "i32": 4, "i16": 2}


@functools.cache
def compiled(kernel: str, constants: tuple[tuple[str, Any], ...], target: str) -> Any:
    """What ``triton.compile`` makes of ``module.kernel``, with the options of a launch."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from samopt.kernels.triton import launch

    module, name = kernel.split(".")
    function = getattr(__import__(f"samopt.kernels.triton.{module}", fromlist=[name]), name)
    values = dict(constants)
    signature = {p.name: "constexpr" if p.name in values else _kind(p) for p in function.params}
    source = ASTSource(fn=function, signature=signature, constexprs=values)
    backend, arch, warp = TARGETS[target]
    options = {name: value for name, value in launch.OPTIONS.items() if backend == "cuda" or name != "maxnreg"}
    return triton.compile(source, target=GPUTarget(backend, arch, warp), options=options)


def _kind(parameter: Any) -> str:
    """The type that a launch gives a parameter of this name."""
    pointers = {"table": "i64", "bounds": "i64", "written": "i64"}
    if parameter.annotation_type:
        return parameter.annotation_type
    if parameter.name in ("eta", "root_eta"):
        return "fp32"
    if parameter.name in ("chunks", "total", "first", "blocks"):
        return "i32"
    return "*" + pointers.get(parameter.name, "fp64")


def resources(kernel: Any) -> dict[str, int]:
    """Bytes on the stack and in local memory (spills) of each thread; for AMD, spilled registers."""
    if "cubin" in kernel.asm:
        import triton

        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
            shown = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        return {name: int(re.search(rf"{name}:(\d+)", shown)[1]) for name in ("STACK", "LOCAL")}
    fields = ("vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
    return {name: int(re.search(rf"\.{name}:\s+(\d+)", kernel.asm["amdgcn"])[1]) for name in fields}


def bytes_per_element(kernel: Any) -> int:
    """Bytes that the loop over whole blocks loads and stores for each of its elements, from the intermediate code.

    Every load and store counts: the compiler before it removed those that are not needed.
    """
    ir = kernel.asm["ttir"]
    loop = ir[ir.index("scf.for") :]
    loop = loop[: loop.index("scf.for", 1)]  # the second one is that of the rest
    moved = re.findall(rf"tt\.(?:load|store) [^\n]*tensor<{BLOCK}x!tt\.ptr<(\w+)>>", loop)
    return sum(WIDTH[kind] for kind in moved)
