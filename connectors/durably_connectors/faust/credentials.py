"""The security settings of an installation, which are librdkafka's, as Faust wants them."""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING, Any

import faust
from durably.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Mapping

_MECHANISMS = {"PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"}
_UNDERSTOOD = {
    "security.protocol", "sasl.mechanism", "sasl.mechanisms", "sasl.username", "sasl.password",
    "ssl.ca.location", "ssl.certificate.location", "ssl.key.location", "ssl.key.password",
    "ssl.endpoint.identification.algorithm", "enable.ssl.certificate.verification",
}  # fmt: skip


def credentials(properties: Mapping[str, str]) -> Any:
    """Faust's credentials, or None for a plain connection.

    Raises:
        ConfigurationError: a setting of security that Faust's client does not have: it would be left out in silence.
    """
    unknown = sorted(
        name for name in properties if name.split(".")[0] in {"sasl", "ssl", "security"} and name not in _UNDERSTOOD
    )
    protocol = properties.get("security.protocol", "plaintext").upper()
    mechanism = properties.get("sasl.mechanism") or properties.get("sasl.mechanisms", "")
    if protocol.startswith("SASL") and mechanism not in _MECHANISMS:
        unknown.append(f"sasl.mechanism {mechanism or 'GSSAPI'}")
    if unknown:
        raise ConfigurationError(
            f"connectors connect by Faust's client too, which has no {', '.join(unknown)}: use SASL with "
            f"{', '.join(sorted(_MECHANISMS))}, or TLS with certificates in files"
        )
    if protocol == "PLAINTEXT":
        return None
    if protocol == "SSL":
        return faust.SSLCredentials(_context(properties))
    return faust.SASLCredentials(
        username=properties.get("sasl.username"),
        password=properties.get("sasl.password"),
        mechanism=mechanism,
        ssl_context=_context(properties) if protocol == "SASL_SSL" else None,
    )


def _context(properties: Mapping[str, str]) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=properties.get("ssl.ca.location"))
    if properties.get("ssl.endpoint.identification.algorithm", "https").lower() == "none":
        context.check_hostname = False
    if properties.get("enable.ssl.certificate.verification", "true").lower() == "false":
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if certificate := properties.get("ssl.certificate.location"):
        context.load_cert_chain(certificate, properties.get("ssl.key.location"), properties.get("ssl.key.password"))
    return context
