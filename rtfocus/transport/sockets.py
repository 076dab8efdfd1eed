"""Sockets: ZeroMQ sockets with the options rtfocus relies on.

All limits are set before bind or connect: later they have no effect.
"""

import ipaddress
import re
import socket as socket_module
from pathlib import Path

import zmq

from rtfocus.config.processor import TransportConfig
from rtfocus.errors import ConfigError, TransportError
from rtfocus.transport.curve import CLIENT, SERVER, secure_client, secure_server

Socket = zmq.Socket[bytes]
Context = zmq.Context[Socket]

_CONTROL_BYTES = 64 << 20
"""A series start carries the whole MDA plan; nothing else comes near."""
_SUBSCRIPTION_BYTES = 4096
HEADER_BYTES = 4 << 20
"""What a frames message may hold beside its pixels."""
FINAL_WORDS_MS = 500
"""How long closing waits for the last control messages to leave."""


def max_frame_bytes(config: TransportConfig) -> int:
    """Return the most pixel bytes of one frame."""
    return int(config.max_frame_mb * 1e6)


def frames_server(context: Context, config: TransportConfig) -> Socket:
    """Return the bound XPUB that sends frames to the one welcomed recorder."""
    socket = context.socket(zmq.XPUB)
    socket.setsockopt(zmq.XPUB_NODROP, 1)
    # Subscriptions take effect only where the publisher says so: an uninvited
    # subscriber gets no frame and therefore cannot hold up the recorder.
    socket.setsockopt(zmq.XPUB_MANUAL, 1)
    socket.sndhwm = _frames_in_queue(config)
    socket.maxmsgsize = _SUBSCRIPTION_BYTES
    socket.linger = 0
    _watch_peer(socket, config)
    return _bind(socket, config.frames, config.curve_keys, insecure=config.insecure)


def control_server(context: Context, config: TransportConfig) -> Socket:
    """Return the bound ROUTER that speaks with recorders."""
    socket = context.socket(zmq.ROUTER)
    socket.sndhwm = socket.rcvhwm = 256
    socket.maxmsgsize = _CONTROL_BYTES
    socket.linger = FINAL_WORDS_MS
    return _bind(socket, config.control, config.curve_keys, insecure=config.insecure)


def frames_client(context: Context, config: TransportConfig) -> Socket:
    """Return the connected SUB that receives frames; subscribed to nothing yet."""
    socket = context.socket(zmq.SUB)
    socket.rcvhwm = _frames_in_queue(config)
    socket.maxmsgsize = max_frame_bytes(config) + HEADER_BYTES
    socket.linger = 0
    _watch_peer(socket, config)
    return socket


def control_client(context: Context, config: TransportConfig) -> Socket:
    """Return the connected DEALER that speaks with the publisher."""
    socket = context.socket(zmq.DEALER)
    socket.sndhwm = socket.rcvhwm = 256
    socket.maxmsgsize = _CONTROL_BYTES
    socket.linger = FINAL_WORDS_MS
    return socket


def preview_server(
    context: Context, endpoint: str, curve_keys: Path | None, *, insecure: bool
) -> Socket:
    """Return the bound PUB for viewers: two frames queue, older ones drop."""
    socket = context.socket(zmq.PUB)
    socket.sndhwm = 2
    socket.linger = 0
    # The processor binds it, and has no key but its own.
    return _bind(socket, endpoint, curve_keys, CLIENT, insecure=insecure)


def preview_client(context: Context) -> Socket:
    """Return a SUB for previews."""
    socket = context.socket(zmq.SUB)
    socket.rcvhwm = 2
    socket.linger = 0
    socket.subscribe(b"")
    return socket


def connect(
    socket: Socket, endpoint: str, curve_keys: Path | None, other: str = SERVER
) -> Socket:
    """Connect to a publisher, which need not be there yet.

    Parameters
    ----------
    socket
        Not connected yet.
    endpoint
        ``tcp://HOST:PORT``.
    curve_keys
        Folder of keys; None: clear text.
    other
        Name of the certificate that the publisher has.

    Raises
    ------
    ConfigError
        If the endpoint or the keys cannot be used.
    """
    _tcp_host(endpoint)
    # A peer that is back is found again within a tenth of a second to a second.
    socket.reconnect_ivl, socket.reconnect_ivl_max = 50, 1000
    if curve_keys is not None:
        secure_client(socket, curve_keys, other)
    try:
        socket.connect(endpoint)
    except zmq.ZMQError as error:
        msg = f"cannot connect to '{endpoint}': {error}; form: tcp://HOST:PORT"
        raise ConfigError(msg) from error
    return socket


def is_local(endpoint: str) -> bool:
    """Tell whether an endpoint reaches no further than this machine."""
    return _is_loopback(_tcp_host(endpoint))


def nobody_listens(endpoint: str) -> bool:
    """Tell whether an endpoint refuses connections, as when its process is gone.

    False where it does not answer at all: a network that is cut, a firewall, or
    a process that is only frozen, whose port goes on to accept.
    """
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    try:
        probe = socket_module.create_connection((host.strip("[]"), int(port)), 2.0)
    except ConnectionRefusedError:
        return True
    except (OSError, ValueError):
        return False
    probe.close()
    return False


def bound_to(socket: Socket) -> str:
    """Return the endpoint a socket is bound to, with the port that was chosen."""
    endpoint = socket.getsockopt(zmq.LAST_ENDPOINT)
    assert isinstance(endpoint, bytes)
    return endpoint.decode().rstrip("\0")


def _frames_in_queue(config: TransportConfig) -> int:
    # Above what credit allows, so that ZeroMQ's limit is never what holds frames
    # back: at the limit its own heartbeats stop being read.
    return 4 * config.slots + 64


def _watch_peer(socket: Socket, config: TransportConfig) -> None:
    """Make libzmq close a connection whose other end does not live."""
    interval_ms = max(int(config.heartbeat_s * 1000), 50)
    socket.heartbeat_ivl = interval_ms
    socket.heartbeat_timeout = max(6 * interval_ms, 2000)


def _bind(
    socket: Socket,
    endpoint: str,
    curve_keys: Path | None,
    own: str = SERVER,
    *,
    insecure: bool,
) -> Socket:
    try:
        if curve_keys is not None:
            secure_server(socket, curve_keys, own)
        elif not insecure and not _is_loopback(_tcp_host(endpoint)):
            msg = (
                f"'{endpoint}' is reachable from other machines and not encrypted; "
                "make keys with `rtfocus keys FOLDER` and set transport.curve_keys "
                "to it, or set transport.insecure: true on a network you trust"
            )
            raise ConfigError(msg)
        _tcp_host(endpoint)
        socket.bind(endpoint)
    except zmq.ZMQError as error:
        socket.close()
        msg = (
            f"cannot bind '{endpoint}': {error}; is another rtfocus running? "
            "Stop it or choose another port"
        )
        raise TransportError(msg) from error
    except ConfigError:
        socket.close()
        raise
    return socket


def _tcp_host(endpoint: str) -> str:
    match = re.fullmatch(r"tcp://(\[[^]]+\]|[^:]+):(\d+|\*)", endpoint)
    if match is None:
        msg = f"endpoint '{endpoint}' is not of the form tcp://HOST:PORT"
        raise ConfigError(msg)
    return match[1].strip("[]")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        # A host name, an interface name or *: all reach beyond this machine.
        return False
