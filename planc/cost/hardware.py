"""What the forms need to know of a GPU: peaks, memory bandwidth, SMs."""

from __future__ import annotations

from dataclasses import dataclass

from planc.spec.fields import DTYPE_BYTES

DEFAULT_SMS = 132  #: of H100 and H200 SXM; no price without a fit reads it


@dataclass(frozen=True, slots=True)
class Hardware:
    """Datasheet numbers of one GPU: what efficiencies are shares of."""

    peaks: dict[str, float]  #: dense FLOPS by dtype
    memory_bandwidth: float  #: bytes per second
    sms: int = DEFAULT_SMS  #: streaming multiprocessors

    def peak(self, dtype: str) -> float:
        """Dense peak FLOPS of a dtype; 16-bit types share one rate."""
        return self.peaks[dtype]

    @staticmethod
    def width(dtype: str) -> int:
        """Bytes of one element."""
        return DTYPE_BYTES[dtype]
