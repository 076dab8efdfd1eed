"""Curve: encryption keys and the list of clients that may connect.

A folder of keys in the layout of ``zmq.auth`` certificates::

    server.key, server.key_secret      microscope side
    client.key, client.key_secret      processor and viewers
    clients/*.key                      public keys that the microscope side admits

Copy the folder to both machines; each needs only its own ``key_secret``.
"""

import os
import shutil
from pathlib import Path

import zmq
import zmq.auth

from rtfocus.errors import ConfigError, TransportError

_ZAP_ENDPOINT = "inproc://zeromq.zap.01"


def create_keys(folder: Path) -> Path:
    """Make a folder of fresh keys for one server and one client.

    Raises
    ------
    ConfigError
        If the folder already holds keys: they are never replaced.
    """
    if (folder / "server.key_secret").exists():
        msg = f"'{folder}' already holds CURVE keys; choose another folder"
        raise ConfigError(msg)
    (folder / "clients").mkdir(parents=True, exist_ok=True)
    for name in ("server", "client"):
        _, secret = zmq.auth.create_certificates(folder, name)
        if os.name == "posix":
            Path(secret).chmod(0o600)
    shutil.copy(folder / "client.key", folder / "clients" / "client.key")
    return folder


def secure_server(socket: "zmq.Socket[bytes]", folder: Path) -> None:
    """Encrypt a socket that will be bound; its context needs a `ClientList`."""
    public, secret = _load(folder / "server.key_secret")
    socket.curve_server = True
    socket.curve_publickey = public
    socket.curve_secretkey = secret


def secure_client(socket: "zmq.Socket[bytes]", folder: Path) -> None:
    """Encrypt a socket that will be connected."""
    public, secret = _load(folder / "client.key_secret")
    server, _ = _load(folder / "server.key", secret=False)
    socket.curve_publickey = public
    socket.curve_secretkey = secret
    socket.curve_serverkey = server


class ClientList:
    """Admits the clients in ``clients/`` and nobody else (ZeroMQ RFC 27, ZAP).

    libzmq asks it over an inproc socket, which joins the poller of the thread
    that owns the other sockets of the same context.
    """

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", folder: Path) -> None:
        certificates = sorted((folder / "clients").glob("*.key"))
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
            "with rtfocus.transport.curve.create_keys and copy it to both machines"
        )
        raise ConfigError(msg) from error
    if secret and private is None:
        msg = f"'{path}' holds no secret key; it is the wrong file"
        raise TransportError(msg)
    return public, private or b""
