#!/usr/bin/env bash
# Tests the chart and the examples against a real Kubernetes API server: run.sh
# What it installs goes to target/ci, and is used again by the next run. The API server is built
# from source, which takes many minutes the first time: run.sh --build does no more.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
tools=$root/target/ci/kubernetes
OPERATOR=github.com/prometheus-operator/prometheus-operator@v0.85.0

cannot() {
    echo "cannot run: $*" >&2
    exit 2
}

for program in go openssl python3; do
    command -v "$program" >/dev/null || cannot "$program is not installed"
done
"$here/tools/install.sh" etcd kube-apiserver kube-controller-manager ||
    cannot "the API server was not built, or Debian has no etcd-server"
"$root/tests/e2e/chart/install.sh" >/dev/null || cannot "Helm was not built"
[[ ${1-} != --build ]] || exit 0

python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || cannot "python3 is older than 3.10"
python3 -c 'import ensurepip, venv' || cannot "python3 has no venv (Debian: python3-venv)"
"$tools/venv/bin/python" -c '' 2>/dev/null || python3 -m venv --clear "$tools/venv"
"$tools/venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps \
    -r "$here/requirements.txt" || cannot "pip failed"
# The definitions of what is not Kubernetes' own.
module() { go list -m -f '{{.Dir}}' "$1"; }
cd "$here/tools"
go mod download istio.io/istio sigs.k8s.io/gateway-api
said=$(go mod download -json "$OPERATOR") || cannot "$OPERATOR cannot be had: $said"
operator=$(sed -n 's/^\t"Dir": "\(.*\)",*$/\1/p' <<<"$said")
crds=(
    "$(module istio.io/istio)"/manifests/charts/base/files/crd-all.gen.yaml
    "$(module sigs.k8s.io/gateway-api)"/config/crd/standard/*.yaml
    "$operator"/example/prometheus-operator-crd/*.yaml
)

# Everything here is on 127.0.0.1, and nothing else configures the programs.
unset http_proxy https_proxy all_proxy HTTP_PROXY HTTPS_PROXY ALL_PROXY KUBECONFIG
for variable in "${!HELM_@}" "${!ETCD_@}"; do
    unset "$variable"
done
export HELM_CACHE_HOME=$tools/helm HELM_CONFIG_HOME=$tools/helm HELM_DATA_HOME=$tools/helm
PATH=$tools/bin:$PATH PYTHONPATH=$root/tests/envoy:$root/tests/e2e \
    exec "$tools/venv/bin/python" "$here/suite.py" "${crds[@]}"
