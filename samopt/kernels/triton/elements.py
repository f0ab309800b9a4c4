"""What the kernels compute for one element, in fp32, as the reference does."""

import triton
import triton.language as tl

__all__ = ["rounded_to_nearest", "scale_of", "stochastically_rounded", "uniform", "uphill"]


@triton.jit
def scale_of(w, d, eta, root_eta, GEOMETRY: tl.constexpr):
    """Return ``T`` of the geometry.

    Args:
        w: Weights.
        d: Directions.
        eta: The stabiliser of the geometry.
        root_eta: Its square root.
        GEOMETRY: "none", "adaptive" or "fisher".
    """
    if GEOMETRY == "adaptive":
        return tl.abs(w) + eta
    elif GEOMETRY == "fisher":
        x = tl.abs(d) * root_eta
        larger, smaller = tl.maximum(x, 1.0), tl.minimum(x, 1.0)
        ratio = smaller / larger  # the square of 1e30 would overflow
        return 1.0 / (larger * tl.sqrt(1.0 + ratio * ratio))
    else:
        return tl.full(w.shape, 1.0, tl.float32)


@triton.jit
def uphill(w, d, eta, root_eta, GEOMETRY: tl.constexpr, LINF: tl.constexpr):
    """Return ``T^2 d`` (l2) or ``T sign(d)`` (l-infinity); arguments as for ``scale_of``."""
    if LINF:
        sign = tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, d))  # of nan: nan
        if GEOMETRY == "none":
            return sign
        else:
            return sign * scale_of(w, d, eta, root_eta, GEOMETRY)
    elif GEOMETRY == "none":
        return d
    else:
        t = scale_of(w, d, eta, root_eta, GEOMETRY)
        return d * t * t  # T^2 alone may underflow


@triton.jit
def uniform(index, key_low, key_high):
    """Return numbers uniform in [0, 1), 24 bits each: two rounds of a 32-bit mixer over a counter and a key.

    Args:
        index: uint32 counters.
        key_low: Half of the key.
        key_high: The other half.
    """
    bits = _mixed(_mixed(index ^ key_low.to(tl.uint32)) ^ key_high.to(tl.uint32))
    return (bits >> 8).to(tl.float32) * 5.9604644775390625e-08  # 2^-24


@triton.jit
def _mixed(x):
    # The constants are Chris Wellons' "lowbias32", found by search for a small bias between input and output bits.
    x = (x ^ (x >> 16)) * tl.full((), 0x7FEB352D, tl.uint32)
    x = (x ^ (x >> 15)) * tl.full((), 0x846CA68B, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def stochastically_rounded(x, noise, DTYPE: tl.constexpr):
    """Return ``x`` at a neighbour in ``DTYPE``, still in fp32; up with probability equal to the fraction lost.

    Args:
        x: fp32 values.
        noise: Uniform in [0, 1).
        DTYPE: ``tl.bfloat16`` or ``tl.float16``.
    """
    HALF: tl.constexpr = DTYPE == tl.float16
    MANTISSA: tl.constexpr = 10 if HALF else 7
    LOWEST: tl.constexpr = -14 if HALF else -119  # keeps the spacing a normal fp32 number
    SMALLEST: tl.constexpr = 0.0 if HALF else 1.504632769052528e-36  # 2^-119; what is smaller is rounded to nearest
    LARGEST: tl.constexpr = 65504.0 if HALF else 3.3895313892515355e38
    exponent = ((x.to(tl.int32, bitcast=True) >> 23) & 0xFF) - 127
    exponent = tl.maximum(exponent, LOWEST) - MANTISSA
    spacing = ((exponent + 127) << 23).to(tl.float32, bitcast=True)
    per_spacing = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
    quotient = x * per_spacing  # by a power of two, so exact
    below = tl.floor(quotient)
    up = tl.where(noise < quotient - below, 1.0, 0.0)
    rounded = tl.minimum(tl.maximum((below + up) * spacing, -LARGEST), LARGEST)
    size = tl.abs(x)
    return tl.where((size >= SMALLEST) & (size < float("inf")), rounded, x)


@triton.jit
def rounded_to_nearest(x, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    """Return fp32 ``x`` in ``DTYPE``, rounded to nearest even.

    Args:
        x: fp32 values.
        DTYPE: ``tl.float32``, ``tl.bfloat16`` or ``tl.float16``.
        INTERPRETED: Whether Triton's interpreter runs this, which truncates to bf16.
    """
    if INTERPRETED and DTYPE == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        even = bits + 0x7FFF + ((bits >> 16) & 1)
        quiet = (bits | 0x400000) & 0xFFFF0000
        bits = tl.where(x == x, even & 0xFFFF0000, quiet)
        return bits.to(tl.float32, bitcast=True).to(tl.bfloat16)
    else:
        return x.to(DTYPE)
