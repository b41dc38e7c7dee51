"""Wire: how rows are written while they travel."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max


class Wire(ABC):
    """A way to write rows for an exchange; gradients travel the same way."""

    @abstractmethod
    def write(self, rows: Tensor) -> Tensor:
        """Turn rows [R, D] into what is sent, [R, ...]."""

    @abstractmethod
    def read(self, sent: Tensor, dtype: torch.dtype) -> Tensor:
        """Turn what arrived, in any order of rows, into rows [R, D] of a dtype."""


@dataclass(frozen=True)
class AsIs(Wire):
    """Rows in their own dtype: under autocast, in that of autocast. Changes no number."""

    def write(self, rows: Tensor) -> Tensor:
        return rows

    def read(self, sent: Tensor, dtype: torch.dtype) -> Tensor:
        return sent


AS_IS = AsIs()


@dataclass(frozen=True)
class Float8(Wire):
    """Eight bits a number and one float32 scale a row: a quarter of float32's bytes, half of bfloat16's.

    The largest number of a row is written exactly up to the scale's rounding; every other number x with an error of
    at most |x| / 16 (e4m3 holds three bits of mantissa), or of the row's largest over 2^18 where that is more.
    A NaN or inf makes its whole row NaN.
    """

    def write(self, rows: Tensor) -> Tensor:
        top = rows.abs().amax(dim=1, keepdim=True).to(torch.float32)
        scale = torch.where(top == 0, 1, top / LARGEST)
        small = (rows.to(torch.float32) / scale).clamp(-LARGEST, LARGEST).to(FLOAT8)
        return torch.cat([small.view(torch.uint8), scale.view(torch.uint8)], dim=1)

    def read(self, sent: Tensor, dtype: torch.dtype) -> Tensor:
        small = sent[:, :-4].contiguous().view(FLOAT8)
        # A copy, always: the slice of one row counts as contiguous, and may begin where no float32 may.
        scale = sent[:, -4:].clone(memory_format=torch.contiguous_format).view(torch.float32)
        return (small.to(torch.float32) * scale).to(dtype)
