"""The node of the cluster: as much of kubelet, scheduler, CNI plugin and container runtime as a
mesh needs. A pod is a network namespace, a container a process in it with its volumes mounted; there
are no images. Everything is inside the namespaces that run.sh made, and ends with them."""

import http.client
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import threading
import time
from base64 import b64decode

from harness.kubernetes import Refused

HOST = "10.244.0.1"
NAME = "node"


def sh(script, *args):
    subprocess.run(["sh", "-ec", script, "sh", *map(str, args)], check=True, stdin=subprocess.DEVNULL)


def make_network():
    sh(
        "ip link set lo up; ip link add pods type bridge; ip link set pods up;"
        f"ip address add {HOST}/16 dev pods"
    )


def field(pod, path):
    """What `fieldRef` and the downward API say."""
    if path in ("metadata.labels", "metadata.annotations"):
        found = pod["metadata"].get(path.removeprefix("metadata."), {})
        return "\n".join(f"{key}={json.dumps(value)}" for key, value in found.items())
    found = pod
    for key in path.split("."):
        found = found.get(key, {})
    return found or ""


def resource(container, name):
    """What `resourceFieldRef` says of a limit, as a whole number."""
    limits = container.get("resources", {}).get("limits", {})
    number, unit = re.fullmatch(r"(\d+)(\w*)", limits.get(name.removeprefix("limits."), "2")).groups()
    return str(math.ceil(int(number) * {"": 1, "m": 0.001, "Mi": 2**20, "Gi": 2**30}[unit]))


