"""The Triton kernels compiled for GPUs that are not here: wide accesses, no stack, the bytes that the docs promise."""

from __future__ import annotations

import re

import pytest

from tests.helpers.compiled import BLOCK, TARGETS, bytes_per_element, compiled, resources

pytest.importorskip("triton", minversion="3.5")

METRICS = ["none", "adaptive", "fisher"]
DTYPES = {"fp32": 4, "bf16": 2, "fp16": 2}
CHUNK = 1 << 14
POINTERS = {"table", "sums", "bounds", "lengths", "norm", "own_length", "written", "applied", "sizes"}


def dtype(name):
    import triton.language as tl

    return {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16, "u32": tl.uint32, "u16": tl.uint16}[name]


def sum_chunk(kind, metric):
    return "stages.sum_chunk", {"DTYPE": dtype(kind), "METRIC": metric, "BLOCK": BLOCK}


def ascend_chunk(kind, metric, linf=False, on_device=False, away=False):
    low = kind != "fp32"
    constants = {
        "DTYPE": dtype(kind), "METRIC": metric, "LINF": linf, "SCALED": False, "ON_DEVICE": on_device,
        "SAVES": not away, "AWAY": away,
        "STOCHASTIC": low, "MEASURED": low, "INTERPRETED": False, "CHUNK": CHUNK, "BLOCK": BLOCK,
    }  # fmt: skip
    return "stages.ascend_chunk", constants


def restore_chunk(kind):
    return "stages.restore_chunk", {"DTYPE": dtype(kind), "BLOCK": BLOCK}


def sgd_chunk(kind, momentum=True, first=False, on_device=False):
    constants = {
        "DTYPE": dtype(kind), "ON_DEVICE": on_device, "MOMENTUM": momentum, "FIRST": first, "NESTEROV": momentum,
        "DECAY": True, "MAXIMIZE": True, "INTERPRETED": False, "BLOCK": BLOCK,
    }  # fmt: skip
    return "base_steps.sgd_chunk", constants


def adam_chunk(kind, amsgrad=False, on_device=False, decay="decoupled"):
    constants = {
        "DTYPE": dtype(kind), "ON_DEVICE": on_device, "COUNTED": on_device, "AMSGRAD": amsgrad, "DECAY": decay,
        "MAXIMIZE": False, "INTERPRETED": False, "BLOCK": BLOCK,
    }  # fmt: skip
    return "base_steps.adam_chunk", constants


def wide_kernels():
    """Every kernel that passes over elements, with its widest use of registers."""
    for kind in DTYPES:
        for metric in METRICS:
            yield f"sum-{kind}-{metric}", (sum_chunk, kind, metric)
            yield f"ascend-{kind}-{metric}", (ascend_chunk, kind, metric)
            yield f"ascend-away-{kind}-{metric}", (ascend_chunk, kind, metric, False, False, True)
    yield "ascend-fp32-adaptive-linf-device", (ascend_chunk, "fp32", "adaptive", True, True)
    yield "ascend-bf16-fisher-linf", (ascend_chunk, "bf16", "fisher", True)
    yield "ascend-bf16-none-linf-device", (ascend_chunk, "bf16", "none", True, True)
    yield "ascend-fp16-adaptive-linf", (ascend_chunk, "fp16", "adaptive", True)
    for kind in DTYPES:
        yield f"sgd-{kind}", (sgd_chunk, kind)
        yield f"adamw-{kind}", (adam_chunk, kind)
    yield "sgd-fp32-plain", (sgd_chunk, "fp32", False)
    yield "sgd-fp32-first-device", (sgd_chunk, "fp32", True, True, True)
    yield "adam-fp32-amsgrad-device", (adam_chunk, "fp32", True, True, "l2")
    yield "adam-bf16-amsgrad-device", (adam_chunk, "bf16", True, True, "l2")
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
            "ascend away": ascend_chunk(kind, "none", away=True),
            "adaptive ascend away": ascend_chunk(kind, "adaptive", away=True),
            "restore": restore_chunk(bits),
            "sgd": sgd_chunk(kind, momentum=False),
            "sgd with momentum": sgd_chunk(kind),
            "adamw": adam_chunk(kind),
        }.items()
    }
    assert moved == {
        "norm": width,
        "adaptive norm": 2 * width,
        "ascend": 4 * width,
        "adaptive ascend": 4 * width,
        "ascend away": 3 * width,
        "adaptive ascend away": 3 * width,
        "restore": 2 * width,
        # The backup is read in the place of the weight, so these are what torch's own fused steps move.
        "sgd": 3 * width,
        "sgd with momentum": 5 * width,
        "adamw": 7 * width,
    }
    assert (moved["norm"] + moved["ascend"]) / width == 5  # 20 bytes in fp32
    assert (moved["adaptive norm"] + moved["adaptive ascend"]) / width == 6  # 24


def test_no_number_that_changes_is_compiled_into_a_kernel():
    from samopt.kernels.triton import base_steps, stages

    kernels = [base_steps.adam_chunk, base_steps.sgd_chunk, stages.ascend_chunk, stages.join_moves, stages.join_sums]
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
