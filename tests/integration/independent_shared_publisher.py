"""Independent publisher by shared memory: wire protocol 1.1 from its specification.

As `independent_publisher`, on Linux; to a recorder that asks for it frames go as
`placed`. Only the standard library, pyzmq and msgpack.

Run: python independent_shared_publisher.py FRAMES SIDE_PX [PAIRING]
"""

import fcntl
import mmap
import os
import secrets
import sys
from array import array

from independent_publisher import IndependentPublisher

SLOTS = 5
PIXELS_AT = 4096


class IndependentSharedPublisher(IndependentPublisher):
    """Frame n lies in slot n % SLOTS until it is durable."""

    def __init__(self, frames, side, pairing=None):
        super().__init__(frames, side, pairing)
        self.frame_bytes = 2 * side**2
        size = PIXELS_AT + SLOTS * self.frame_bytes
        file = os.memfd_create("independent", os.MFD_ALLOW_SEALING)
        os.ftruncate(file, size)
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        self.memory = mmap.mmap(file, size)
        nonce = secrets.token_bytes(16)
        self.memory[:16] = nonce
        name = f"/proc/{os.getpid()}/fd/{file}"
        self.offer = {"name": name, "nonce": nonce, "size": size}
        self.asked = False
        self.filled = 0

    def handle(self, sender, message):
        if message["type"] == "resend":
            self.asked = message.get("shared", False)
        super().handle(sender, message)

    def tell(self, recorder, **message):
        if message["type"] == "welcome":
            message["shared"] = self.offer
        super().tell(recorder, **message)

    def send(self, header, *pixels):
        if not pixels or not self.asked:
            super().send(header, *pixels)
            return
        number = header["sequence"]
        slot = number % SLOTS
        counter, offset = 64 + 8 * slot, PIXELS_AT + slot * self.frame_bytes
        if number == self.filled:
            # The frame that was here is durable: it is let go, then written over.
            self.memory[counter : counter + 8] = array("Q", [number + 1]).tobytes()
            self.memory[offset : offset + self.frame_bytes] = pixels[0]
            self.filled += 1
        placed = {"type": "placed", "frame": {**self.series, **header}}
        placed |= {"offset": offset, "counter": counter, "generation": number + 1}
        super().send(placed)

    def flow(self):
        # No frame is written over before it is durable.
        credit = self.credit
        self.credit = min(credit, self.durable + SLOTS)
        super().flow()
        self.credit = credit


if __name__ == "__main__":
    publisher = IndependentSharedPublisher(
        int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
    )
    publisher.run()
