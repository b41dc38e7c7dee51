"""What TCP over Ethernet adds to a message: headers of its segments, and acknowledgements of what comes back."""

from __future__ import annotations

import math
from dataclasses import dataclass

HEADER_BYTES = 66  # Ethernet 14, IPv4 20, TCP 20 with its time stamps 12; also the whole of an acknowledgement
MOST_IN_A_SEGMENT = 1448  # bytes of a message in an Ethernet frame of 1,500 with these headers
SEGMENTS_PER_ACKNOWLEDGEMENT = 2  # RFC 1122, 4.2.3.2: at least every second one


@dataclass(frozen=True)
class Framing:
    """How a link counts a message, where as much comes back as goes there.

    Attributes:
        segment: bytes of a message in a segment as the link sees it: a device that cuts segments itself (TSO, GSO) is
            handed up to 64 KiB at once.

    >>> Framing().on_the_wire(1448), Framing().on_the_wire(0)
    (1580, 0)
    """

    segment: int = MOST_IN_A_SEGMENT

    def on_the_wire(self, size: int | float) -> int | float:
        """Return what a link sends for a message of so many bytes, and for one of as many that it receives."""
        segments = math.ceil(size / self.segment)
        acknowledged = math.ceil(segments / SEGMENTS_PER_ACKNOWLEDGEMENT)
        return size + HEADER_BYTES * (segments + acknowledged)
