#!/usr/bin/env bash
# Calls the gateway by gRPC-Web from Node and from pages in a real Chromium:
# run.sh [PATH OF THE GATEWAY]. What it installs goes to node_modules, and is
# used again by the next run; the logs go to .run. Chromium comes from Debian's
# packages (root), unless there is one, or CHROMIUM names one.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
gateway=${1:-$here/../../target/debug/aep-batch-gateway}
[[ $gateway == /* ]] || gateway=$PWD/$gateway

cannot() {
    echo "cannot run: $*" >&2
    exit 2
}

for program in npm openssl; do
    command -v "$program" >/dev/null || cannot "$program is not installed"
done
node --input-type=module -e 'process.exit(import.meta.dirname ? 0 : 1)' ||
    cannot "node is older than 20.11"
[[ -x $gateway ]] || cannot "no gateway at $gateway: run cargo build, or name it as argument"

echo "installing"
browser() {
    command -v "${CHROMIUM:-chromium-headless-shell}" chromium google-chrome | head -n 1
}
if [[ -z $(browser) ]]; then
    if [[ $(id -u) != 0 ]] || ! command -v apt-get >/dev/null; then
        cannot "there is no Chromium (Debian: chromium-headless-shell); CHROMIUM can name one"
    fi
    apt-get update -q >/dev/null
    DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends \
        chromium-headless-shell >/dev/null || cannot "apt-get failed"
fi
chromium=$(browser)
cd "$here"
mkdir -p .run
npm ci --silent --no-fund --no-audit || cannot "npm failed"

# Everything here is on 127.0.0.1, and nothing else configures the gateway.
unset http_proxy https_proxy all_proxy HTTP_PROXY HTTPS_PROXY ALL_PROXY
for variable in "${!AEP_GATEWAY_@}"; do
    unset "$variable"
done
exec timeout --kill-after=10 300 node suite.js "$gateway" "$chromium"