class Container:
    """A process of a pod. It may end and be started again."""

    def __init__(self, pod, spec):
        self.pod, self.spec, self.name = pod, spec, spec["name"]
        self.restarts = -1
        self.process = None

    def environment(self):
        found = {"PATH": os.environ["PATH"], **self.pod.node.environment}
        for entry in self.spec.get("env", []):
            source = entry.get("valueFrom", {})
            if "fieldRef" in source:
                value = field(self.pod.object, source["fieldRef"]["fieldPath"])
            elif "resourceFieldRef" in source:
                value = resource(self.spec, source["resourceFieldRef"]["resource"])
            else:
                value = self.expand(entry.get("value", ""), found)
            found[entry["name"]] = value
        return found

    @staticmethod
    def expand(text, environment):
        return re.sub(r"\$\((\w+)\)", lambda m: environment.get(m[1], m[0]), text)

    def command(self, *command):
        """A command inside of the container, as its user."""
        script = ""
        for mount in sorted(self.spec.get("volumeMounts", []), key=lambda m: m["mountPath"]):
            to, volume = mount["mountPath"], self.pod.volume(mount["name"])
            script += (
                f"mkdir -p {shlex.quote(to)}; mount --bind {shlex.quote(str(volume))} {shlex.quote(to)};"
            )
        context = self.pod.object["spec"].get("securityContext", {}) | self.spec.get("securityContext", {})
        user = context.get("runAsUser", 0)
        group = context.get("runAsGroup", user)
        script += f'exec setpriv --reuid {user} --regid {group} --clear-groups --no-new-privs -- "$@"'
        return [*self.pod.enter, "unshare", "--mount", "sh", "-ec", script, "sh", *map(str, command)]

    def start(self):
        self.restarts += 1
        environment = self.environment()
        args = [self.expand(arg, environment) for arg in self.spec.get("args", [])]
        with open(self.pod.folder / f"{self.name}.log", "a") as log:
            os.fchmod(log.fileno(), 0o666)  # Envoy opens /dev/stdout, as another user
            self.process = subprocess.Popen(
                self.command(*self.pod.node.programs[self.name], *args), env=environment, cwd="/",
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def prepare_to_stop(self):
        command = self.spec.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command")
        if command and self.process.poll() is None:
            subprocess.run(
                self.command(*command), env=self.environment(), cwd="/", timeout=30,
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip

    def stop(self, end):
        """SIGTERM, and SIGKILL when the grace period is over."""
        if self.process and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(max(2.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                print(f"    {self.pod.name}/{self.name} did not end in its grace period")
        self.kill()

    def kill(self):
        """All processes of the container at once, as when it is out of memory."""
        if self.process:
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            self.process.wait()

    def healthy(self, *probes):
        if self.process is None or self.process.poll() is not None:
            return False
        wanted = [self.spec[probe]["httpGet"] for probe in probes if "httpGet" in self.spec.get(probe, {})]
        return all(self.answers(w["path"], self.port(w["port"])) for w in wanted)

    def port(self, name):
        ports = {p.get("name"): p["containerPort"] for p in self.spec.get("ports", [])}
        return ports.get(name, name)

    def answers(self, path, port):
        connection = http.client.HTTPConnection(self.pod.address, port, timeout=2)
        try:
            connection.request("GET", path)
            return connection.getresponse().status < 400
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()


class Pod(threading.Thread):
    def __init__(self, node, found, number):
        super().__init__(daemon=True)
        self.node, self.object, self.number = node, found, number
        metadata = found["metadata"]
        self.name, self.namespace, self.uid = metadata["name"], metadata["namespace"], metadata["uid"]
        self.path = f"/api/v1/namespaces/{self.namespace}/pods/{self.name}"
        self.address = f"10.244.{number // 250}.{number % 250 + 2}"
        self.folder = node.folder / f"{self.namespace}.{self.name}"
        self.containers = [Container(self, c) for c in found["spec"]["containers"]]
        # Native sidecars. The other init containers are those of the mesh that check its iptables.
        self.sidecars = [
            Container(self, c)
            for c in found["spec"].get("initContainers", [])
            if c.get("restartPolicy") == "Always"
        ]
        self.leaving = threading.Event()
        self.ready = None
        self.start()

    def run(self):
        try:
            self.make()
            self.keep()
            self.end()
        except Exception as failure:  # the pod has gone, or the suite is over
            if not self.node.over:
                print(f"    {self.name}: {type(failure).__name__} {failure}")
        finally:
            for container in [*self.containers, *self.sidecars]:
                container.kill()

    def make(self):
        self.folder.mkdir(parents=True)
        # It keeps the network namespace.
        self.pause = subprocess.Popen(["unshare", "--net", "sleep", "infinity"])
        own = os.readlink("/proc/self/ns/net")
        while os.readlink(f"/proc/{self.pause.pid}/ns/net") == own:
            time.sleep(0.01)
        self.enter = ["nsenter", f"--net=/proc/{self.pause.pid}/ns/net", "--"]
        link = f"pod{self.number}"
        inside = f"nsenter --net=/proc/{self.pause.pid}/ns/net -- ip"
        sh(
            f"ip link add {link} type veth peer name eth0 netns {self.pause.pid};"
            f"ip link set {link} master pods up; {inside} link set lo up; {inside} link set eth0 up;"
            f"{inside} address add {self.address}/16 dev eth0; {inside} route add default via {HOST}"
        )
        api = self.node.api
        target = {"apiVersion": "v1", "kind": "Node", "name": NAME}
        binding = {"apiVersion": "v1", "kind": "Binding", "metadata": {"name": self.name}, "target": target}
        api.request("POST", f"{self.path}/binding", binding)
        self.report(False, phase="Pending")
        self.object = api.get(self.path)
        if self.object["metadata"].get("labels", {}).get("app") == "istiod":
            self.node.add_name(self.address, "istiod.istio-system.svc")
        self.redirect()
        for container in self.sidecars:
            container.start()
            while not self.leaving.is_set() and not container.healthy("startupProbe"):
                time.sleep(0.1)
        for container in self.containers:
            container.start()

    def redirect(self):
        """What Istio's CNI plugin does: the validation's arguments, to make what it would check."""
        for container in self.object["spec"].get("initContainers", []):
            if container["name"] == "istio-validation":
                args = [a for a in container["args"] if a not in ("--run-validation", "--skip-rule-apply")]
                with open(self.folder / "iptables.log", "w") as log:
                    subprocess.run(
                        [*self.enter, *self.node.programs["istio-proxy"], *args], check=True,
                        stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                    )  # fmt: skip

    def keep(self):
        """Until the pod shall end: restarts what ended, and says whether it is ready."""
        while not self.leaving.wait(0.2):
            for container in [*self.sidecars, *self.containers]:
                if container.process.poll() is not None:
                    self.report(False)
                    container.kill()
                    self.leaving.wait(1)  # about what kubelet takes
                    container.start()
            probes = [c.healthy("startupProbe", "readinessProbe") for c in [*self.sidecars, *self.containers]]
            self.report(all(probes))

    def end(self):
        grace = self.object["spec"].get("terminationGracePeriodSeconds", 30)
        end = time.monotonic() + grace
        preparing = [threading.Thread(target=c.prepare_to_stop) for c in [*self.sidecars, *self.containers]]
        for thread in preparing:
            thread.start()
        for thread in preparing:
            thread.join()
        for container in [*self.containers, *reversed(self.sidecars)]:
            container.stop(end)
        self.pause.kill()
        self.pause.wait()
        sh(f"ip link delete pod{self.number} 2>/dev/null || true")
        self.node.api.delete(self.path, gracePeriodSeconds=0)

    def report(self, ready, phase="Running"):
        if ready == self.ready:
            return
        self.ready = ready
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        word = str(ready)
        self.node.api.patch(f"{self.path}/status", {"status": {
            "phase": phase, "hostIP": HOST, "hostIPs": [{"ip": HOST}], "startTime": now,
            "podIP": self.address, "podIPs": [{"ip": self.address}],
            "conditions": [
                {"type": "PodScheduled", "status": "True", "lastTransitionTime": now},
                {"type": "Initialized", "status": "True", "lastTransitionTime": now},
                {"type": "ContainersReady", "status": word, "lastTransitionTime": now},
                {"type": "Ready", "status": word, "lastTransitionTime": now},
            ],
        }})  # fmt: skip

    def volume(self, name):
        """The folder of this volume, made the first time it is asked for."""
        folder = self.folder / "volumes" / name
        if not folder.exists():
            (spec,) = [v for v in self.object["spec"]["volumes"] if v["name"] == name]
            files = self.files(spec)  # before there is a folder, if that fails
            folder.mkdir(parents=True)
            folder.chmod(0o777)
            for path, content in files.items():
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).write_bytes(content)
        return folder

    def files(self, volume):
        found = {}
        for source in volume.get("projected", {}).get("sources", [volume]):
            (kind,) = source.keys() - {"name"} or {"emptyDir"}
            found |= getattr(self, f"files_of_{kind}", self.no_files)(source.get(kind) or {})
        return found

    def no_files(self, _):
        return {}

    def files_of_configMap(self, source, kind="configmaps", read=str.encode):
        end = time.monotonic() + 30
        while True:
            try:
                path = f"/api/v1/namespaces/{self.namespace}/{kind}"
                data = self.node.api.get(f"{path}/{source.get('name') or source['secretName']}").get(
                    "data", {}
                )
                break
            except Refused:
                if source.get("optional"):
                    return {}
                if time.monotonic() > end:  # istiod makes its own a little later
                    raise
                time.sleep(0.2)
        items = source.get("items") or [{"key": key, "path": key} for key in data]
        return {item["path"]: read(data[item["key"]]) for item in items}

    def files_of_secret(self, source):
        return self.files_of_configMap(source, "secrets", b64decode)

    def files_of_downwardAPI(self, source):
        return {i["path"]: field(self.object, i["fieldRef"]["fieldPath"]).encode() for i in source["items"]}

    def files_of_serviceAccountToken(self, source):
        bound = {"apiVersion": "v1", "kind": "Pod", "name": self.name, "uid": self.uid}
        request = {
            "spec": {"boundObjectRef": bound, "expirationSeconds": source.get("expirationSeconds", 3600)}
        }
        if "audience" in source:
            request["spec"]["audiences"] = [source["audience"]]
        account = self.object["spec"]["serviceAccountName"]
        path = f"/api/v1/namespaces/{self.namespace}/serviceaccounts/{account}/token"
        answer, _ = self.node.api.request("POST", path, request)
        return {source["path"]: answer["status"]["token"].encode()}


class Node(threading.Thread):
    """Runs the pods that there are. `programs`: what runs in a container of this name."""

    def __init__(self, cluster, folder, programs):
        super().__init__(daemon=True)
        self.api, self.folder, self.programs = cluster.api, folder, programs
        host, port = cluster.url.removeprefix("https://").split(":")
        self.environment = {"KUBERNETES_SERVICE_HOST": host, "KUBERNETES_SERVICE_PORT": port}
        self.pods, self.numbers, self.over = {}, itertools.count(), False
        shutil.rmtree(folder, ignore_errors=True)
        self.api.apply({"apiVersion": "v1", "kind": "Node", "metadata": {"name": NAME}})
        self.start()

    def run(self):
        while not self.over:
            try:
                found = {pod["metadata"]["uid"]: pod for pod in self.api.items("/api/v1/pods")}
            except (OSError, Refused):
                continue  # the API server is gone: so will this be
            for uid, pod in found.items():
                if uid not in self.pods:
                    self.pods[uid] = Pod(self, pod, next(self.numbers))
                if "deletionTimestamp" in pod["metadata"]:
                    self.pods[uid].leaving.set()
            for uid in self.pods.keys() - found.keys():
                self.pods.pop(uid).leaving.set()
            time.sleep(0.1)

    def add_name(self, address, *names):
        """Makes names known: there is no DNS."""
        with open("/etc/hosts", "a") as hosts:
            hosts.write(f"{address} {' '.join(names)}\n")

    def all(self, namespace, prefix):
        """The pods of this name that run and shall not end."""
        return [
            pod for pod in list(self.pods.values())
            if pod.namespace == namespace and pod.name.startswith(prefix)
            and pod.ready is not None and not pod.leaving.is_set()
        ]  # fmt: skip

    def ready(self, namespace, prefix):
        return [pod for pod in self.all(namespace, prefix) if pod.ready]
