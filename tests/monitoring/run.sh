#!/usr/bin/env bash
# Tests the alerts, the dashboard and docs/operations.md with a real Prometheus
# that scrapes real gateways under faults: run.sh [PATH OF THE GATEWAY]
# Draws docs/images/three-minutes.svg anew: run.sh PATH plot
# What it installs goes to .run, and is used again by the next run. The logs go
# there too.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
gateway=${1:-$here/../../target/debug/aep-batch-gateway}
[[ $gateway == /* ]] || gateway=$PWD/$gateway
what=${2:-suite}
run=$here/.run

cannot() {
    echo "cannot run: $*" >&2
    exit 2
}

[[ $what == suite || $what == plot ]] || cannot "there is suite and plot, not $what"
command -v python3 >/dev/null || cannot "python3 is not installed"
python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || cannot "python3 is older than 3.11"
python3 -c 'import ensurepip, venv' || cannot "python3 has no venv (Debian: python3-venv)"
[[ -x $gateway ]] || cannot "no gateway at $gateway: run cargo build, or name it as argument"

echo "installing"
mkdir -p "$run/proto"
"$run/venv/bin/python" -c '' 2>/dev/null || python3 -m venv --clear "$run/venv"
"$run/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    -r "$here/$what-requirements.txt" || cannot "pip failed"
"$run/venv/bin/python" -m grpc_tools.protoc -I "$here/../../proto" --python_out="$run/proto" \
    --grpc_python_out="$run/proto" aep/ingestion/v1/batch_service.proto

# Debian's package, unpacked and not installed: it would start a service.
PATH=$PATH:$run/prometheus/usr/bin
if ! command -v prometheus >/dev/null || ! command -v promtool >/dev/null; then
    command -v apt-get >/dev/null || cannot "Prometheus is not installed"
    mkdir -p "$run/deb"
    (
        cd "$run/deb"
        apt-get download -qq prometheus || { apt-get update -qq && apt-get download -qq prometheus; }
    ) >"$run/apt.log" 2>&1 || cannot "apt-get does not get Debian's package prometheus: $(<"$run/apt.log")"
    dpkg-deb -x "$run"/deb/prometheus_*.deb "$run/prometheus"
    rm -r "$run/deb"
fi
prometheus --version 2>&1 | sed -n 1p

# Everything here is on 127.0.0.1, and nothing else configures the gateway.
unset http_proxy https_proxy all_proxy HTTP_PROXY HTTPS_PROXY ALL_PROXY grpc_proxy
for variable in "${!AEP_GATEWAY_@}" "${!OTEL_@}"; do
    unset "$variable"
done
PYTHONPATH=$run/proto exec "$run/venv/bin/python" "$here/$what.py" "$gateway"
