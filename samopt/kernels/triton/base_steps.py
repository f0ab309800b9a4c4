"""The kernels that restore and step the base in one pass; each program takes one chunk of a pointer table."""

import triton
import triton.language as tl

from samopt.kernels.triton.elements import rounded_to_nearest

__all__ = ["adam_chunk", "sgd_chunk"]

# Rows of a pointer table, in int64: addresses of weights, of where their exact values are (a backup, or the weights
# themselves), of gradients, of the marks of backups (0 without one), of each state; numbers of elements.


@triton.jit
def _start(table, chunks, ROW: tl.constexpr, DTYPE: tl.constexpr):
    address = tl.load(table + ROW * chunks + tl.program_id(0))
    return address, address.to(tl.pointer_type(DTYPE))


@triton.jit
def _clear_mark(table, chunks, ROW: tl.constexpr):
    """Note that a chunk's backup is out of date: from now on, the weights are the base's new ones."""
    address = tl.load(table + ROW * chunks + tl.program_id(0))
    tl.store(address.to(tl.pointer_type(tl.int64)), 0, mask=address != 0)


@triton.jit
def _wide(number):
    return tl.full((), number, tl.float64)  # to the interpreter, a number is one of Python's


@triton.jit
def _narrow(number):
    return tl.full((), number, tl.float64).to(tl.float32)


