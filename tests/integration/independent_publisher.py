"""Independent publisher: wire protocol 1 from its specification alone.

Only pyzmq and msgpack. Prints its two endpoints, sends one series of frames whose
pixels all hold their sequence, and leaves when the recorder has all of it.

Run: python independent_publisher.py FRAMES SIDE_PX
"""

import sys
import time
from array import array

import msgpack
import zmq

FRAMES, SIDE = int(sys.argv[1]), int(sys.argv[2])
HEARTBEAT_S = 0.05
SERIES = {"version": 1, "series_uid": f"independent-{time.time_ns()}"}
START = {
    **SERIES,
    **{"type": "start", "name": "independent", "started_ns": time.time_ns()},
    **{"shape": [SIDE, SIDE], "dtype": "<u2", "sizes": {"t": FRAMES}},
    **{"channels": [{"name": "default"}], "positions": [{"name": "here"}]},
    "pixel_size_um": 0.5,
}

context = zmq.Context()
stream, control = context.socket(zmq.XPUB), context.socket(zmq.ROUTER)
stream.setsockopt(zmq.XPUB_NODROP, 1)
stream.setsockopt(zmq.XPUB_MANUAL, 1)
stream.linger = control.linger = 500
for socket in (stream, control):
    port = socket.bind_to_random_port("tcp://127.0.0.1")
    sys.stdout.write(f"tcp://127.0.0.1:{port}\n")
sys.stdout.flush()

recorder = uid = topic = None
subscribed = begun = rewind_due = ended = False
sent = credit = durable = attempt = 0
next_beat = time.monotonic()


def send(header, *pixels):
    stream.send_multipart([topic, msgpack.packb({**SERIES, **header}), *pixels])


def tell(to, **message):
    control.send_multipart([to, msgpack.packb(message)])


while not (ended and durable == FRAMES):
    zmq.select([stream, control], [], [], HEARTBEAT_S)
    while stream.poll(0):
        message = stream.recv()
        if topic is not None and message == b"\x01" + topic:
            stream.setsockopt(zmq.SUBSCRIBE, topic)
            subscribed = True
    while control.poll(0):
        sender, data = control.recv_multipart()
        message = msgpack.unpackb(data)
        kind = message["type"]
        if kind == "hello":
            if recorder is None:
                recorder, uid = sender, message["uid"]
                topic = f"{SERIES['series_uid']}/{uid}/".encode()
            if message["uid"] == uid:
                text = topic.decode()
                tell(
                    sender, type="welcome", version=1, uid=uid, topic=text, start=START
                )
            else:
                reason = "there is a recorder already"
                them = message["uid"]
                tell(sender, type="refused", uid=them, code="occupied", reason=reason)
        elif message.get("uid") != uid:
            continue
        elif kind == "progress":
            credit, durable = message["credit_upto"], message["durable_upto"]
        elif kind == "resend":
            sent, attempt = message["sequence"], message["attempt"]
            begun = rewind_due = True
        elif kind == "ended":
            ended = True
        elif kind == "leave":
            recorder = uid = topic = None
            subscribed = begun = False
    flowing = subscribed and begun
    if flowing and rewind_due:
        send({"type": "rewind", "sequence": sent, "attempt": attempt})
        rewind_due = False
    while flowing and sent < min(credit, FRAMES):
        frame = {"type": "frame", "sequence": sent, "shape": [SIDE, SIDE]}
        frame |= {"dtype": "<u2", "captured_ns": time.time_ns(), "exposure_ms": 1.0}
        pixels = array("H", [sent]) * SIDE**2
        send({**frame, "index": {"t": sent}}, pixels.tobytes())
        sent += 1
    if recorder is not None and time.monotonic() >= next_beat:
        next_beat = time.monotonic() + HEARTBEAT_S
        ping = {"type": "ping", "sent_upto": sent, "attempt": attempt}
        tell(recorder, **SERIES, **ping)
        if flowing:
            send(ping)
            if sent == FRAMES and not ended:
                send({"type": "end", "frames_sent": FRAMES, "reason": "completed"})
context.destroy()
