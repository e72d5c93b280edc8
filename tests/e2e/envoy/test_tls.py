"""mTLS between Envoy and the gateway; SPIFFE ids; certificates that change on disk."""

import asyncio
import json
import signal
import socket
import ssl

from harness.certificates import Authority, Secret
from harness.envoy import NO_RETRY, tls, tls_secrets
from harness.load import Load, assert_all_ok
from harness.process import get, wait_until

GATEWAY = "spiffe://cluster.local/ns/aep/sa/gateway"
ORDERS = "spiffe://cluster.local/ns/shop/sa/orders"
OTHER = "spiffe://cluster.local/ns/shop/sa/other"


def start_gateway(programs, simulator, secret, *flags):
    folder = secret.folder
    return programs.gateway(
        simulator, "--tls-cert-file", folder / "tls.crt", "--tls-key-file", folder / "tls.key",
        "--tls-client-ca-file", folder / "ca.crt", "--tls-allowed-clients", ORDERS, *flags,
    )  # fmt: skip


def start_envoy(programs, gateway, secret):
    files = []
    for content in tls_secrets(secret.folder):
        files.append(programs.folder / f"{secret.folder.name}-{len(files)}.json")
        files[-1].write_text(json.dumps(content))
    return programs.envoy([gateway], NO_RETRY, cluster=tls(*files, GATEWAY))


def make_secret(programs, name, uri, signed_by, trusts=None):
    """A certificate and its key, and the authority that its owner trusts: by default its own."""
    trusted = {"ca.crt": (trusts or signed_by).pem}
    return Secret(programs.folder / name, **signed_by.sign(uri), **trusted)


def served_certificate(gateway, secret):
    """The certificate that the gateway shows to this client."""
    context = ssl.create_default_context(cafile=secret.folder / "ca.crt")
    context.check_hostname = False  # its name is a URI
    context.load_cert_chain(secret.folder / "tls.crt", secret.folder / "tls.key")
    context.set_alpn_protocols(["h2"])
    host, port = gateway.address.rsplit(":", 1)
    with socket.create_connection((host, int(port)), timeout=10) as tcp:
        with context.wrap_socket(tcp) as connection:
            assert connection.selected_alpn_protocol() == "h2"
            return connection.getpeercert(binary_form=True)


async def one_call(envoy, metadata=()):
    load = Load(envoy.address)
    load.call(metadata=metadata)
    (call,) = await load.ended()
    return call


async def test_only_an_allowed_spiffe_id_may_call(programs):
    mesh, stranger = Authority("mesh"), Authority("stranger")
    simulator = programs.simulator()
    of_gateway = make_secret(programs, "gateway", GATEWAY, mesh)
    gateway = start_gateway(programs, simulator, of_gateway)

    envoy = start_envoy(programs, gateway, make_secret(programs, "orders", ORDERS, mesh))
    load = Load(envoy.address)
    await load.many(50)
    assert_all_ok(await load.counted(simulator, afterwards=0))
    versions = get(f"{envoy.admin}/stats?filter=cluster.gateways.ssl.versions")
    assert "TLSv1.2" in versions or "TLSv1.3" in versions
    assert {line.get("client") for line in gateway.log_lines("access")} == {ORDERS}

    created = len(simulator.ledger())
    forged = [("x-forwarded-client-cert", f"URI={ORDERS}")]
    envoy = start_envoy(programs, gateway, make_secret(programs, "other", OTHER, mesh))
    assert (await one_call(envoy, forged)).code == "PERMISSION_DENIED"
    # It trusts the gateway, which does not trust it.
    of_stranger = make_secret(programs, "stranger", ORDERS, stranger, trusts=mesh)
    envoy = start_envoy(programs, gateway, of_stranger)
    assert (await one_call(envoy, forged)).code == "UNAVAILABLE"
    assert len(simulator.ledger()) == created

    def refused():
        return gateway.metric("aep_gateway_refused_connections_total", reason="tls") >= 2

    # It is counted after the alert that Envoy has told of.
    await asyncio.to_thread(wait_until, "refused connections are counted", refused, 5)
    assert gateway.status("/readyz") == 200, "probes need no TLS"


async def test_certificates_change_under_load(programs):
    """Gateway and Envoy move from one authority to another in the usual three steps. Connections
    last a second, so new ones are made all the time."""
    old, new = Authority("old"), Authority("new")
    simulator = programs.simulator("--latency", "50ms")
    of_gateway = make_secret(programs, "gateway", GATEWAY, old)
    of_envoy = make_secret(programs, "orders", ORDERS, old)
    gateway = start_gateway(programs, simulator, of_gateway, "--max-connection-age", "1s")
    envoy = start_envoy(programs, gateway, of_envoy)
    before = served_certificate(gateway, of_envoy)

    def change(trusted, signed_by=None):
        for secret, name in [(of_gateway, GATEWAY), (of_envoy, ORDERS)]:
            secret.change({
                **(signed_by.sign(name) if signed_by else {}),
                "ca.crt": b"".join(authority.pem for authority in trusted),
            })  # fmt: skip
        # It looks every ten seconds by itself.
        gateway.process.send_signal(signal.SIGHUP)

    load = Load(envoy.address)
    async with load.steadily(100):
        await asyncio.sleep(1)
        for step in [([old, new],), ([old, new], new), ([new],)]:
            await asyncio.to_thread(change, *step)
            await asyncio.sleep(2)  # connections by the certificates before it have ended
    reloads = [gateway.metric("aep_gateway_tls_reloads_total", result=r) for r in ("ok", "failed")]
    assert reloads == [3, 0]
    assert await asyncio.to_thread(served_certificate, gateway, of_envoy) != before
    assert_all_ok(await load.counted(simulator))
    assert envoy.stat("ssl.handshake") >= 5, "connections were made all the time"

    # The old authority has no say any more.
    late = make_secret(programs, "late", ORDERS, old, trusts=new)
    assert (await one_call(start_envoy(programs, gateway, late))).code == "UNAVAILABLE"
