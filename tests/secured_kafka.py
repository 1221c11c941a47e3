"""A Kafka broker that demands to know who asks, and lets nobody do what no ACL grants.

    CLEAR    SASL_PLAINTEXT  PLAIN, SCRAM-SHA-256, SCRAM-SHA-512
    TLS      SASL_SSL        the same, and OAUTHBEARER, whose tokens the broker does not verify
    MUTUAL   SSL             the client's certificate is its user: CN=NAME is User:NAME

The certificates, of an authority that is made here, last for a day. ``admin`` is the super user.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
from typing import TYPE_CHECKING, Any, NamedTuple

import kafka_cluster
from confluent_kafka.admin import (
    AclBindingFilter,
    AclOperation,
    AclPermissionType,
    AdminClient,
    ResourcePatternType,
    ResourceType,
    ScramCredentialInfo,
    ScramMechanism,
    UserScramCredentialUpsertion,
)
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from durably.broker.kafka import KafkaBroker

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from durably.broker.acl import Acl

ADMIN = {
    "security.protocol": "SASL_PLAINTEXT",
    "sasl.mechanism": "PLAIN",
    "sasl.username": "admin",
    "sasl.password": "admin-secret",
}
_SECURITY = "org.apache.kafka.common.security"
_PLAIN = f'{_SECURITY}.plain.PlainLoginModule required user_admin="admin-secret" user_plain="plain-secret";'
_SCRAM = f"{_SECURITY}.scram.ScramLoginModule required;"
_OAUTH = f'{_SECURITY}.oauthbearer.OAuthBearerLoginModule required unsecuredLoginStringClaim_sub="broker";'
_MECHANISMS = {"PLAIN": _PLAIN, "SCRAM-SHA-256": _SCRAM, "SCRAM-SHA-512": _SCRAM, "OAUTHBEARER": _OAUTH}


class Pem(NamedTuple):
    """A certificate and its key."""

    certificate: str
    key: str


class Authority:
    """Signs certificates for `NAME`, and for 127.0.0.1 where it is a server."""

    def __init__(self, name: str) -> None:
        self._name, self._key = _subject(name), ec.generate_private_key(ec.SECP256R1())
        self.certificate = _pem(self._made(self._name, self._key.public_key(), ca=True))

    def issue(self, name: str) -> Pem:
        """A certificate whose subject is CN=name."""
        key = ec.generate_private_key(ec.SECP256R1())
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
        return Pem(_pem(self._made(_subject(name), key.public_key(), ca=False)), pem)

    def _made(self, subject: x509.Name, key: ec.EllipticCurvePublicKey, *, ca: bool) -> x509.Certificate:
        now = dt.datetime.now(dt.UTC)
        builder = (
            x509.CertificateBuilder(self._name, subject, key, x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(hours=1))
            .not_valid_after(now + dt.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        )
        if not ca:
            host = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
            builder = builder.add_extension(x509.SubjectAlternativeName([host]), critical=False)
        return builder.sign(self._key, hashes.SHA256())


def _subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(Encoding.PEM).decode()


class SecuredKafka:
    """The broker, its authority, and what its users connect with.

    Attributes:
        admin: a connection of the super user.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.authority = Authority("authority")
        self.cluster = kafka_cluster.start(self._listeners())
        self._admin = AdminClient({"bootstrap.servers": self.cluster.bootstrap, "log_level": 0, **ADMIN})
        self.admin = KafkaBroker(self.cluster.bootstrap, ADMIN)
        self._ca = self.file("ca.pem", self.authority.certificate)

    def url(self, listener: str = "CLEAR") -> str:
        """Where one of the listeners is."""
        return f"kafka://{self.cluster.addresses[listener]}"

    def file(self, name: str, text: str) -> str:
        """The path of a new file."""
        path = self._folder / name
        path.write_text(text)
        return str(path)

    def user(self, name: str, mechanism: str = "SCRAM-SHA-256") -> dict[str, str]:
        """A new user of CLEAR, as properties of librdkafka. The password is NAME-secret."""
        info = ScramCredentialInfo(ScramMechanism[mechanism.replace("-", "_")], 4096)
        change = UserScramCredentialUpsertion(name, info, f"{name}-secret".encode())
        for future in self._admin.alter_user_scram_credentials([change]).values():
            future.result()
        return {
            "security.protocol": "SASL_PLAINTEXT",
            "sasl.mechanism": mechanism,
            "sasl.username": name,
            "sasl.password": f"{name}-secret",
        }

    def over_tls(self, user: dict[str, str]) -> dict[str, str]:
        """The same user on TLS."""
        return user | {"security.protocol": "SASL_SSL", "ssl.ca.location": self._ca}

    def with_certificate(self, name: str, authority: Authority | None = None) -> dict[str, str]:
        """A user of MUTUAL."""
        pem = (authority or self.authority).issue(name)
        return {
            "security.protocol": "SSL",
            "ssl.ca.location": self._ca,
            "ssl.certificate.location": self.file(f"{name}.pem", pem.certificate),
            "ssl.key.location": self.file(f"{name}.key", pem.key),
        }

    def grant(self, acls: Iterable[Acl]) -> None:
        """Adds ACLs."""
        self.admin.grant(acls)

    def revoke(self, acls: Iterable[Acl]) -> None:
        """Removes ACLs."""
        filters = [
            AclBindingFilter(
                ResourceType[acl.resource.upper().replace("-", "_")],
                acl.name,
                ResourcePatternType.PREFIXED if acl.prefixed else ResourcePatternType.LITERAL,
                acl.principal,
                None,
                AclOperation[acl.operation.upper()],
                AclPermissionType.ALLOW,
            )
            for acl in acls
        ]
        for future in self._admin.delete_acls(filters).values():
            assert future.result(), "there was no such ACL"

    def stop(self) -> None:
        """Ends it."""
        self.admin.close()
        self.cluster.stop()

    def _listeners(self) -> kafka_cluster.Listeners:
        # In a properties file, and so through the environment of a container, \n is a line's end.
        broker = Pem(*(text.replace("\n", "\\n") for text in self.authority.issue("broker")))
        settings: dict[str, Any] = {
            "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
            "allow.everyone.if.no.acl.found": "false",
            # ANONYMOUS is the broker itself, on listeners that nobody else reaches: every other one demands a name.
            "super.users": "User:admin;User:ANONYMOUS",
            "ssl.keystore.type": "PEM",
            "ssl.keystore.certificate.chain": broker.certificate,
            "ssl.keystore.key": broker.key,
            "ssl.truststore.type": "PEM",
            "ssl.truststore.certificates": self.authority.certificate.replace("\n", "\\n"),
            "listener.name.mutual.ssl.client.auth": "required",
            "listener.name.mutual.ssl.principal.mapping.rules": "RULE:^CN=(.*)$/$1/",
        }
        for listener, mechanisms in {"clear": list(_MECHANISMS)[:3], "tls": list(_MECHANISMS)}.items():
            settings[f"listener.name.{listener}.sasl.enabled.mechanisms"] = ",".join(mechanisms)
            for mechanism in mechanisms:
                name = f"listener.name.{listener}.{mechanism.lower()}.sasl.jaas.config"
                settings[name] = _MECHANISMS[mechanism]
        return kafka_cluster.Listeners({"CLEAR": "SASL_PLAINTEXT", "TLS": "SASL_SSL", "MUTUAL": "SSL"}, settings, ADMIN)
