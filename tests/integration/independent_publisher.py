"""Independent publisher: wire protocol 1 from its specification alone.

Only pyzmq and msgpack. Prints its two endpoints, sends one series of frames whose
pixels all hold their sequence, and leaves when the recorder has all of it. Then it
prints who recorded, and where. With PAIRING only a recorder that says it is welcome.

Run: python independent_publisher.py FRAMES SIDE_PX [PAIRING]
"""

import sys
import time
from array import array

import msgpack
import zmq

HEARTBEAT_S = 0.05


class IndependentPublisher:
    """One series; any frame can be made again, so none has to be kept."""

    def __init__(self, frames, side, pairing=None):
        self.frames, self.side, self.pairing = frames, side, pairing
        self.recorded_by = {}
        self.series = {"version": 1, "series_uid": f"independent-{time.time_ns()}"}
        self.context = zmq.Context()
        self.stream = self.context.socket(zmq.XPUB)
        self.stream.setsockopt(zmq.XPUB_NODROP, 1)
        self.stream.setsockopt(zmq.XPUB_MANUAL, 1)
        self.control = self.context.socket(zmq.ROUTER)
        self.recorder = self.uid = self.topic = None
        self.subscribed = self.begun = self.rewind_due = self.ended = False
        self.sent = self.credit = self.durable = self.attempt = 0
        self.next_beat = 0.0

    def run(self):
        for socket in (self.stream, self.control):
            socket.linger = 500
            port = socket.bind_to_random_port("tcp://127.0.0.1")
            sys.stdout.write(f"tcp://127.0.0.1:{port}\n")
        sys.stdout.flush()
        while not (self.ended and self.durable == self.frames):
            zmq.select([self.stream, self.control], [], [], HEARTBEAT_S)
            while self.stream.poll(0):
                message = self.stream.recv()
                if self.topic is not None and message == b"\x01" + self.topic:
                    self.stream.setsockopt(zmq.SUBSCRIBE, self.topic)
                    self.subscribed = True
            while self.control.poll(0):
                sender, data = self.control.recv_multipart()
                self.handle(sender, msgpack.unpackb(data))
            if self.subscribed and self.begun:
                self.flow()
            if self.recorder is not None and time.monotonic() >= self.next_beat:
                self.beat()
        self.context.destroy()
        sys.stdout.write("{pid} {host} {folder}\n".format(**self.recorded_by))

    def handle(self, sender, message):
        kind = message["type"]
        if kind == "hello":
            self.greet(sender, message["uid"], message.get("pairing"))
            if message["uid"] == self.uid:
                self.recorded_by |= {key: message.get(key) for key in ("pid", "host")}
        elif message.get("uid") != self.uid:
            return
        elif kind == "progress":
            self.credit, self.durable = message["credit_upto"], message["durable_upto"]
        elif kind == "resend":
            self.sent, self.attempt = message["sequence"], message["attempt"]
            self.begun = self.rewind_due = True
            self.recorded_by["folder"] = message.get("folder")
        elif kind == "ended":
            self.ended = True
        elif kind == "leave":
            self.recorder = self.uid = self.topic = None
            self.subscribed = self.begun = False

    def greet(self, sender, uid, pairing):
        if self.pairing not in (None, pairing):
            reason = "another pairing is expected"
            self.tell(sender, type="refused", uid=uid, code="pairing", reason=reason)
            return
        if self.recorder is None:
            self.recorder, self.uid = sender, uid
            self.topic = f"{self.series['series_uid']}/{uid}/".encode()
        if uid != self.uid:
            reason = "there is a recorder already"
            self.tell(sender, type="refused", uid=uid, code="occupied", reason=reason)
            return
        start = {"type": "start", "name": "independent", "started_ns": time.time_ns()}
        start |= {"shape": [self.side, self.side], "dtype": "<u2", "pixel_size_um": 0.5}
        start |= {"sizes": {"t": self.frames}, "channels": [{"name": "default"}]}
        start |= {"positions": [{"name": "here"}], **self.series}
        welcome = {"type": "welcome", "version": 1, "uid": uid, "start": start}
        self.tell(sender, **welcome, topic=self.topic.decode())

    def flow(self):
        if self.rewind_due:
            rewind = {"type": "rewind", "sequence": self.sent, "attempt": self.attempt}
            self.send(rewind)
            self.rewind_due = False
        while self.sent < min(self.credit, self.frames):
            frame = {"type": "frame", "sequence": self.sent, "dtype": "<u2"}
            frame |= {"shape": [self.side, self.side], "index": {"t": self.sent}}
            frame |= {"captured_ns": time.time_ns(), "exposure_ms": 1.0}
            self.send(frame, (array("H", [self.sent]) * self.side**2).tobytes())
            self.sent += 1

    def beat(self):
        self.next_beat = time.monotonic() + HEARTBEAT_S
        ping = {"type": "ping", "sent_upto": self.sent, "attempt": self.attempt}
        self.tell(self.recorder, **self.series, **ping)
        if self.subscribed and self.begun:
            self.send(ping)
            if self.sent == self.frames and not self.ended:
                end = {"frames_sent": self.frames, "reason": "completed"}
                self.send({"type": "end", **end})

    def send(self, header, *pixels):
        data = msgpack.packb({**self.series, **header})
        self.stream.send_multipart([self.topic, data, *pixels])

    def tell(self, recorder, **message):
        self.control.send_multipart([recorder, msgpack.packb(message)])


if __name__ == "__main__":
    IndependentPublisher(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]).run()
