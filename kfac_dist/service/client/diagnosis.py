"""Why does a server not answer? gRPC says little, so the client looks once itself."""

from __future__ import annotations

import socket
import ssl
from urllib.request import getproxies

from kfac_dist.service.access.tls import is_loopback
from kfac_dist.service.client.channel import ServerAddress

_LOOK_SECONDS = 3.0
_NOT_YET, _EXPIRED = 9, 10
# What OpenSSL calls an answer that is not TLS.
_PLAIN = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG")
_OTHER_NAME = (62, 64)  # the certificate is for another host name, or another IP address


def why_silent(server: ServerAddress) -> str | None:
    """Return a sentence about what is wrong with the connection; None if nothing is found."""
    host, _, port = server.target.rpartition(":")
    if server.tls and not is_loopback(host) and getproxies():
        return None  # gRPC connects through the proxy, and only its own words are about that
    place = (host.strip("[]"), int(port))
    try:
        with socket.create_connection(place, timeout=_LOOK_SECONDS) as connection:
            if server.tls:
                return _why_no_tls(server, connection, place[0])
            return _why_not_plain(server, connection)
    except socket.gaierror:
        return f"the host name {place[0]} is not known"
    except ConnectionRefusedError:
        return "nobody listens there; is the server running, and is it this port?"
    except TimeoutError:
        return f"no connection within {_LOOK_SECONDS:g} s; a firewall, or another address?"
    except OSError as error:
        return f"no connection ({error.strerror or error})"


def _why_no_tls(server: ServerAddress, connection: socket.socket, host: str) -> str | None:
    context = ssl.create_default_context(cafile=server.ca)
    context.set_alpn_protocols(["h2"])
    # As gRPC does. From Python 3.13 a default context refuses what gRPC accepts, such as a
    # certificate without an authority key identifier.
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    if server.ca is not None:
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    if server.client_certificate is not None and server.client_key is not None:
        context.load_cert_chain(server.client_certificate, server.client_key)
    try:
        with context.wrap_socket(connection, server_hostname=host) as secured:
            # A server refuses a client only after the handshake; gRPC's then just closes.
            is_closed = not secured.recv(1)
    except ConnectionResetError:
        is_closed = True
    except TimeoutError:
        return "it accepts a connection and then says nothing; has it stopped?"
    except ssl.SSLCertVerificationError as error:
        return _why_refused(server, error, host)
    except ssl.SSLError as error:
        if error.reason in _PLAIN:
            return f"the server does not use TLS; write {server.target} without grpcs:// and --ca"
        return f"the TLS handshake fails ({error.reason or error})"
    return _why_closed(server) if is_closed else None


def _why_refused(server: ServerAddress, error: ssl.SSLCertVerificationError, host: str) -> str:
    if error.verify_code == _EXPIRED:
        return "a certificate in the server's chain, or the authority's, has expired"
    if error.verify_code == _NOT_YET:
        return "the server's certificate is not valid yet; look at the clocks of both machines"
    if error.verify_code in _OTHER_NAME:
        return f"the server's certificate is not for {host}; use a name or address that it has"
    trusted = f"the authority in {server.ca}" if server.ca else "an authority of this system"
    return (
        f"the server's certificate is not accepted: {error.verify_message} (it must be signed by "
        f"{trusted}; --ca or KFAC_DIST_CA names another)"
    )


def _why_closed(server: ServerAddress) -> str:
    if server.client_certificate is None:
        return (
            "it closes the connection after the handshake; it may ask for a client's certificate: "
            "set KFAC_DIST_CLIENT_CERT and KFAC_DIST_CLIENT_KEY"
        )
    return (
        "it closes the connection after the handshake; it may refuse the client's certificate "
        f"{server.client_certificate}: has it expired, and did the server's --client-ca sign it?"
    )


def _why_not_plain(server: ServerAddress, connection: socket.socket) -> str | None:
    """Tell a server that speaks TLS from one that is silent for another reason."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # no secret is sent
    context.set_alpn_protocols(["h2"])
    try:
        with context.wrap_socket(connection):
            return f"the server uses TLS; write grpcs://{server.target}, with --ca if needed"
    except (ssl.SSLError, OSError):
        return None
