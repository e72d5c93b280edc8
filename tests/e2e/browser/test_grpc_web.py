"""gRPC-Web from Node, and from pages in a real Chromium: of an origin that may call, and of one that
may not. What the pages check is in checks.js."""

import functools
import re
from types import SimpleNamespace

import pytest
from browser import HERE, Site
from harness import certificates
from harness.programs import Programs

MAY_NOT, *MAY = re.findall(r'await expect\("(.*?)"', (HERE / "checks.js").read_text())
CLIENTS = ["connect-web", "grpc-web binary", "grpc-web text"]  # the first runs in Node too


@pytest.fixture(scope="module")
def network(binary, descriptors):
    """The gateways, and the sites of two origins, of which one may call."""
    with Programs(binary, "browser") as programs:
        simulator = programs.simulator()
        ours, foreign = (Site(programs, simulator, descriptors.read_bytes()) for _ in range(2))
        certificate, key = programs.folder / "tls.pem", programs.folder / "tls.key"
        certificates.self_signed(certificate, key)

        def gateway(*flags):
            return programs.gateway(simulator, "--grpc-web", *flags, request_timeout=20)

        origins = f"--grpc-web-origins={ours.origin}"
        yield SimpleNamespace(
            ours=ours, foreign=foreign, plaintext=gateway(origins), closed=gateway(),
            tls=gateway(origins, "--tls-cert-file", certificate, "--tls-key-file", key),
        )  # fmt: skip


@pytest.fixture(scope="module")
def results(network):
    """What a page of a site hands in about a gateway, by client and check."""

    @functools.cache
    def results(site, gateway, may="call", node=False):
        scheme = "https" if gateway == "tls" else "http"
        url = f"{scheme}://{getattr(network, gateway).address}"
        told = getattr(network, site).visit(url, may, node)
        return {client: {one["name"]: one for one in rows} for client, rows in told.items()}

    return results


def assert_ok(results, client, check):
    assert client in results, results
    assert set(results[client]) in ({MAY_NOT}, set(MAY)), "the page makes other checks"
    assert results[client][check]["ok"], results[client][check]["told"]


@pytest.mark.parametrize("check", MAY)
def test_node_calls(results, check):
    assert_ok(results("ours", "plaintext", node=True), CLIENTS[0], check)


@pytest.mark.parametrize("check", MAY)
@pytest.mark.parametrize("client", CLIENTS)
def test_a_page_of_a_named_origin_calls(results, client, check):
    assert_ok(results("ours", "plaintext"), client, check)


@pytest.mark.parametrize("check", MAY)
@pytest.mark.parametrize("client", CLIENTS)
def test_a_page_calls_over_tls_and_http2(results, client, check):
    assert_ok(results("ours", "tls"), client, check)


def test_a_page_makes_many_calls_on_a_connection_over_http2(results, network):
    """Over HTTP/1.1 each call would have a connection of its own."""
    results("ours", "tls")
    assert 0 < network.tls.metric("aep_gateway_accepted_connections_total") <= 4


@pytest.mark.parametrize("client", CLIENTS)
def test_a_page_of_another_origin_may_not_call(results, client):
    assert_ok(results("foreign", "plaintext", may="not"), client, MAY_NOT)


@pytest.mark.parametrize("client", CLIENTS)
def test_no_page_may_call_if_no_origin_is_named(results, client):
    assert_ok(results("ours", "closed", may="not"), client, MAY_NOT)
