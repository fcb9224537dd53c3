"""The chat page: its files, which are read once, and the security headers of its answers."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources

from starlette.responses import Response

TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".ico": "image/x-icon",
    ".webmanifest": "application/manifest+json",
}
# Model output is untrusted text: whatever slipped through could load nothing, run nothing and
# send nothing to anyone but this server.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "font-src 'self'; connect-src 'self'; manifest-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; "
    "trusted-types 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Frame-Options": "DENY",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Cache-Control": "no-cache",
}


def files() -> Mapping[str, Response]:
    """Address -> file of the page's folder; `/` is index.html."""
    folder = resources.files("bevatron.generate.server") / "page"
    if not folder.is_dir():
        return {}
    found = {}
    for file in sorted(folder.iterdir(), key=lambda f: f.name):
        kind = TYPES.get(file.name[file.name.rfind(".") :])
        if kind is not None:
            address = "/" if file.name == "index.html" else f"/{file.name}"
            found[address] = Response(file.read_bytes(), media_type=kind, headers=HEADERS)
    return found
