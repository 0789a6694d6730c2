"""A TLS certificate and its key, checked on the operator's machine before a host sees them."""

from __future__ import annotations

import datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from llamafleet.remote.common import TLS_CERTIFICATE, TLS_KEY
from llamafleet.settings import secrets

# A certificate that ends earlier is said at the end of a run, or within the last third of its time, if that is shorter:
# those that are renewed by a timer are renewed before.
SOON = datetime.timedelta(days=21)


class CertificateError(ValueError):
    """A certificate or key that cannot serve; the text names file and way out."""


def pair(certificate: str, key: str, place: str) -> dict[str, str]:
    """Certificate (with its chain) and key as PEM texts, by the names of the unit's credentials.

    Raises `CertificateError`, and `SecretError` for a key file that others may read.
    """
    key_text = secrets.read(key, f"{place}tls_key_file")
    chain_text, leaf = _leaf(certificate, f"{place}tls_certificate_file")
    now = datetime.datetime.now(datetime.UTC)
    if now > leaf.not_valid_after_utc:
        raise CertificateError(
            f"{place}tls_certificate_file: {certificate} ended on {leaf.not_valid_after_utc:%Y-%m-%d}: renew it"
        )
    if now < leaf.not_valid_before_utc:
        raise CertificateError(
            f"{place}tls_certificate_file: {certificate} begins on {leaf.not_valid_before_utc:%Y-%m-%d}: "
            "is your clock right?"
        )
    if _public(key_text, key, place) != leaf.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo):
        raise CertificateError(f"{place}tls_key_file: {key} is not the key of the certificate in {certificate}")
    return {TLS_CERTIFICATE: chain_text + "\n", TLS_KEY: key_text + "\n"}


def ends_soon(certificate: str, place: str) -> str:
    """What is to be done about a certificate that ends soon, see `SOON`; empty where it lasts longer. Raises
    `CertificateError`."""
    setting = f"{place}tls_certificate_file"
    leaf = _leaf(certificate, setting)[1]
    ends = leaf.not_valid_after_utc
    left = ends - datetime.datetime.now(datetime.UTC)
    if left > min(SOON, (ends - leaf.not_valid_before_utc) / 3):
        return ""
    return f"{setting}: {certificate} ends on {ends:%Y-%m-%d}, in {left.days} days: renew it, and deploy again"


def trust(chain: str, authority: str) -> tuple[str, str]:
    """By which certificates a client trusts a server with this chain: their PEM texts, empty for the system's store,
    and the name that the server's certificate must have, empty where it is trusted itself. `authority` has the PEM
    texts of the operator's own authority, or nothing."""
    certificates = x509.load_pem_x509_certificates(chain.encode())
    leaf, own = certificates[0], [one for one in certificates if one.issuer == one.subject]
    if leaf in own:
        return chain, ""
    return chain if own else f"{chain}\n{authority}" if authority else "", _name(leaf)


def _name(leaf: x509.Certificate) -> str:
    try:
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        return str(next(iter(names.get_values_for_type(x509.DNSName)), ""))
    except x509.ExtensionNotFound:
        return str(next((one.value for one in leaf.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)), ""))


def _leaf(path: str, setting: str) -> tuple[str, x509.Certificate]:
    """The file's text and its first certificate, which is the server's own."""
    try:
        text = Path(path).expanduser().read_text().strip()
    except (OSError, RuntimeError, UnicodeDecodeError) as error:  # RuntimeError: "~name" of no user
        raise CertificateError(f"{setting}: cannot read {path}: {error}") from error
    if "PRIVATE KEY-----" in text:
        raise CertificateError(
            f"{setting}: {path} has a private key in it: keep that in the file of tls_key_file alone"
        )
    try:
        return text, x509.load_pem_x509_certificates(text.encode())[0]
    except ValueError as error:
        raise CertificateError(f"{setting}: {path} has no PEM certificate: {error}") from error


def _public(text: str, path: str, place: str) -> bytes:
    try:
        key = load_pem_private_key(text.encode(), password=None)
    except TypeError as error:
        raise CertificateError(
            f"{place}tls_key_file: {path} is encrypted: a service has nobody to ask for the password"
        ) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise CertificateError(f"{place}tls_key_file: {path} has no PEM private key") from error
    return key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
