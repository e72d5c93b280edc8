#!/usr/bin/env bash
# Tests the gateway in a real Istio: run.sh [PYTEST ARGUMENTS], as of ../run.sh.
# It needs root, for network namespaces and iptables. The tests run in namespaces of their own, which
# end with them and from which nothing gets out, so everything is installed before.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

cannot() {
    echo "cannot run: $*" >&2
    exit 2
}

((EUID == 0)) || cannot "it needs root"
for program in openssl ip nsenter setpriv unshare; do
    command -v "$program" >/dev/null || cannot "$program is not installed"
done
command -v iptables-legacy >/dev/null || apt-get install --quiet --yes --no-install-recommends iptables ||
    cannot "there is no iptables"
kubernetes/tools/install.sh etcd kube-apiserver kube-controller-manager pilot-discovery pilot-agent istioctl
chart/install.sh >/dev/null
ISTIO=$(cd kubernetes/tools && go mod download istio.io/istio && go list -m -f '{{.Dir}}' istio.io/istio)
./run.sh --version

# Nothing else configures the programs.
exec env -i PATH="$PATH" HOME="$HOME" ISTIO="$ISTIO" \
    unshare --mount --net --pid --fork --kill-child --mount-proc ./run.sh -m istio --calls 500 "$@"
