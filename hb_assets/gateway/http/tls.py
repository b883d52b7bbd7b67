"""TLS contexts from HB_GATEWAY_CERT and HB_GATEWAY_KEY, for the server and our own clients."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import NoReturn

from hb_assets.core.errors import SettingsError
from hb_assets.core.settings import Settings


def server_context(settings: Settings) -> ssl.SSLContext | None:
    """The gateway's TLS context, 1.2 or newer; None without a certificate.

    Raises:
        SettingsError: a file is missing or unreadable, isn't PEM, or the two don't fit together.
    """
    if settings.gateway_cert is None or settings.gateway_key is None:
        return None
    cert, key = settings.gateway_cert.expanduser(), settings.gateway_key.expanduser()
    _readable(cert, "HB_GATEWAY_CERT")
    _readable(key, "HB_GATEWAY_KEY")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        # A callback keeps OpenSSL from asking the terminal.
        context.load_cert_chain(cert, key, password=_encrypted)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            fault = f"HB_GATEWAY_KEY {key} isn't the key of the certificate HB_GATEWAY_CERT {cert}"
        else:
            fault = (
                f"HB_GATEWAY_CERT {cert} and HB_GATEWAY_KEY {key} can't be used "
                f"({error.reason or 'not PEM'}): name a PEM certificate chain and its PEM key"
            )
        raise SettingsError(fault) from None
    return context


def client_context(settings: Settings) -> ssl.SSLContext | bool:
    """The TLS context by which httpx verifies this machine's own gateway, at any address.

    Exactly the certificate of HB_GATEWAY_CERT is trusted, whatever names it carries: it is seldom
    made out for the loopback address. Without one the gateway speaks plain HTTP: nothing is
    verified then, and reading the certificates of this machine would take a tenth of a second.

    Raises:
        SettingsError: the certificate can't be read.
    """
    if settings.gateway_cert is None:
        return False
    cert = settings.gateway_cert.expanduser()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    try:
        context.load_verify_locations(cert)
    except OSError as error:  # an SSLError is one
        raise SettingsError(
            f"HB_GATEWAY_CERT {cert} can't be read ({error.strerror or 'not PEM'})"
        ) from None
    return context


def _readable(path: Path, variable: str) -> None:
    try:
        path.open("rb").close()
    except OSError as error:
        raise SettingsError(f"{variable} {path} can't be read ({error.strerror})") from None


def _encrypted() -> NoReturn:
    raise SettingsError("HB_GATEWAY_KEY is encrypted, and nobody is here to type its password")
