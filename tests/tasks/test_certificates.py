"""A certificate that cannot serve is refused on the operator's machine, by file and reason."""

import datetime
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from llamafleet.settings.secrets import SecretError
from tasks.lib import certificates
from tasks.lib.certificates import CertificateError

DAY = datetime.timedelta(days=1)


def make(folder, name="one", begins=-1, ends=30, password=None):
    """Writes NAME.crt and NAME.key; their paths."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "box1")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder().subject_name(subject).issuer_name(subject).public_key(key.public_key())
        .serial_number(1).not_valid_before(now + begins * DAY).not_valid_after(now + ends * DAY)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    locked = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    pem = serialization.Encoding.PEM
    (folder / f"{name}.crt").write_bytes(certificate.public_bytes(pem))
    (folder / f"{name}.key").write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, locked))
    (folder / f"{name}.key").chmod(0o600)
    return str(folder / f"{name}.crt"), str(folder / f"{name}.key")


def test_a_good_pair_is_sent_as_it_is(tmp_path):
    certificate, key = make(tmp_path)
    found = certificates.pair(certificate, key, "")
    assert set(found) == {"tls-certificate", "tls-key"}
    assert found["tls-certificate"] == Path(certificate).read_text() and found["tls-key"] == Path(key).read_text()


@pytest.mark.parametrize(
    ("times", "says"), [({"ends": -0.5}, "ended on"), ({"begins": 1, "ends": 2}, "begins on")], ids=["past", "future"]
)
def test_a_certificate_out_of_its_time(tmp_path, times, says):
    certificate, key = make(tmp_path, **times)
    with pytest.raises(CertificateError, match=f"tls_certificate_file: {certificate} {says}"):
        certificates.pair(certificate, key, "")


def test_the_key_of_another_certificate(tmp_path):
    certificate, _ = make(tmp_path)
    _, other = make(tmp_path, "other")
    with pytest.raises(CertificateError, match=f"tls_key_file: {other} is not the key of .*{certificate}"):
        certificates.pair(certificate, other, "")


def test_an_encrypted_key_and_no_key_at_all(tmp_path):
    certificate, key = make(tmp_path, password=b"x")
    with pytest.raises(CertificateError, match="is encrypted"):
        certificates.pair(certificate, key, "")
    (tmp_path / "one.key").write_text("nothing")
    with pytest.raises(CertificateError, match="no PEM private key"):
        certificates.pair(certificate, key, "")


def test_a_key_that_others_may_read(tmp_path):
    certificate, key = make(tmp_path)
    (tmp_path / "one.key").chmod(0o644)
    with pytest.raises(SecretError, match=f"tls_key_file: {key} has mode 0644"):
        certificates.pair(certificate, key, "")


def test_a_certificate_file_with_a_key_in_it_or_without_a_certificate(tmp_path):
    certificate, key = make(tmp_path)
    both = tmp_path / "both.pem"
    both.write_text(Path(certificate).read_text() + Path(key).read_text())
    with pytest.raises(CertificateError, match="has a private key in it"):
        certificates.pair(str(both), key, "")
    both.write_text("nothing")
    with pytest.raises(CertificateError, match="no PEM certificate"):
        certificates.pair(str(both), key, "")


@pytest.mark.parametrize(
    ("begins", "ends", "soon"),
    [(-340, 25, False), (-345, 20.5, True), (-60, 29, False), (-2, 4, False), (-5, 1.5, True)],
    ids=["a year's", "a year's at its end", "three months'", "a week's", "a week's at its end"],
)
def test_a_certificate_that_ends_soon_is_said(tmp_path, begins, ends, soon):
    certificate, _ = make(tmp_path, begins=begins, ends=ends)
    text = certificates.ends_soon(certificate, "models: chat: ")
    assert bool(text) is soon
    if soon:
        assert text.startswith(f"models: chat: tls_certificate_file: {certificate} ends on ")
        assert text.endswith(f", in {int(ends)} days: renew it, and deploy again")
