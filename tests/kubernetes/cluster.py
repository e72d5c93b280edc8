"""A Kubernetes control plane on this machine: etcd, API server and controller manager. There are
no nodes: what stands in for kubelet and the scheduler is the suites' own."""

import json
import secrets
import socket
import subprocess
import time
from pathlib import Path

import yaml
from api import Api, Refused

# An operator's definition has the string `=` bare, which YAML 1.1 had a type for.
yaml.CSafeLoader.add_constructor(
    "tag:yaml.org,2002:value", yaml.constructor.SafeConstructor.construct_yaml_str
)


class Failed(Exception):
    """A program did not do what it must do before anything can be tested."""


def wait_until(what, condition, seconds=30):
    """Returns what the condition gave."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > end:
            raise Failed(f"{what}: not within {seconds} s")
        time.sleep(0.1)
    return found


def free_ports(host, count):
    sockets = [socket.create_server((host, 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


class Programs:
    """Starts programs and ends them: `with Programs(folder) as programs`. Each has a log."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.running = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        # The last first: the API server wants to say good-bye to etcd.
        for process in reversed(self.running):
            process.kill()
            process.wait()

    def start(self, name, *command, **options):
        with open(self.folder / f"{name}.log", "a") as log:
            process = subprocess.Popen(
                [str(part) for part in command], stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT, **options,
            )  # fmt: skip
        process.log = self.folder / f"{name}.log"
        self.running.append(process)
        return process


class Cluster(Programs):
    """`with Cluster(...) as cluster`: `cluster.api` is its client, `cluster.kubeconfig` a file."""

    def __init__(self, folder, bin, host="127.0.0.1"):
        super().__init__(folder)
        self.bin, self.host = Path(bin), host

    def __enter__(self):
        try:
            self.start_all()
        except BaseException:
            self.__exit__()
            raise
        return self

    def start_all(self):
        etcd, peers, port = free_ports(self.host, 3)
        store = f"http://{self.host}:{etcd}"
        self.start(
            "etcd", "etcd", "--data-dir", self.folder / "etcd",
            "--listen-client-urls", store, "--advertise-client-urls", store,
            "--listen-peer-urls", f"http://{self.host}:{peers}",
        )  # fmt: skip
        key = self.folder / "service-accounts.key"
        subprocess.run(
            ["openssl", "genpkey", "-algorithm", "RSA", "-out", key], check=True, capture_output=True
        )
        token, tokens = secrets.token_hex(), self.folder / "tokens.csv"
        tokens.write_text(f"{token},suite,suite,system:masters\n")
        self.url = f"https://{self.host}:{port}"
        server = self.start(
            "kube-apiserver", self.bin / "kube-apiserver", "--etcd-servers", store,
            "--bind-address", self.host, "--secure-port", port,
            # Nobody asks for the Service `kubernetes`; the default would be the machine's address.
            "--advertise-address", "192.0.2.1", "--endpoint-reconciler-type", "none",
            "--cert-dir", self.folder, "--token-auth-file", tokens,
            "--authorization-mode", "Node,RBAC", "--service-cluster-ip-range", "10.96.0.0/16",
            "--service-account-issuer", "https://kubernetes.default.svc",
            "--service-account-key-file", key, "--service-account-signing-key-file", key,
            # Webhooks are called at their EndpointSlices: there is no kube-proxy.
            "--enable-aggregator-routing",
        )  # fmt: skip
        authority = self.folder / "apiserver.crt"

        def ready():
            if server.poll() is not None:
                raise Failed(f"the API server ended: see {server.log}")
            try:
                return self.api.get("/readyz") == "ok"
            except (OSError, Refused):
                return False

        wait_until("the API server's certificate", authority.exists)
        self.api = Api(self.url, token, authority)
        wait_until("the API server is ready", ready, 60)
        self.kubeconfig = self.folder / "kubeconfig"
        self.kubeconfig.write_text(json.dumps(kubeconfig(self.url, token, authority)))
        self.kubeconfig.chmod(0o600)
        self.start(
            "kube-controller-manager", self.bin / "kube-controller-manager",
            "--kubeconfig", self.kubeconfig, "--leader-elect=false", "--secure-port", 0,
            "--service-account-private-key-file", key, "--root-ca-file", authority,
            "--horizontal-pod-autoscaler-sync-period", "1s",
            # Those that would miss kubelet's sign of life.
            "--controllers", "*,-node-lifecycle-controller,-taint-eviction-controller,"
            "-pod-garbage-collector-controller",
        )  # fmt: skip

    def define(self, files):
        """Definitions of kinds (CRDs), from files; says how many, when the API server has them."""
        names = set()
        for file in files:
            for definition in yaml.load_all(Path(file).read_text(), yaml.CSafeLoader):
                if definition and definition["kind"] == "CustomResourceDefinition":
                    self.api.apply(definition)
                    names.add(definition["metadata"]["name"])

        def established(name):
            path = f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{name}"
            conditions = self.api.get(path)["status"].get("conditions") or []
            return any((c["type"], c["status"]) == ("Established", "True") for c in conditions)

        for name in names:
            wait_until(f"{name} is established", lambda: established(name), 60)
        return len(names)

    def version(self):
        return self.api.get("/version")["gitVersion"]


def kubeconfig(url, token, authority):
    return {
        "apiVersion": "v1", "kind": "Config", "current-context": "suite",
        "clusters": [{
            "name": "suite",
            "cluster": {"server": url, "certificate-authority": str(authority)},
        }],
        "users": [{"name": "suite", "user": {"token": token}}],
        "contexts": [{"name": "suite", "context": {"cluster": "suite", "user": "suite"}}],
    }  # fmt: skip
