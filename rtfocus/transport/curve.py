"""Curve: encryption keys and the list of clients that may connect.

A folder of keys in the layout of ``zmq.auth`` certificates::

    server.key, server.key_secret      microscope side
    client.key, client.key_secret      processor, and viewers
    clients/*.key                      public keys that are admitted

Each side needs its own ``key_secret``, the ``.key`` of whom it connects to, and as
the one that binds ``clients/``: the microscope side for frames and control, the
processor for its preview. All three sockets admit the same list.
"""

import os
import shutil
from pathlib import Path

import zmq
import zmq.auth

from rtfocus.errors import ConfigError, TransportError

SERVER, CLIENT = "server", "client"
"""Names of the microscope side's and the processor's certificate."""
_ZAP_ENDPOINT = "inproc://zeromq.zap.01"


def create_keys(folder: Path) -> Path:
    """Make a folder of fresh keys for one server and one client.

    On POSIX nobody but its owner can look into the folder; on Windows it has the
    rights of the folder around it.

    Raises
    ------
    ConfigError
        If the folder already holds keys, which are never replaced, or cannot be
        written.
    """
    if found := sorted(folder.rglob("*.key*")):
        msg = f"'{folder}' already holds CURVE keys ({found[0].name}); choose another"
        raise ConfigError(msg)
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
        raise ConfigError(msg) from error
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
    """Admits the clients in ``clients/`` and nobody else (ZeroMQ RFC 27, ZAP).

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
