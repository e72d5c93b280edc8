#!/usr/bin/env bash
# Puts programs into tests/e2e/.run/kubernetes/bin: install.sh NAME...
# Those of go.mod are built from source, as no package registry has them as binaries, one package
# at a time if JOBS does not say more: half an hour for all, the first time. etcd is Debian's.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

tools=$(cd ../.. && pwd)/.run/kubernetes

cannot() {
    echo "cannot run: $*" >&2
    exit 2
}

command -v go >/dev/null || cannot "Go is not installed"
mkdir -p "$tools/bin"
version=$(go list -m -f '{{.Version}}' k8s.io/kubernetes)
# Without these Helm takes the cluster for version 0.
k8s="-X k8s.io/component-base/version.git"
numbers=${version#v}
flags="-s -w ${k8s}Version=$version ${k8s}Major=${numbers%%.*} ${k8s}Minor=$(cut -d. -f2 <<<"$numbers")"
built=$(cat go.mod go.sum install.sh | sha256sum)
for name in "$@"; do
    program=$tools/bin/$name
    if [[ $name == etcd ]]; then
        [[ ! -x $program ]] || continue
        if command -v etcd >/dev/null; then
            ln -s "$(command -v etcd)" "$program"
        else
            # Unpacked, not installed: nothing shall start it as a service.
            rm -rf "$tools/etcd" && mkdir "$tools/etcd"
            (cd "$tools/etcd" && apt-get download etcd-server && dpkg-deb -x ./*.deb .) ||
                cannot "etcd is not installed, and apt-get does not get etcd-server"
            ln -s "$tools/etcd/usr/bin/etcd" "$program"
        fi
        continue
    fi
    [[ $(cat "$program.built" 2>/dev/null) != "$built" ]] || continue
    echo "building $name"
    package=$(go list tool | grep "/$name\$")
    CGO_ENABLED=0 nice -n 19 go build -p "${JOBS:-1}" -trimpath -ldflags "$flags" \
        -o "$program" "$package" || cannot "$name was not built"
    echo "$built" >"$program.built"
done
