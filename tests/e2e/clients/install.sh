#!/usr/bin/env bash
# Installs the client programs: install.sh [CLIENT...], all by default. The tests call it.
# Everything goes to tests/e2e/.run and into the clients' own folders, and is used again by the next
# run.
# C++ and Ruby come from Debian's packages (needs root), unless they are there.
set -euo pipefail

BUF=1.75.0
GRPCURL=v1.9.4
PROTOC_GEN_GO=v1.36.12
PROTOC_GEN_GO_GRPC=v1.6.2

cd "$(dirname "${BASH_SOURCE[0]}")/../../../clients"
tools=$(cd .. && pwd)/tests/e2e/.run/clients
proto=../proto/aep/ingestion/v1/batch_service.proto
export GOBIN=$tools/bin GOFLAGS=-buildvcs=false

cannot() {
    echo "cannot run: $*" >&2
    exit 2
}

need() {
    local program
    for program in "$@"; do
        command -v "$program" >/dev/null || cannot "$program is not installed"
    done
}

# Installs those of Debian's packages that are missing.
debian() {
    local package missing=()
    for package in "$@"; do
        [[ $(dpkg-query --show --showformat '${db:Status-Status}' "$package" 2>/dev/null) == installed ]] ||
            missing+=("$package")
    done
    [[ ${#missing[@]} -gt 0 ]] || return 0
    if [[ $(id -u) != 0 ]] || ! command -v apt-get >/dev/null; then
        cannot "${missing[*]} are not installed (Debian's packages)"
    fi
    apt-get update -q >/dev/null
    DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends "${missing[@]}" >/dev/null ||
        cannot "apt-get failed"
}

# once NAME FILES... -- COMMAND...: runs the command, unless it has succeeded with these files as
# they are.
once() {
    local name=$1 files=()
    shift
    while [[ $1 != -- ]]; do
        files+=("$1")
        shift
    done
    shift
    local now
    now=$(cat "${files[@]}" | cksum)
    [[ $now == "$(cat "$tools/$name.done" 2>/dev/null)" ]] && return
    "$@" || return
    echo "$now" >"$tools/$name.done"
}

npm_ci() {
    need node npm
    [[ -d $1/node_modules ]] || rm -f "$tools/$1.done"
    once "$1" "$1/package-lock.json" -- npm ci --prefix "$1" --loglevel=error --no-audit --no-fund
}

install_buf() {
    need node npm
    [[ $("$tools/node_modules/.bin/buf" --version 2>/dev/null) == "$BUF" ]] ||
        npm install --loglevel=error --no-audit --no-fund --no-save --prefix "$tools" "@bufbuild/buf@$BUF"
}

install_node() {
    npm_ci node
}

install_go() {
    need go
    install_buf
    go install "google.golang.org/protobuf/cmd/protoc-gen-go@$PROTOC_GEN_GO"
    go install "google.golang.org/grpc/cmd/protoc-gen-go-grpc@$PROTOC_GEN_GO_GRPC"
    (cd go && PATH=$GOBIN:$tools/node_modules/.bin:$PATH buf generate)
    go -C go build -o "$GOBIN/" . ./interop
}

install_java() {
    need java mvn
    local sources
    [[ -e java/target/create-batch.jar ]] || rm -f "$tools/java.done"
    mapfile -t sources < <(find java/src -type f)
    once java java/pom.xml "$proto" "${sources[@]}" -- mvn --quiet --batch-mode --file java/pom.xml package
}

install_cpp() {
    debian g++ make pkg-config libgrpc++-dev libprotobuf-dev protobuf-compiler protobuf-compiler-grpc grpc-proto
    make --jobs=2 --directory=cpp build/create-batch build/interop
}

install_ruby() {
    debian ruby ruby-grpc ruby-googleapis-common-protos-types libprotobuf-dev protobuf-compiler \
        protobuf-compiler-grpc grpc-proto
    local generate=(protoc --plugin=protoc-gen-grpc="$(command -v grpc_ruby_plugin)"
        --ruby_out=ruby/lib --grpc_out=ruby/lib)
    mkdir -p ruby/lib
    "${generate[@]}" -I ../proto "$proto"
    "${generate[@]}" -I /usr/share/grpc-proto \
        grpc/reflection/v1/reflection.proto grpc/reflection/v1alpha/reflection.proto
}

install_rust() {
    need cargo
    cargo build --quiet --locked --manifest-path rust/Cargo.toml --target-dir "$tools/rust" \
        --bins --example interop
}

install_connect() {
    npm_ci connect
    (cd connect && node_modules/.bin/buf generate)
}

install_grpcurl() {
    need go
    go install "github.com/fullstorydev/grpcurl/cmd/grpcurl@$GRPCURL"
}

install_grpcui() {
    need go
    # A module of its own, because it wants older libraries than the example.
    go -C grpcui build -o "$GOBIN/" github.com/fullstorydev/grpcui/cmd/grpcui
}

mkdir -p "$tools"
exec 9>"$tools/lock"
flock 9 # one at a time
[[ $# -gt 0 ]] || set -- node go java cpp ruby rust connect grpcurl grpcui buf
for client in "$@"; do
    "install_$client"
done
