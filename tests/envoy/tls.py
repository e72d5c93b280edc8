"""mTLS between Envoy and the gateway; SPIFFE ids; certificates that change on disk."""

import asyncio
import json
import signal
import socket
import ssl

import envoy_config
from balancing import until
from calls import Load, check_no_failure, table
from certificates import Authority, Secret
from checks import check, show
from envoy_config import NO_RETRY
from processes import get

GATEWAY = "spiffe://cluster.local/ns/aep/sa/gateway"
ORDERS = "spiffe://cluster.local/ns/shop/sa/orders"
OTHER = "spiffe://cluster.local/ns/shop/sa/other"


def serve(stand, secret, *flags):
    folder = secret.folder
    return stand.serve(
        "--tls-cert-file", folder / "tls.crt", "--tls-key-file", folder / "tls.key",
        "--tls-client-ca-file", folder / "ca.crt", "--tls-allowed-clients", ORDERS, *flags,
    )


def secret(stand, name, authority, uri):
    return Secret(stand.logs / name, **authority.sign(uri), **{"ca.crt": authority.pem})


def envoy(stand, secret):
    files = []
    for content in envoy_config.tls_secrets(secret.folder):
        files.append(stand.logs / f"{secret.folder.name}-{len(files)}.json")
        files[-1].write_text(json.dumps(content))
    stand.envoy(NO_RETRY, cluster=envoy_config.tls(*files, GATEWAY))


def tls_connection(gateway, secret):
    """The certificate that the gateway shows to this client."""
    context = ssl.create_default_context(cafile=secret.folder / "ca.crt")
    context.check_hostname = False  # its name is a URI
    context.load_cert_chain(secret.folder / "tls.crt", secret.folder / "tls.key")
    context.set_alpn_protocols(["h2"])
    host, port = gateway.address.rsplit(":", 1)
    with socket.create_connection((host, int(port)), timeout=10) as tcp:
        with context.wrap_socket(tcp) as connection:
            return connection.getpeercert(binary_form=True), connection.selected_alpn_protocol()


async def mutual_tls(stand):
    """Who is on the list may call; who is not, or is of another authority, may not."""
    mesh, stranger = Authority("mesh"), Authority("stranger")
    stand.simulate()
    gateway = serve(stand, secret(stand, "gateway", mesh, GATEWAY))

    envoy(stand, secret(stand, "orders", mesh, ORDERS))
    load = Load(stand.address)
    await load.many(50)
    calls = await load.ended(stand, afterwards=0)
    table(stand, calls)
    check_no_failure(calls)
    show(*stand.stats("ssl.handshake"), "handshakes")
    versions = get(f"{stand.admin}/stats?filter=cluster.gateways.ssl.versions").split()
    check("over TLS 1.2 or 1.3", any("TLSv1.2" in v or "TLSv1.3" in v for v in versions), versions)
    lines = [json.loads(line) for line in gateway.log.read_text().splitlines()]
    clients = {line.get("client") for line in lines if line.get("target") == "access"}
    check("the access log names the client", clients == {ORDERS}, clients)

    made = len(stand.ledger())
    forged = [("x-forwarded-client-cert", f"URI={ORDERS}")]
    for title, its_secret, code in [
        ("another id", secret(stand, "other", mesh, OTHER), "PERMISSION_DENIED"),
        # It trusts the gateway, which does not trust it.
        ("another authority", Secret(stand.logs / "stranger", **stranger.sign(ORDERS),
                                     **{"ca.crt": mesh.pem}), "UNAVAILABLE"),
    ]:
        envoy(stand, its_secret)
        load = Load(stand.address)
        call = await load.call(metadata=forged)
        check(f"{title} is refused, whatever its headers say", call.code == code, call)
        await load.channel.close()
    check("without a batch", len(stand.ledger()) == made, len(stand.ledger()), made)
    refused = lambda: gateway.metric("aep_gateway_refused_connections_total", reason="tls")
    await until(lambda: refused() >= 2, 5)  # counted after the alert that Envoy has told of
    check("and counted", refused() >= 2, refused())
    check("probes need no TLS", gateway.status("/readyz") == 200)


async def rotation(stand):
    """Gateway and Envoy move from one authority to another under load, in the usual three steps.
    Connections last a second, so new ones are made all the time."""
    old, new = Authority("old"), Authority("new")
    stand.simulate("--latency", "50ms")
    of_gateway = secret(stand, "gateway", old, GATEWAY)
    of_envoy = secret(stand, "orders", old, ORDERS)
    gateway = serve(stand, of_gateway, "--max-connection-age", "1s")
    envoy(stand, of_envoy)
    before, protocol = tls_connection(gateway, of_envoy)
    check("ALPN is h2", protocol == "h2", protocol)

    def change(trusted, signed_by=None):
        for its_secret, name in [(of_gateway, GATEWAY), (of_envoy, ORDERS)]:
            its_secret.change({
                **(signed_by.sign(name) if signed_by else {}),
                "ca.crt": b"".join(authority.pem for authority in trusted),
            })
        # It looks every ten seconds by itself.
        gateway.process.send_signal(signal.SIGHUP)

    load = Load(stand.address)
    done = asyncio.get_running_loop().create_future()
    loading = asyncio.create_task(load.steady(100, done))
    await asyncio.sleep(1)
    for step in [lambda: change([old, new]), lambda: change([old, new], new), lambda: change([new])]:
        await asyncio.to_thread(step)
        await asyncio.sleep(2)  # connections by the certificates before it have ended
    done.set_result(None)
    await loading
    reloads = [gateway.metric("aep_gateway_tls_reloads_total", result=r) for r in ("ok", "failed")]
    check("the gateway has reloaded three times", reloads == [3, 0], reloads)
    after, _ = await asyncio.to_thread(tls_connection, gateway, of_envoy)
    check("it shows another certificate", after != before)
    calls = await load.ended(stand)
    table(stand, calls)
    show(*stand.stats("ssl.handshake"), "handshakes")
    check_no_failure(calls)
    check("connections were made all the time", stand.stats("ssl.handshake")[0] >= 5)

    # The old authority has no say any more.
    envoy(stand, Secret(stand.logs / "late", **old.sign(ORDERS), **{"ca.crt": new.pem}))
    load = Load(stand.address)
    call = await load.call()
    check("a certificate of the old authority is refused", call.code == "UNAVAILABLE", call)
    await load.channel.close()


SCENARIOS = [
    ("mtls", "mTLS and SPIFFE ids between Envoy and the gateway", mutual_tls, ()),
    ("mtls-rotation", "certificates and authorities that change under load", rotation, ()),
]
