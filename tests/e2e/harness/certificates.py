"""Certificate authorities and what they sign, in files that change as Kubernetes changes them."""

import datetime
import ipaddress
import os
import shutil

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

PEM = serialization.Encoding.PEM


class Authority:
    def __init__(self, name):
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        builder = unsigned(self.name, self.name, self.key)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), True)
        self.certificate = builder.sign(self.key, hashes.SHA256())
        self.pem = self.certificate.public_bytes(PEM)

    def sign(self, uri):
        """A certificate for this SPIFFE id and its key, as the files of a secret."""
        key = ec.generate_private_key(ec.SECP256R1())
        builder = unsigned(x509.Name([]), self.name, key)
        # A certificate without a subject has its names marked critical.
        names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)])
        certificate = builder.add_extension(names, True).sign(self.key, hashes.SHA256())
        return {"tls.crt": certificate.public_bytes(PEM), "tls.key": private_pem(key)}


def self_signed(certificate, key, since=-3600, until=86400):
    """Writes both PEM files, for 127.0.0.1; valid from `since` to `until`, in seconds from now."""
    private = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "gateway")])
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    builder = unsigned(name, name, private, since, until)
    builder = builder.add_extension(x509.SubjectAlternativeName([address]), False)
    key.write_bytes(private_pem(private))
    certificate.write_bytes(builder.sign(private, hashes.SHA256()).public_bytes(PEM))


def private_pem(key):
    return key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def unsigned(subject, issuer, key, since=-3600, until=86400):
    now = datetime.datetime.now(datetime.timezone.utc)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + datetime.timedelta(seconds=since))
        .not_valid_after(now + datetime.timedelta(seconds=until))
    )


class Secret:
    """A folder like a mounted secret: each file is a link into `..data`, which is a link to the
    folder of one version, and is swapped at once."""

    def __init__(self, folder, **files):
        self.folder, self.versions, self.files = folder, 0, {}
        folder.mkdir(parents=True)
        self.change(files)

    def change(self, files):
        self.files.update(files)
        self.versions += 1
        version = self.folder / f"..{self.versions}"
        version.mkdir()
        for name, content in self.files.items():
            (version / name).write_bytes(content)
        new = self.folder / "..new"
        new.symlink_to(version.name)
        os.replace(new, self.folder / "..data")
        for name in self.files:
            if not (self.folder / name).is_symlink():
                (self.folder / name).symlink_to(f"..data/{name}")
        if self.versions > 1:
            shutil.rmtree(self.folder / f"..{self.versions - 1}")
