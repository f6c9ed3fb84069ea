"""Who may talk to the dashboard.

Stock Dash answers any Host header, so a page elsewhere can point its own name at 127.0.0.1 and read every run (DNS rebinding). Here
the Host must be a loopback name, unless the server asks for a token: then any name is accepted, and every request must carry the
token's cookie (or an Authorization header), which a foreign page cannot have. The token is given once in the address, kept as an
HttpOnly cookie, and taken out of the address so that it does not stay in histories or referrers.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from urllib.parse import urlencode

import flask

from headscope.errors import UnavailableError, refusal

LOOPBACK_HOSTS = ("localhost", "127.0.0.1")
TOKEN_COOKIE = "headscope-token"
MAX_REQUEST_BYTES = 1 << 20
# All code, styles, fonts and data come from this server; plotly draws through data: and blob: images.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "font-src 'self' data:; connect-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'"
)


def is_loopback(host: str) -> bool:
    """True for an address that only this machine can reach."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_host(host: str, token: str | None) -> None:
    """Refuses to listen where others can reach the server, unless they need a token."""
    if not is_loopback(host) and not token:
        raise refusal(
            UnavailableError,
            f"host {host}",
            "other machines could read every run without a password",
            "listen on 127.0.0.1, or set a secret with --token",
        )


def protect(server: flask.Flask, token: str | None) -> None:
    """Installs the host check or the token gate, a cap on request bodies, and headers that forbid any outside resource."""
    server.config["MAX_CONTENT_LENGTH"] = MAX_REQUEST_BYTES
    if token:
        server.before_request(lambda: _gate(token))
    else:
        server.config["TRUSTED_HOSTS"] = list(LOOPBACK_HOSTS)

    @server.after_request
    def headers(response: flask.Response) -> flask.Response:
        response.headers.setdefault("Content-Security-Policy", _POLICY)
        response.headers.setdefault("X-Content-Type-Options", "nosniff")
        response.headers.setdefault("Referrer-Policy", "no-referrer")
        return response


def _gate(token: str) -> flask.typing.ResponseReturnValue | None:
    digest = hashlib.sha256(b"headscope " + token.encode()).hexdigest()
    request = flask.request
    given = request.args.get("token")
    if given is not None and hmac.compare_digest(given.encode(), token.encode()):
        rest = urlencode([(key, value) for key, value in request.args.items(multi=True) if key != "token"])
        response = flask.redirect("/" + request.path.lstrip("/") + (f"?{rest}" if rest else ""))
        response.set_cookie(TOKEN_COOKIE, digest, httponly=True, samesite="Strict", secure=request.is_secure)
        return response
    bearer = request.headers.get("Authorization", "").removeprefix("Bearer ")
    if hmac.compare_digest(bearer.encode(), token.encode()) or hmac.compare_digest(
        request.cookies.get(TOKEN_COOKIE, "").encode(), digest.encode()
    ):
        return None
    return flask.Response("This dashboard asks for a token: open it once as http://HOST:PORT/?token=SECRET\n", 401, mimetype="text/plain")
