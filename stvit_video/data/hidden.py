"""Whether a packet shows a frame, by its header: VP8 has alternate references, MPEG-4 vops not coded."""

import re
from collections.abc import Callable

import av

VOP = b"\0\0\1\xb6"  # a picture of MPEG-4 follows
VOL = re.compile(b"\0\0\1[\x20-\x2f]")  # what holds for the pictures after it
B_VOP = 2


class Bits:
    """Numbers from bytes, the highest bit first. Raises ValueError beyond the end."""

    def __init__(self, data: bytes):
        self.value, self.left = int.from_bytes(data), 8 * len(data)

    def take(self, count: int) -> int:
        self.left -= count
        if self.left < 0:
            raise ValueError("no bits left")
        return self.value >> self.left & ((1 << count) - 1)


class Mpeg4:
    """ISO 14496-2, 6.2.3 and 6.2.5. Called with the packets of one stream, in their order.

    headers: of the stream, where its container has them apart.
    """

    def __init__(self, headers: bytes):
        self.time_bits = 0  # of a time within a second; 0: not known
        self._read_layer(headers)

    def __call__(self, data: bytes) -> bool | None:
        """Whether the picture is coded. None: none or several, a B-vop (out of order), an odd header."""
        headers, *pictures = data.split(VOP)
        self._read_layer(headers)
        if len(pictures) != 1 or not self.time_bits:
            return None
        bits = Bits(pictures[0][:32])
        try:
            kind = bits.take(2)
            while bits.take(1):  # a second
                pass
            before, _, after, coded = (bits.take(count) for count in (1, self.time_bits, 1, 1))
        except ValueError:
            return None
        return bool(coded) if kind != B_VOP and before and after else None

    def _read_layer(self, headers: bytes) -> None:
        if (start := VOL.search(headers)) is None:
            return
        bits, self.time_bits = Bits(headers[start.end() :][:32]), 0
        try:
            bits.take(9)  # random access, type
            bits.take(7 if bits.take(1) else 0)  # version, priority
            bits.take(16 if bits.take(4) == 15 else 0)  # aspect of the pixels
            if bits.take(1):  # chroma, low delay, buffer
                bits.take(3)
                bits.take(79 if bits.take(1) else 0)
            rectangle, marker, rate = bits.take(2) == 0, bits.take(1), bits.take(16)
        except ValueError:
            return
        if rectangle and marker and rate:
            self.time_bits = max((rate - 1).bit_length(), 1)


def shows_frame(codec: str, headers: bytes | None) -> Callable[[av.Packet], bool | None]:
    """-> a function of each packet: whether it shows a frame; None: only the decoder can tell."""
    if codec == "mpeg4":
        mpeg4 = Mpeg4(headers or b"")
        return lambda packet: mpeg4(bytes(packet))
    if codec == "vp8":  # RFC 6386, 9.1
        return lambda packet: bool(memoryview(packet)[0] & 16) if packet.size else None
    return lambda packet: True
