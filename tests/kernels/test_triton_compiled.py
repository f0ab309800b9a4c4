"""The Triton kernels compiled for GPUs that are not here: wide accesses, no stack, the bytes that the docs promise."""

from __future__ import annotations

import re

import pytest

from tests.helpers.compiled import BLOCK, TARGETS, bytes_per_element, compiled, resources

pytest.importorskip("triton", minversion="3.5")

GEOMETRIES = ["none", "adaptive", "fisher"]
DTYPES = {"fp32": 4, "bf16": 2, "fp16": 2}
CHUNK = 1 << 14
POINTERS = {"table", "sums", "bounds", "lengths", "norm", "own_length", "written", "applied", "sizes"}


def dtype(name):
    import triton.language as tl

    return {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16, "u32": tl.uint32, "u16": tl.uint16}[name]


def sum_chunk(kind, geometry):
    return "stages.sum_chunk", {"DTYPE": dtype(kind), "GEOMETRY": geometry, "BLOCK": BLOCK}


def ascend_chunk(kind, geometry, linf=False, on_device=False, into=False):
    low = kind != "fp32"
    constants = {
        "DTYPE": dtype(kind), "GEOMETRY": geometry, "LINF": linf, "ON_DEVICE": on_device,
        "SAVES": not into, "INTO": into,
        "STOCHASTIC": low, "MEASURED": low, "INTERPRETED": False, "CHUNK": CHUNK, "BLOCK": BLOCK,
    }  # fmt: skip
    return "stages.ascend_chunk", constants


def restore_chunk(kind):
    return "stages.restore_chunk", {"DTYPE": dtype(kind), "BLOCK": BLOCK}


def wide_kernels():
    """Every kernel that passes over elements, with its widest use of registers."""
    for kind in DTYPES:
        for geometry in GEOMETRIES:
            yield f"sum-{kind}-{geometry}", (sum_chunk, kind, geometry)
            yield f"ascend-{kind}-{geometry}", (ascend_chunk, kind, geometry)
            yield f"ascend-into-{kind}-{geometry}", (ascend_chunk, kind, geometry, False, False, True)
    yield "ascend-fp32-adaptive-linf-device", (ascend_chunk, "fp32", "adaptive", True, True)
    yield "ascend-bf16-fisher-linf", (ascend_chunk, "bf16", "fisher", True)
    yield "ascend-bf16-none-linf-device", (ascend_chunk, "bf16", "none", True, True)
    yield "ascend-fp16-adaptive-linf", (ascend_chunk, "fp16", "adaptive", True)
    for kind in ("u32", "u16"):
        yield f"restore-{kind}", (restore_chunk, kind)


CASES = dict(wide_kernels())


def build(case, target):
    make, *arguments = CASES[case]
    name, constants = make(*arguments)
    return compiled(name, tuple(constants.items()), target)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", CASES)
def test_kernels_move_128_bits_at_a_time_without_a_stack(case, target):
    kernel = build(case, target)
    assert set(resources(kernel).values()) == {0}
    writes = not case.startswith("sum")
    if target == "gfx942":
        words = 4 if "32" in case else 2  # the 256 threads of a program have four elements each
        assert re.search(rf"(buffer|global|flat)_load_dwordx{words}", kernel.asm["amdgcn"])
        assert not writes or re.search(rf"(buffer|global|flat)_store_dwordx{words}", kernel.asm["amdgcn"])
    else:
        assert "ld.global.v4.b32" in kernel.asm["ptx"]
        assert not writes or "st.global.v4.b32" in kernel.asm["ptx"]


@pytest.mark.parametrize("target", TARGETS)
def test_kernels_of_one_program_compile_without_a_stack(target):
    for name, constants in (
        ("stages.join_sums", {"BLOCK": BLOCK}),
        ("stages.join_moves", {"LINF": False, "BLOCK": BLOCK}),
        ("stages.join_moves", {"LINF": True, "BLOCK": BLOCK}),
    ):
        assert set(resources(compiled(name, tuple(constants.items()), target)).values()) == {0}


@pytest.mark.parametrize("kind", DTYPES)
def test_a_step_moves_the_bytes_of_the_table(kind):
    width = DTYPES[kind]
    bits = "u32" if width == 4 else "u16"
    moved = {
        name: bytes_per_element(compiled(kernel, tuple(constants.items()), "sm_90"))
        for name, (kernel, constants) in {
            "norm": sum_chunk(kind, "none"),
            "adaptive norm": sum_chunk(kind, "adaptive"),
            "ascend": ascend_chunk(kind, "none"),
            "adaptive ascend": ascend_chunk(kind, "adaptive"),
            "ascend into": ascend_chunk(kind, "none", into=True),
            "adaptive ascend into": ascend_chunk(kind, "adaptive", into=True),
            "restore": restore_chunk(bits),
        }.items()
    }
    assert moved == {
        "norm": width,
        "adaptive norm": 2 * width,
        "ascend": 4 * width,
        "adaptive ascend": 4 * width,
        "ascend into": 3 * width,
        "adaptive ascend into": 3 * width,
        "restore": 2 * width,
    }
    two_passes, one_pass = ("norm", "ascend", "restore"), ("norm", "ascend into")
    assert sum(moved[name] for name in two_passes) / width == 7  # 28 bytes in fp32
    assert sum(moved[name.replace("norm", "adaptive norm")] for name in two_passes) / width == 8  # 32
    assert sum(moved[name] for name in one_pass) / width == 4  # 16


def test_no_number_that_changes_is_compiled_into_a_kernel():
    from samopt.kernels.triton import stages

    kernels = [stages.ascend_chunk, stages.join_moves, stages.join_sums]
    for kernel in [*kernels, stages.restore_chunk, stages.sum_chunk]:
        for parameter in kernel.params:
            pointer = parameter.name in POINTERS or parameter.name.endswith("_at")
            if parameter.is_constexpr or pointer or parameter.name in ("eta", "root_eta"):
                continue  # Triton tells floating-point numbers apart by their type alone
            assert parameter.do_not_specialize or parameter.annotation_type == "fp64", parameter.name


def test_numbers_keep_the_precision_that_python_gave_them():
    from samopt.kernels.triton import stages

    assert {p.name: p.annotation_type for p in stages.ascend_chunk.params if p.annotation_type} == {
        "radius": "fp64", "sign": "i32", "key_low": "i32", "key_high": "i32", "stamp": "i64",
    }  # fmt: skip
