"""The kernels of the norm, the ascent and the restore; each program takes one chunk of a pointer table."""

import triton
import triton.language as tl

from samopt.kernels.triton.elements import rounded_to_nearest, scale_of, stochastically_rounded, uniform, uphill

__all__ = ["ascend_chunk", "join_moves", "join_sums", "restore_chunk", "sum_chunk"]

# Rows of a pointer table, in int64: addresses of weights, of directions, of backups or results; numbers of elements.


@triton.jit(do_not_specialize=["chunks", "total", "first"])
def sum_chunk(
    table,
    chunks,
    sums,
    total,
    first,
    eta,
    root_eta,
    DTYPE: tl.constexpr,
    GEOMETRY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum ``(T d)^2`` over a chunk, and ``d^2``, in fp64, where no square of a finite fp32 value is lost.

    Args:
        table: The pointer table.
        chunks: Its width.
        sums: fp64, room for two rows.
        total: Width of a row of ``sums``.
        first: Where this table's sums begin in a row.
        eta: The stabiliser of the geometry.
        root_eta: Its square root.
        DTYPE: Of weights and directions.
        GEOMETRY: As for ``scale_of``.
        BLOCK: Elements at a time.
    """
    chunk = tl.program_id(0)
    w_address = tl.load(table + chunk)
    d_address = tl.load(table + chunks + chunk)
    size = tl.load(table + 3 * chunks + chunk).to(tl.int32)
    w_start = w_address.to(tl.pointer_type(DTYPE))
    d_start = d_address.to(tl.pointer_type(DTYPE))
    addresses = d_address | w_address if GEOMETRY == "adaptive" else d_address
    whole = tl.where((addresses & 15) == 0, size // BLOCK * BLOCK, 0)
    lane = tl.arange(0, BLOCK)
    scaled = tl.zeros([BLOCK], tl.float64)
    plain = tl.zeros([BLOCK], tl.float64)
    for at in range(0, whole, BLOCK):
        d = tl.load(tl.multiple_of(d_start + at, 16) + lane).to(tl.float32)
        w = d
        if GEOMETRY == "adaptive":
            w = tl.load(tl.multiple_of(w_start + at, 16) + lane).to(tl.float32)
        plain += _square(d)
        if GEOMETRY != "none":
            scaled += _square(d * scale_of(w, d, eta, root_eta, GEOMETRY))
    for at in range(whole, size, BLOCK):
        inside = at + lane < size
        d = tl.load(d_start + at + lane, mask=inside, other=0.0).to(tl.float32)
        w = d
        if GEOMETRY == "adaptive":
            w = tl.load(w_start + at + lane, mask=inside, other=0.0).to(tl.float32)
        plain += _square(d)
        if GEOMETRY != "none":
            scaled += _square(d * scale_of(w, d, eta, root_eta, GEOMETRY))
    plain_sum = tl.sum(plain)
    tl.store(sums + total + first + chunk, plain_sum)
    tl.store(sums + first + chunk, plain_sum if GEOMETRY == "none" else tl.sum(scaled))


@triton.jit
def _square(x):
    wide = x.to(tl.float64)
    return wide * wide


@triton.jit(do_not_specialize=["total", "blocks"])
def join_sums(sums, total, bounds, blocks, lengths, BLOCK: tl.constexpr):
    """Write the norm of everything, without ``T``, and of each block: one program, so one order.

    Args:
        sums: fp64, a row with ``T`` and a row without.
        total: Width of a row.
        bounds: int64, where each block's sums begin, and ``total``.
        blocks: How many blocks.
        lengths: fp64, room for ``3 + blocks`` numbers; the third is the norm times 0.
        BLOCK: Sums at a time.
    """
    lane = tl.arange(0, BLOCK)
    everything = tl.zeros([], tl.float64)
    everything_plain = tl.zeros([], tl.float64)
    for block in range(0, blocks):
        begin = tl.load(bounds + block).to(tl.int32)
        end = tl.load(bounds + block + 1).to(tl.int32)
        scaled = tl.zeros([BLOCK], tl.float64)
        plain = tl.zeros([BLOCK], tl.float64)
        for at in range(begin, end, BLOCK):
            inside = at + lane < end
            scaled += tl.load(sums + at + lane, mask=inside, other=0.0)
            plain += tl.load(sums + total + at + lane, mask=inside, other=0.0)
        part = tl.sum(scaled)
        tl.store(lengths + 3 + block, tl.sqrt(part))
        everything += part
        everything_plain += tl.sum(plain)
    tl.store(lengths, tl.sqrt(everything))
    tl.store(lengths + 1, tl.sqrt(everything_plain))
    tl.store(lengths + 2, everything * 0.0)


@triton.jit(do_not_specialize=["chunks", "sign", "key_low", "key_high", "stamp"])
def ascend_chunk(
    table,
    chunks,
    norm,
    own_length,
    radius: tl.float64,
    radius_at,
    sign: tl.int32,
    eta,
    root_eta,
    key_low: tl.int32,
    key_high: tl.int32,
    written,
    stamp: tl.int64,
    applied,
    DTYPE: tl.constexpr,
    GEOMETRY: tl.constexpr,
    LINF: tl.constexpr,
    ON_DEVICE: tl.constexpr,
    SAVES: tl.constexpr,
    INTO: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    MEASURED: tl.constexpr,
    INTERPRETED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write ``w + s T^2 d`` or ``w + s T sign(d)`` with ``s = r / ||T d||`` or ``r``; save the old ``w``, if asked.

    Args:
        table: The pointer table.
        chunks: Its width.
        norm: fp64, ``||T d||`` over everything that moves; 0 or not finite moves nothing.
        own_length: fp64, ``||T d||`` over this table.
        radius: The radius.
        radius_at: Where it is, if ``ON_DEVICE``.
        sign: 1 or -1.
        eta: The stabiliser of the geometry.
        root_eta: Its square root.
        key_low: Half of the key of the rounding noise.
        key_high: The other half.
        written: int64, where each chunk leaves ``stamp``, if ``SAVES``: the sign that its backup is the old weights.
        stamp: A number that no other ascent has.
        applied: fp64, where to leave the norm of the move; where ``MEASURED``, its square or largest entry by chunk.
        DTYPE: Of weights and directions.
        GEOMETRY: As for ``scale_of``.
        LINF: Whether the ball is the l-infinity one.
        ON_DEVICE: Whether the radius is in device memory.
        SAVES: Whether to keep the old weights in the third row of the table.
        INTO: Whether to write to the third row of the table instead of the weights.
        STOCHASTIC: Whether to round stochastically.
        MEASURED: Whether to measure the move as it is after rounding.
        INTERPRETED: Whether Triton's interpreter runs this.
        CHUNK: Elements in a chunk.
        BLOCK: Elements at a time.
    """
    chunk = tl.program_id(0)
    w_address = tl.load(table + chunk)
    d_address = tl.load(table + chunks + chunk)
    b_address = tl.load(table + 2 * chunks + chunk)
    size = tl.load(table + 3 * chunks + chunk).to(tl.int32)
    w_start = w_address.to(tl.pointer_type(DTYPE))
    d_start = d_address.to(tl.pointer_type(DTYPE))
    b_start = b_address.to(tl.pointer_type(DTYPE))

    asked = tl.load(radius_at).to(tl.float64) if ON_DEVICE else radius
    scale = _scale(asked * sign, tl.load(norm), LINF)
    if not MEASURED:
        own = tl.load(own_length)
        moved = own < float("inf")  # not so for nan
        by = tl.where(own > 0, 1.0, 0.0) if LINF else own
        tl.store(applied, tl.where(moved, tl.abs(scale) * by, 0.0), mask=chunk == 0)
    step = scale.to(tl.float32)
    if SAVES:
        tl.store(written + chunk, stamp)

    lane = tl.arange(0, BLOCK)
    sizes = tl.zeros([BLOCK], tl.float64)
    addresses = w_address | d_address | b_address if SAVES or INTO else w_address | d_address
    whole = tl.where((addresses & 15) == 0, size // BLOCK * BLOCK, 0)
    for at in range(0, whole, BLOCK):
        places = tl.multiple_of(w_start + at, 16) + lane
        old = tl.load(places)
        d = tl.load(tl.multiple_of(d_start + at, 16) + lane).to(tl.float32)
        new = _moved(old, d, step, eta, root_eta, chunk * CHUNK + at + lane, key_low, key_high,
                     DTYPE, GEOMETRY, LINF, STOCHASTIC, INTERPRETED)  # fmt: skip
        if SAVES:
            tl.store(tl.multiple_of(b_start + at, 16) + lane, old)
        if INTO:
            tl.store(tl.multiple_of(b_start + at, 16) + lane, new)
        else:
            tl.store(places, new)
        if MEASURED:
            sizes = _with_move(sizes, old, new, d, eta, root_eta, GEOMETRY, LINF)
    for at in range(whole, size, BLOCK):
        inside = at + lane < size
        old = tl.load(w_start + at + lane, mask=inside, other=0.0)
        d = tl.load(d_start + at + lane, mask=inside, other=0.0).to(tl.float32)
        new = _moved(old, d, step, eta, root_eta, chunk * CHUNK + at + lane, key_low, key_high,
                     DTYPE, GEOMETRY, LINF, STOCHASTIC, INTERPRETED)  # fmt: skip
        if SAVES:
            tl.store(b_start + at + lane, old, mask=inside)
        tl.store((b_start if INTO else w_start) + at + lane, new, mask=inside)
        if MEASURED:
            sizes = _with_move(sizes, old, tl.where(inside, new, old), d, eta, root_eta, GEOMETRY, LINF)
    if MEASURED:
        tl.store(applied + chunk, tl.max(sizes) if LINF else tl.sum(sizes))


@triton.jit
def _scale(radius, norm, LINF: tl.constexpr):
    usable = (norm > 0) & (norm < float("inf"))
    size = radius if LINF else radius / tl.where(usable, norm, 1.0)
    size = tl.minimum(tl.maximum(size, -3.4028234663852886e38), 3.4028234663852886e38)
    return tl.where(usable, size, 0.0)


@triton.jit
def _moved(
    old, d, step, eta, root_eta, index, key_low, key_high,
    DTYPE: tl.constexpr, GEOMETRY: tl.constexpr, LINF: tl.constexpr, STOCHASTIC: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    w = old.to(tl.float32)
    move = uphill(w, d, eta, root_eta, GEOMETRY, LINF)
    new = w + tl.where(step != 0, move * step, 0.0)  # zero times infinity is nan
    if STOCHASTIC:
        noise = uniform(index.to(tl.uint32, bitcast=True), key_low, key_high)
        new = stochastically_rounded(new, noise, DTYPE)
    return rounded_to_nearest(new, DTYPE, INTERPRETED)


@triton.jit
def _with_move(sizes, old, new, d, eta, root_eta, GEOMETRY: tl.constexpr, LINF: tl.constexpr):
    w = old.to(tl.float32)
    by = new.to(tl.float32) - w
    if GEOMETRY != "none":
        by = tl.where(by != 0, by / scale_of(w, d, eta, root_eta, GEOMETRY), by)  # T may be 0 where nothing moved
    wide = by.to(tl.float64)
    return tl.maximum(sizes, tl.abs(wide)) if LINF else sizes + wide * wide


@triton.jit(do_not_specialize=["chunks"])
def join_moves(sizes, chunks, applied, LINF: tl.constexpr, BLOCK: tl.constexpr):
    """Write the norm of a move from what ``ascend_chunk`` measured.

    Args:
        sizes: fp64, one for each chunk.
        chunks: How many.
        applied: fp64, room for one number.
        LINF: Whether the ball is the l-infinity one.
        BLOCK: Entries at a time.
    """
    lane = tl.arange(0, BLOCK)
    joined = tl.zeros([BLOCK], tl.float64)
    for at in range(0, chunks, BLOCK):
        some = tl.load(sizes + at + lane, mask=at + lane < chunks, other=0.0)
        joined = tl.maximum(joined, some) if LINF else joined + some
    tl.store(applied, tl.max(joined) if LINF else tl.sqrt(tl.sum(joined)))


@triton.jit(do_not_specialize=["chunks", "stamp"])
def restore_chunk(table, chunks, written, stamp: tl.int64, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """Copy the backups into the weights, bit for bit, if the ascent has been.

    Args:
        table: The pointer table.
        chunks: Its width.
        written: int64, where the ascent left its stamps.
        stamp: The stamp.
        DTYPE: Unsigned integers as wide as the weights.
        BLOCK: Elements at a time.
    """
    chunk = tl.program_id(0)
    w_address = tl.load(table + chunk)
    b_address = tl.load(table + 2 * chunks + chunk)
    size = tl.load(table + 3 * chunks + chunk).to(tl.int32)
    size = tl.where(tl.load(written + chunk) == stamp, size, 0)
    w_start = w_address.to(tl.pointer_type(DTYPE))
    b_start = b_address.to(tl.pointer_type(DTYPE))
    whole = tl.where(((w_address | b_address) & 15) == 0, size // BLOCK * BLOCK, 0)
    lane = tl.arange(0, BLOCK)
    for at in range(0, whole, BLOCK):
        tl.store(tl.multiple_of(w_start + at, 16) + lane, tl.load(tl.multiple_of(b_start + at, 16) + lane))
    for at in range(whole, size, BLOCK):
        inside = at + lane < size
        tl.store(w_start + at + lane, tl.load(b_start + at + lane, mask=inside), mask=inside)