@triton.jit
def _load(start, at, lane, inside, WHOLE: tl.constexpr):
    if WHOLE:
        return tl.load(tl.multiple_of(start + at, 16) + lane).to(tl.float32)
    else:
        return tl.load(start + at + lane, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store(start, at, lane, inside, values, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr, WHOLE: tl.constexpr):
    rounded = rounded_to_nearest(values, DTYPE, INTERPRETED)
    if WHOLE:
        tl.store(tl.multiple_of(start + at, 16) + lane, rounded)
    else:
        tl.store(start + at + lane, rounded, mask=inside)


@triton.jit(do_not_specialize=["chunks"])
def sgd_chunk(
    table,
    chunks,
    lr: tl.float64,
    lr_at,
    momentum: tl.float64,
    undampened: tl.float64,
    weight_decay: tl.float64,
    DTYPE: tl.constexpr,
    ON_DEVICE: tl.constexpr,
    MOMENTUM: tl.constexpr,
    FIRST: tl.constexpr,
    NESTEROV: tl.constexpr,
    DECAY: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Restore and take the step of ``torch.optim.SGD``, in its order of operations, in fp32.

    Args:
        table: The pointer table; its state is the momentum.
        chunks: Its width.
        lr: Learning rate.
        lr_at: Where it is, if ``ON_DEVICE``.
        momentum: Its factor.
        undampened: ``1 - dampening``.
        weight_decay: The l2 penalty.
        DTYPE: Of all tensors.
        ON_DEVICE: Whether the learning rate is in device memory.
        MOMENTUM: Whether there is momentum.
        FIRST: Whether the momentum begins with this step.
        NESTEROV: Whether it is Nesterov's.
        DECAY: Whether there is a penalty.
        MAXIMIZE: Whether to go uphill.
        INTERPRETED: Whether Triton's interpreter runs this.
        BLOCK: Elements at a time.
    """
    w_address, w_start = _start(table, chunks, 0, DTYPE)
    x_address, x_start = _start(table, chunks, 1, DTYPE)
    g_address, g_start = _start(table, chunks, 2, DTYPE)
    addresses = w_address | x_address | g_address
    m_start = w_start
    if MOMENTUM:
        m_address, m_start = _start(table, chunks, 4, DTYPE)
        addresses = addresses | m_address
    size = tl.load(table + (5 if MOMENTUM else 4) * chunks + tl.program_id(0)).to(tl.int32)
    rate = _narrow(tl.load(lr_at) if ON_DEVICE else lr)
    whole = tl.where((addresses & 15) == 0, size // BLOCK * BLOCK, 0)
    lane = tl.arange(0, BLOCK)
    for at in range(0, whole, BLOCK):
        _sgd(w_start, x_start, g_start, m_start, at, lane, lane < BLOCK, rate, _narrow(momentum),
             _narrow(undampened), _narrow(weight_decay),
             DTYPE, MOMENTUM, FIRST, NESTEROV, DECAY, MAXIMIZE, INTERPRETED, True)  # fmt: skip
    for at in range(whole, size, BLOCK):
        _sgd(w_start, x_start, g_start, m_start, at, lane, at + lane < size, rate, _narrow(momentum),
             _narrow(undampened), _narrow(weight_decay),
             DTYPE, MOMENTUM, FIRST, NESTEROV, DECAY, MAXIMIZE, INTERPRETED, False)  # fmt: skip
    _clear_mark(table, chunks, 3)


@triton.jit
def _sgd(
    w_start, x_start, g_start, m_start, at, lane, inside, rate, momentum, undampened, weight_decay,
    DTYPE: tl.constexpr, MOMENTUM: tl.constexpr, FIRST: tl.constexpr, NESTEROV: tl.constexpr, DECAY: tl.constexpr,
    MAXIMIZE: tl.constexpr, INTERPRETED: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    w = _load(x_start, at, lane, inside, WHOLE)
    g = _load(g_start, at, lane, inside, WHOLE)
    if MAXIMIZE:
        g = -g
    if DECAY:
        g = tl.fma(weight_decay, w, g)
    if MOMENTUM:
        m = g
        if not FIRST:
            m = tl.fma(undampened, g, momentum * _load(m_start, at, lane, inside, WHOLE))
        _store(m_start, at, lane, inside, m, DTYPE, INTERPRETED, WHOLE)
        g = tl.fma(momentum, m, g) if NESTEROV else m
    _store(w_start, at, lane, inside, tl.fma(-rate, g, w), DTYPE, INTERPRETED, WHOLE)


@triton.jit(do_not_specialize=["chunks"])
def adam_chunk(
    table,
    chunks,
    lr: tl.float64,
    lr_at,
    beta1: tl.float64,
    beta2: tl.float64,
    log_beta1: tl.float64,
    log_beta2: tl.float64,
    step: tl.float64,
    weight_decay: tl.float64,
    eps: tl.float64,
    DTYPE: tl.constexpr,
    ON_DEVICE: tl.constexpr,
    COUNTED: tl.constexpr,
    AMSGRAD: tl.constexpr,
    DECAY: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Restore and take the step of ``torch.optim.Adam`` or ``AdamW``, in the order of their fused kernels, in fp32.

    Args:
        table: The pointer table; its states are both moments, the largest second one where ``AMSGRAD``, and the number
            of the step where ``COUNTED``.
        chunks: Its width.
        lr: Learning rate.
        lr_at: Where it is, if ``ON_DEVICE``.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        log_beta1: Its logarithm.
        log_beta2: Its logarithm.
        step: The number of the step, this one included, unless ``COUNTED``.
        weight_decay: The l2 penalty, or the decay of the weights themselves.
        eps: Added to the root of the second moment.
        DTYPE: Of all tensors.
        ON_DEVICE: Whether the learning rate is in device memory.
        COUNTED: Whether the number of the step is in device memory, in fp32, this one included.
        AMSGRAD: Whether to use the largest second moment so far.
        DECAY: "none", "l2", or "decoupled".
        MAXIMIZE: Whether to go uphill.
        INTERPRETED: Whether Triton's interpreter runs this.
        BLOCK: Elements at a time.
    """
    w_address, w_start = _start(table, chunks, 0, DTYPE)
    x_address, x_start = _start(table, chunks, 1, DTYPE)
    g_address, g_start = _start(table, chunks, 2, DTYPE)
    m_address, m_start = _start(table, chunks, 4, DTYPE)
    v_address, v_start = _start(table, chunks, 5, DTYPE)
    addresses = w_address | x_address | g_address | m_address | v_address
    STATES: tl.constexpr = 3 if AMSGRAD else 2
    top_start = v_start
    if AMSGRAD:
        top_address, top_start = _start(table, chunks, 6, DTYPE)
        addresses = addresses | top_address
    number = _wide(step)
    if COUNTED:
        _, counter = _start(table, chunks, 4 + STATES, tl.float32)
        number = tl.load(counter).to(tl.float64)
    size = tl.load(table + (4 + STATES + COUNTED) * chunks + tl.program_id(0)).to(tl.int32)
    rate = _wide(tl.load(lr_at) if ON_DEVICE else lr)
    decay = _narrow(rate * weight_decay if DECAY == "decoupled" else weight_decay)
    stride = _narrow(rate / (1.0 - tl.exp(number * log_beta1)))
    root = _narrow(tl.sqrt(1.0 - tl.exp(number * log_beta2)))
    whole = tl.where((addresses & 15) == 0, size // BLOCK * BLOCK, 0)
    lane = tl.arange(0, BLOCK)
    for at in range(0, whole, BLOCK):
        _adam(w_start, x_start, g_start, m_start, v_start, top_start, at, lane, lane < BLOCK, stride, root, decay,
              _narrow(beta2), _narrow(1.0 - beta1), _narrow(1.0 - beta2), _narrow(eps),
              DTYPE, AMSGRAD, DECAY, MAXIMIZE, INTERPRETED, True)  # fmt: skip
    for at in range(whole, size, BLOCK):
        _adam(w_start, x_start, g_start, m_start, v_start, top_start, at, lane, at + lane < size, stride, root, decay,
              _narrow(beta2), _narrow(1.0 - beta1), _narrow(1.0 - beta2), _narrow(eps),
              DTYPE, AMSGRAD, DECAY, MAXIMIZE, INTERPRETED, False)  # fmt: skip
    _clear_mark(table, chunks, 3)


@triton.jit
def _adam(
    w_start, x_start, g_start, m_start, v_start, top_start, at, lane, inside, stride, root, decay,
    beta2, rest1, rest2, eps,
    DTYPE: tl.constexpr, AMSGRAD: tl.constexpr, DECAY: tl.constexpr, MAXIMIZE: tl.constexpr,
    INTERPRETED: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    w = _load(x_start, at, lane, inside, WHOLE)
    g = _load(g_start, at, lane, inside, WHOLE)
    m = _load(m_start, at, lane, inside, WHOLE)
    v = _load(v_start, at, lane, inside, WHOLE)
    if MAXIMIZE:
        g = -g
    if DECAY == "l2":
        g = tl.fma(decay, w, g)
    if DECAY == "decoupled":
        w = tl.fma(-decay, w, w)
    m = tl.fma(rest1, g - m, m)
    v = tl.fma(rest2 * g, g, beta2 * v)
    _store(m_start, at, lane, inside, m, DTYPE, INTERPRETED, WHOLE)
    _store(v_start, at, lane, inside, v, DTYPE, INTERPRETED, WHOLE)
    if AMSGRAD:
        v = tl.maximum(_load(top_start, at, lane, inside, WHOLE), v)
        _store(top_start, at, lane, inside, v, DTYPE, INTERPRETED, WHOLE)
    w = w - stride * tl.div_rn(m, tl.div_rn(tl.sqrt_rn(v), root) + eps)
    _store(w_start, at, lane, inside, w, DTYPE, INTERPRETED, WHOLE)
