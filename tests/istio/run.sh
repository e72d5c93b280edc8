#!/usr/bin/env bash
# Tests the gateway in a real Istio: run.sh [PATH OF THE GATEWAY]
# SCENARIOS='killed drain' runs only these. It needs root, for network namespaces and iptables; all
# of it happens in namespaces of its own, which end with it and from which nothing gets out.
# What it installs goes to target/ci, and is used again by the next run. Kubernetes and Istio are
# built from source, which takes half an hour the first time: run.sh --build does no more.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
tools=$root/target/ci/istio
gateway=${1:-$root/target/debug/aep-batch-gateway}
[[ $gateway == /* ]] || gateway=$PWD/$gateway

cannot() {
    echo "cannot run: $*" >&2
    exit 2
}

for program in go openssl python3 ip nsenter setpriv unshare; do
    command -v "$program" >/dev/null || cannot "$program is not installed"
done
"$root/tests/kubernetes/tools/install.sh" etcd kube-apiserver kube-controller-manager \
    pilot-discovery pilot-agent istioctl || cannot "a program was not built"
"$root/tests/e2e/chart/install.sh" >/dev/null || cannot "Helm was not built"
[[ ${1-} != --build ]] || exit 0

((EUID == 0)) || cannot "it needs root"
[[ -x $gateway ]] || cannot "no gateway at $gateway: run cargo build, or name it as argument"
command -v iptables-legacy >/dev/null || apt-get install --quiet --yes --no-install-recommends iptables ||
    cannot "there is no iptables"
python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || cannot "python3 is older than 3.10"
python3 -c 'import ensurepip, venv' || cannot "python3 has no venv (Debian: python3-venv)"
mkdir -p "$tools/proto"
"$tools/venv/bin/python" -c '' 2>/dev/null || python3 -m venv --clear "$tools/venv"
"$tools/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    -r "$root/tests/envoy/requirements.txt" -r "$here/requirements.txt" || cannot "pip failed"
"$tools/venv/bin/python" -m grpc_tools.protoc -I "$root/proto" --python_out="$tools/proto" \
    --grpc_python_out="$tools/proto" aep/ingestion/v1/batch_service.proto
cd "$root/tests/kubernetes/tools"
module() { go mod download "$1" && go list -m -f '{{.Dir}}' "$1"; }
istio=$(module istio.io/istio)

# Nothing else configures the programs.
for variable in $(compgen -e); do
    [[ $variable == @(PATH|HOME|SCENARIOS|LANG) ]] || unset "$variable"
done
export HELM_CACHE_HOME=$tools/helm HELM_CONFIG_HOME=$tools/helm HELM_DATA_HOME=$tools/helm CALLS=500
export PYTHONPATH=$root/tests/kubernetes:$root/tests/envoy:$tools/proto
export PATH=$root/target/ci/kubernetes/bin:$PATH
exec unshare --mount --net --pid --fork --kill-child --mount-proc \
    "$tools/venv/bin/python" "$here/suite.py" "$gateway" "$istio"
