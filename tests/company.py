"""A company's network on loopback: an authority of its own, servers with its certificates, a proxy that knows them."""

import contextlib
import datetime
import socket
import socketserver
import ssl

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from sandbox.relay import join
from tests.serving import serving

DAY = datetime.timedelta(days=1)
PEM = serialization.Encoding.PEM


class Authority:
    """Its certificate is in the file `certificate`; the servers that it certified have contexts."""

    def __init__(self, folder):
        self.folder, self.key = folder, ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Company Root")])
        self.certificate = folder / "company.pem"
        made = self._signed(self.name, self.key, x509.BasicConstraints(ca=True, path_length=None))
        self.certificate.write_bytes(b"The company's own:\n" + made.public_bytes(PEM))

    def _signed(self, subject, key, *extensions):
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder().subject_name(subject).issuer_name(self.name).public_key(key.public_key())
            .serial_number(x509.random_serial_number()).not_valid_before(now - DAY).not_valid_after(now + 30 * DAY)
        )  # fmt: skip
        for extension in extensions:
            builder = builder.add_extension(extension, critical=isinstance(extension, x509.BasicConstraints))
        return builder.sign(self.key, hashes.SHA256())

    def context(self, *names):
        """Of a server with these names."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0])])
        made = self._signed(subject, key, x509.SubjectAlternativeName([x509.DNSName(name) for name in names]))
        file = self.folder / f"{names[0]}.pem"
        private = key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        file.write_bytes(private + made.public_bytes(PEM))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(file)
        return context


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 64


def front(context, port):
    """A TLS server before the plain one at a port of loopback; it has `server_address`."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self):
            with contextlib.suppress(OSError):
                plain = socket.create_connection(("127.0.0.1", port), 30)
                with plain, context.wrap_socket(self.request, server_side=True) as encrypted:
                    join(encrypted, plain)

    return serving(_Server(("127.0.0.1", 0), Handler))


def proxy(places):
    """A proxy for https alone, which knows the ports of loopback by name: `places`. `asked` has the names."""

    class Handler(socketserver.StreamRequestHandler):
        rbufsize = 0  # what follows the request is the client's

        def handle(self):
            lines = list(iter(lambda: self.rfile.readline().strip(), b""))
            name = lines[0].split()[1].decode() if lines else ""
            self.server.asked.append(name)
            port = places.get(name.partition(":")[0])
            if port is None:
                self.wfile.write(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")
                return
            with socket.create_connection(("127.0.0.1", port), 30) as server:
                self.wfile.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
                join(self.connection, server)

    server = _Server(("127.0.0.1", 0), Handler)
    server.asked = []
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    return serving(server)
