"""What the servers share: the address, who may ask, and what a page may load."""

import hmac
import re
import secrets
import socket
from urllib.parse import urlsplit

LOOPBACK = ("127.0.0.1", "::1", "localhost")
# Nothing but the server itself is asked for anything; pictures are fetched and shown as blobs.
POLICY = (
    "default-src 'none'; connect-src 'self'; img-src blob: data:; media-src blob:;"
    " script-src 'unsafe-inline'; style-src 'unsafe-inline'; form-action 'none';"
    " frame-ancestors 'none'"
)


def choose_token(option: str, token: str | None, host: str) -> str | None:
    """What others must know, of the option or variable called so; one is made where `host` reaches
    more than this machine. None: nothing. ValueError for one that is too easy."""
    if token is not None and not re.fullmatch(r"[A-Za-z0-9_-]{8,}", token):
        # Not told itself: what was meant as a secret would be in a log.
        raise ValueError(
            f"{option} has {len(token)} characters, wanted 8 or more letters, digits, - and _"
        )
    return secrets.token_urlsafe(16) if token is None and host not in LOOPBACK else token


def bears(authorization: str, token: str) -> bool:
    """Whether an Authorization header holds the token."""
    return hmac.compare_digest(authorization.encode(), f"Bearer {token}".encode())


def is_loopback(host: str) -> bool:
    """Whether a Host header names this machine itself. Without a token only such a page may ask: a
    page elsewhere could have its own name point here."""
    try:
        return urlsplit(f"//{host}").hostname in LOOPBACK
    except ValueError:
        return False


def bind(host: str, port: int) -> socket.socket:
    """A socket with that address, which refuses clients until it listens; port 0 is any free one.
    ValueError where it cannot be had."""
    try:
        family, *_, where = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            bound.bind(where[:2])
        except BaseException:
            bound.close()
            raise
        return bound
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"cannot serve on {host}, port {port}: {reason}") from error


def address(host: str, listening: socket.socket, token: str | None) -> str:
    """What to open in a browser. The token stands behind the #, which browsers send to no one."""
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{listening.getsockname()[1]}/{f'#{token}' if token else ''}"
