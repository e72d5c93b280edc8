#!/usr/bin/env bash
# Builds Helm and kubeconform, and downloads the definitions of what is not Kubernetes' own; prints
# the folders of the definitions. harness/chart.py calls it. Everything goes to tests/e2e/.run and
# is used again by the next run; Helm takes some minutes the first time.
set -euo pipefail

# The first one does all tests. The others have older libraries, and must render the same.
PROGRAMS=(
    helm.sh/helm/v4/cmd/helm@v4.3.1
    helm.sh/helm/v4/cmd/helm@v4.2.4
    helm.sh/helm/v3/cmd/helm@v3.21.4
    github.com/yannh/kubeconform/cmd/kubeconform@v0.7.0
)
DEFINITIONS=(
    istio.io/api@v1.31.4/kubernetes
    sigs.k8s.io/gateway-api@v1.6.3/config/crd/standard
    github.com/prometheus-operator/prometheus-operator@v0.85.0/example/prometheus-operator-crd
)

cd "$(dirname "${BASH_SOURCE[0]}")"
bin=$(cd .. && pwd)/.run/chart/bin
mkdir -p "$bin"
exec 9>"$bin/lock"
flock 9

cannot() {
    echo "cannot run: $*" >&2
    exit 2
}

command -v go >/dev/null || cannot "go is not installed"
for package in "${PROGRAMS[@]}"; do
    name=${package##*/} # helm@v4.3.1
    [[ ! -x $bin/${name/@/-} ]] || continue
    # One package at a time, and not for ever: other tests run at the same time.
    GOBIN=$bin CGO_ENABLED=0 timeout 15m go install -p 1 -ldflags "-s -w" "$package" >&2 ||
        cannot "$name was not built"
    mv "$bin/${name%@*}" "$bin/${name/@/-}"
done
for definitions in "${DEFINITIONS[@]}"; do
    version=${definitions#*@}
    module=${definitions%@*}@${version%%/*}
    downloaded=$(go mod download -json "$module") || cannot "$module cannot be had: $downloaded"
    echo "$(sed -n 's/^\t"Dir": "\(.*\)",*$/\1/p' <<<"$downloaded")/${version#*/}"
done
