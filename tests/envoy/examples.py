"""How the examples in deploy/examples tell Envoy to retry."""

from pathlib import Path

import yaml

from envoy_config import timeout

EXAMPLES = Path(__file__).parents[2] / "deploy" / "examples"


def envoy():
    """What `Stand.envoy` takes: a retry policy, and what the route says besides."""
    (document,) = documents("envoy")
    chain = document["static_resources"]["listeners"][0]["filter_chains"][0]
    manager = chain["filters"][0]["typed_config"]
    route = manager["route_config"]["virtual_hosts"][0]["routes"][0]["route"]
    return {"retry_policy": route["retry_policy"], "route": {"timeout": route["timeout"]}}


def istio():
    """The VirtualService, as istiod translates it."""
    (service,) = (d for d in documents("istio") if d["kind"] == "VirtualService")
    (route,) = service["spec"]["http"]
    retries = route["retries"]
    return {
        "retry_policy": {"retry_on": retries["retryOn"], "num_retries": retries["attempts"]},
        "route": timeout(route["timeout"]),
        "request_headers": route["headers"]["request"]["set"],
    }


def documents(name):
    return list(yaml.safe_load_all((EXAMPLES / f"{name}.yaml").read_text()))
