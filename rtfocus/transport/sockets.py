"""Sockets: ZeroMQ sockets with the options, keys and limits rtfocus relies on.

All limits are set before bind or connect: later they have no effect.

A folder of CURVE keys has the layout of ``zmq.auth`` certificates::

    server.key, server.key_secret      microscope side
    client.key, client.key_secret      processor, and viewers
    clients/*.key                      public keys that are admitted

Each side needs its own ``key_secret``, the ``.key`` of whom it connects to, and as
the one that binds ``clients/``: the microscope side for frames and control, the
processor for its preview. All three sockets admit the same list.
"""

import ipaddress
import os
import re
import shutil
import socket as socket_module
from pathlib import Path

import zmq
import zmq.auth

from rtfocus.config.sections import TransportConfig
from rtfocus.errors import ConfigError, OutputError, TransportError

SERVER, CLIENT = "server", "client"
"""Names of the microscope side's and the processor's certificate."""
_ZAP_ENDPOINT = "inproc://zeromq.zap.01"


def create_keys(folder: Path) -> Path:
    """Make a folder of fresh keys for one server and one client.

    On POSIX only its owner can look into the folder; on Windows it has the
    rights of the folder around it.

    Raises
    ------
    OutputError
        If the folder already holds keys, which are never replaced, or cannot be
        written.
    """
    if existing := sorted(folder.rglob("*.key*")):
        msg = (
            f"'{folder}' already holds CURVE keys ({existing[0].name}); choose another"
        )
        raise OutputError(msg)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        (folder / "clients").mkdir(exist_ok=True)
        for name in (SERVER, CLIENT):
            _, secret = zmq.auth.create_certificates(folder, name)
            if os.name == "posix":
                Path(secret).chmod(0o600)
        shutil.copy(folder / "client.key", folder / "clients" / "client.key")
    except OSError as error:
        msg = f"cannot write keys to '{folder}': {error.strerror}; choose another"
        raise OutputError(msg) from error
    return folder


def secure_server(socket: "zmq.Socket[bytes]", folder: Path, own: str = SERVER) -> None:
    """Encrypt a socket that will be bound; its context needs a `ClientList`."""
    public, secret = _load(folder / f"{own}.key_secret")
    socket.curve_server = True
    socket.curve_publickey = public
    socket.curve_secretkey = secret


def secure_client(
    socket: "zmq.Socket[bytes]", folder: Path, other: str = SERVER
) -> None:
    """Encrypt a socket that will be connected to whom the key `other` belongs to."""
    public, secret = _load(folder / f"{CLIENT}.key_secret")
    server, _ = _load(folder / f"{other}.key", secret=False)
    socket.curve_publickey = public
    socket.curve_secretkey = secret
    socket.curve_serverkey = server


class ClientList:
    """Admits the clients in ``clients/`` and no others (ZeroMQ RFC 27, ZAP).

    libzmq asks it over an inproc socket, which joins the poller of the thread
    that owns the other sockets of the same context.

    Parameters
    ----------
    context
        Of the sockets that are bound.
    folder
        Of the keys.
    own
        Name of a certificate whose own key is admitted too: a viewer on the
        processor's machine has no other.
    """

    def __init__(
        self,
        context: "zmq.Context[zmq.Socket[bytes]]",
        folder: Path,
        own: str | None = None,
    ) -> None:
        certificates = sorted((folder / "clients").glob("*.key"))
        if own is not None:
            certificates.append(folder / f"{own}.key_secret")
        if not certificates:
            msg = (
                f"no client keys (*.key) in '{folder / 'clients'}'; copy the "
                "processor's client.key there"
            )
            raise ConfigError(msg)
        self._keys = {_load(path, secret=False)[0] for path in certificates}
        self.refused = 0
        """Connections refused for their key."""
        self.socket = context.socket(zmq.REP)
        self.socket.linger = 0
        self.socket.bind(_ZAP_ENDPOINT)

    def answer(self) -> None:
        """Answer one question of libzmq, whether a peer may connect."""
        version, request, _domain, _address, _identity, mechanism, *credentials = (
            self.socket.recv_multipart()
        )
        known = mechanism == b"CURVE" and (
            zmq.utils.z85.encode(credentials[0]) in self._keys
        )
        self.refused += not known
        status = (b"200", b"OK") if known else (b"400", b"key is not in clients/")
        self.socket.send_multipart(
            [version, request, *status, b"rtfocus" if known else b"", b""]
        )


