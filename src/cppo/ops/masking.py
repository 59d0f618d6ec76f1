"""Zeroing tokens by their bits.

A product with a 0/1 mask turns NaN and infinity into NaN, and ``masked_fill`` and ``where`` cost a CPU many times a
product. A bitwise and with all ones or all zeros is exact for every value and as fast as a product.
"""

from __future__ import annotations

import torch
from torch import Tensor


def bit_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return integers of ``dtype``'s width: all bits one where the bool ``mask`` is True, else zero."""
    integer = torch.int64 if dtype == torch.float64 else torch.int32
    return mask.view(torch.uint8).to(integer).neg_()


def finite_bits(values: Tensor) -> Tensor:
    """Return the bit mask of the entries that are neither NaN nor infinite: those whose exponent is not all ones."""
    integer, exponent, sign = (
        (torch.int64, 0x7FF0000000000000, 63) if values.dtype == torch.float64 else (torch.int32, 0x7F800000, 31)
    )
    # Below all ones the difference is negative, and its sign bit, shifted over all the others, fills the mask.
    return values.view(integer).bitwise_and(exponent).sub_(exponent).bitwise_right_shift_(sign)


def zero_outside_(values: Tensor, bits: Tensor) -> Tensor:
    """Set ``values`` to +0.0 in place where ``bits`` are zero; return them. For any value, NaN included."""
    values.view(bits.dtype).bitwise_and_(bits)
    return values


def as_dtype(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a bool mask as 0/1 of ``dtype`` (through bytes: the direct conversion is slower on a CPU)."""
    return mask.view(torch.uint8).to(dtype)
