"""The port: opened first, so that one in use is told before a model is loaded, and closed by Ctrl-C.

with open_port("127.0.0.1", 8000) as port:
    run(build_app(session, name="chat"), port)
"""

import errno
import ipaddress
import signal
import socket
from contextlib import suppress

import uvicorn

from firstwords.errors import BadFlag, CannotCreate
from firstwords.server.guard import LOOPBACK, Guard


def is_loopback(host: str) -> bool:
    """Tell whether only this machine reaches the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host in LOOPBACK


def check_key(key: str | None, host: str) -> None:
    """Refuse a key that no header can carry, and an address for other machines without one.

    Raises:
        BadFlag: naming `--api_key` or `--host`, never the key.
    """
    if key is not None and not (key.isascii() and key.isprintable() and key.strip() == key != ""):
        raise BadFlag("--api_key: must be printable ASCII without spaces around it; choose another")
    if key is None and not is_loopback(host):
        raise BadFlag(
            f"--host {host}: other machines could ask without a key; set FIRSTWORDS_API_KEY or --api_key"
        )


def open_port(host: str, port: int) -> socket.socket:
    """Return a bound socket.

    Args:
        port: 0 takes a free one.

    Raises:
        BadFlag: for an address that this machine does not have, or a port beyond 65535.
        CannotCreate: when the port is in use, or not for this user.
    """
    if not 0 <= port <= 65535:
        raise BadFlag(f"--port: is {port}; give a number from 0 (any that is free) to 65535")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError):
        raise BadFlag(f"--host {host}: is no address; give one of this machine, or 127.0.0.1") from None
    opened = socket.socket(family, kind)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        opened.bind(address)
        opened.listen(1024)
    except OSError as error:
        opened.close()
        raise _refuse_port(host, port, error) from None
    return opened


def _refuse_port(host: str, port: int, error: OSError) -> Exception:
    if error.errno == errno.EADDRNOTAVAIL:
        return BadFlag(f"--host {host}: is no address of this machine; give one that is, or 127.0.0.1")
    return CannotCreate(
        f"--port {port}: cannot be opened on {host} ({error.strerror}); name another, 0 takes a free one"
    )


def name_address(opened: socket.socket) -> str:
    """Return where a browser finds the server, as http://127.0.0.1:8000."""
    host, port = opened.getsockname()[:2]
    if ipaddress.ip_address(host).is_unspecified:
        host = "127.0.0.1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Server(uvicorn.Server):
    """Ends the replies that are under way when it is told to end."""

    def __init__(self, config: uvicorn.Config, batcher):
        super().__init__(config)
        self._batcher = batcher

    async def shutdown(self, sockets=None) -> None:
        self._batcher.close()
        await super().shutdown(sockets)


def run(app: Guard, opened: socket.socket) -> None:
    """Serve until Ctrl-C or SIGTERM; either is the way to end a server, and no error."""
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=2, server_header=False
    )
    server = _Server(config, app.app.state.api.batcher)
    # uvicorn sends itself the signal once more when all is closed.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with suppress(KeyboardInterrupt):
            server.run(sockets=[opened])
    finally:
        signal.signal(signal.SIGTERM, before)