def _load(path: Path, *, secret: bool = True) -> tuple[bytes, bytes]:
    """Return public and secret key, Z85; without `secret` the second is empty."""
    try:
        public, private = zmq.auth.load_certificate(path)
    except (OSError, ValueError) as error:
        msg = (
            f"cannot read the CURVE key '{path}': {error}; make a folder of keys "
            f"with: rtfocus keys {path.parent}"
        )
        raise ConfigError(msg) from error
    if secret and private is None:
        msg = f"'{path}' holds no secret key; it is the wrong file"
        raise TransportError(msg)
    return public, private or b""


Socket = zmq.Socket[bytes]
Context = zmq.Context[Socket]

_CONTROL_BYTES = 64 << 20
"""A series start carries the whole MDA plan; nothing else comes near."""
_SUBSCRIPTION_BYTES = 4096
HEADER_BYTES = 4 << 20
"""What a frames message may hold beside its pixels."""
_MOST_PORT = 65535
_PROBE_S = 4.0
"""Windows takes two seconds to say that a port is closed."""
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
    return _bind(
        socket, "frames", config.frames, config.curve_keys, insecure=config.insecure
    )


def control_server(context: Context, config: TransportConfig) -> Socket:
    """Return the bound ROUTER that speaks with recorders."""
    socket = context.socket(zmq.ROUTER)
    socket.sndhwm = socket.rcvhwm = 256
    socket.maxmsgsize = _CONTROL_BYTES
    socket.linger = FINAL_WORDS_MS
    return _bind(
        socket, "control", config.control, config.curve_keys, insecure=config.insecure
    )


def frames_client(context: Context, config: TransportConfig) -> Socket:
    """Return the connected SUB that receives frames; subscribed to nothing yet."""
    socket = context.socket(zmq.SUB)
    socket.rcvhwm = _frames_in_queue(config)
    socket.maxmsgsize = max_frame_bytes(config) + HEADER_BYTES
    socket.linger = 0
    _watch_peer(socket, config)
    return socket


def control_client(context: Context) -> Socket:
    """Return the connected DEALER that speaks with the publisher."""
    socket = context.socket(zmq.DEALER)
    socket.sndhwm = socket.rcvhwm = 256
    socket.maxmsgsize = _CONTROL_BYTES
    socket.linger = FINAL_WORDS_MS
    return socket


def preview_server(
    context: Context, endpoint: str, curve_keys: Path | None, *, insecure: bool
) -> Socket:
    """Return the bound XPUB for viewers: two messages queue, newer ones drop."""
    socket = context.socket(zmq.XPUB)
    socket.sndhwm = 2
    socket.maxmsgsize = _SUBSCRIPTION_BYTES
    socket.linger = 0
    # The processor binds it, and has no key but its own.
    key = "preview.endpoint"
    return _bind(socket, key, endpoint, curve_keys, CLIENT, insecure=insecure)


def preview_client(context: Context) -> Socket:
    """Return a SUB for previews."""
    socket = context.socket(zmq.SUB)
    socket.rcvhwm = 2
    socket.linger = 0
    socket.subscribe(b"")
    return socket


def request_server(
    context: Context, endpoint: str, curve_keys: Path | None, *, insecure: bool
) -> Socket:
    """Return the bound ROUTER that takes what viewers ask for."""
    socket = context.socket(zmq.ROUTER)
    socket.sndhwm = socket.rcvhwm = 16
    socket.maxmsgsize = _SUBSCRIPTION_BYTES
    socket.linger = 0
    key = "preview.control"
    return _bind(socket, key, endpoint, curve_keys, CLIENT, insecure=insecure)


def request_client(context: Context) -> Socket:
    """Return a DEALER that asks a processor for something."""
    socket = context.socket(zmq.DEALER)
    socket.maxmsgsize = _SUBSCRIPTION_BYTES
    socket.linger = 0
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
        probe = socket_module.create_connection((host.strip("[]"), int(port)), _PROBE_S)
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
    key: str,
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
        why = zmq.strerror(error.errno or 0)
        msg = (
            f"transport.{key}: cannot bind '{endpoint}': {why}; is another rtfocus "
            "running? Stop it or choose another port"
        )
        raise TransportError(msg) from error
    except ConfigError:
        socket.close()
        raise
    return socket


def _tcp_host(endpoint: str) -> str:
    match = re.fullmatch(r"tcp://(\[[^]]+\]|[^:]+):(\d+|\*)", str(endpoint))
    if match is None:
        msg = f"endpoint '{endpoint}' is not of the form tcp://HOST:PORT"
        raise ConfigError(msg)
    if match[2].isdigit() and int(match[2]) > _MOST_PORT:
        msg = f"endpoint '{endpoint}' has a port beyond {_MOST_PORT}; choose another"
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
