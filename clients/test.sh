#!/usr/bin/env bash
# Plays real clients against the gateway: test.sh [GATEWAY [CLIENT...]]
# The clients are those of `all` below; all, if none is named.
# What it installs goes to .test and into the clients' own folders, and is used
# again by the next run. The logs go to .test too. C++ and Ruby come from
# Debian's packages (root), unless they are there.
set -euo pipefail

BUF=1.75.0
GRPCURL=v1.9.4
PROTOC_GEN_GO=v1.36.12
PROTOC_GEN_GO_GRPC=v1.6.2

all=(python node go java cpp ruby rust connect connect-web grpcurl grpcui buf protoc)
debian_cpp=(g++ make pkg-config libgrpc++-dev libprotobuf-dev protobuf-compiler protobuf-compiler-grpc grpc-proto)
debian_ruby=(ruby ruby-grpc ruby-googleapis-common-protos-types libprotobuf-dev protobuf-compiler
    protobuf-compiler-grpc grpc-proto)

clients=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
gateway=${1:-$clients/../target/debug/aep-batch-gateway}
[[ $gateway == /* ]] || gateway=$PWD/$gateway
shift $(($# > 0))
[[ $# -gt 0 ]] || set -- "${all[@]}"
tools=$clients/.test

cannot() {
    echo "cannot run: $*" >&2
    exit 2
}

need() {
    for program in "$@"; do
        command -v "$program" >/dev/null || cannot "$program is not installed"
    done
}

# debian PACKAGES...: installs those that are missing.
debian() {
    local package missing=()
    for package in "$@"; do
        [[ $(dpkg-query --show --showformat '${db:Status-Status}' "$package" 2>/dev/null) == installed ]] ||
            missing+=("$package")
    done
    [[ ${#missing[@]} -gt 0 ]] || return 0
    if [[ $(id -u) != 0 ]] || ! command -v apt-get >/dev/null; then
        cannot "there are no ${missing[*]} (Debian's packages)"
    fi
    apt-get update -q >/dev/null
    DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends "${missing[@]}" >/dev/null ||
        cannot "apt-get failed"
}

# once NAME FILES... -- COMMAND...: runs the command, unless it has succeeded
# with these files as they are.
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

proto=../proto/aep/ingestion/v1/batch_service.proto

install_python() {
    "$tools/venv/bin/python" -c '' 2>/dev/null || python3 -m venv --clear "$tools/venv"
    "$tools/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
        -r python/interop-requirements.txt
    "$tools/venv/bin/python" -m grpc_tools.protoc -I ../proto \
        --python_out=python --grpc_python_out=python "$proto"
}

install_node() {
    [[ -d node/node_modules ]] || rm -f "$tools/node.done"
    once node node/package-lock.json -- npm ci --prefix node --loglevel=error --no-audit --no-fund
}

install_go() {
    install_buf
    export GOBIN=$tools/bin
    go install "google.golang.org/protobuf/cmd/protoc-gen-go@$PROTOC_GEN_GO"
    go install "google.golang.org/grpc/cmd/protoc-gen-go-grpc@$PROTOC_GEN_GO_GRPC"
    (cd go && PATH=$GOBIN:$tools/node_modules/.bin:$PATH buf generate)
    go -C go build -buildvcs=false -o "$tools/bin/" . ./interop
}

install_java() {
    [[ -e java/target/create-batch.jar ]] || rm -f "$tools/java.done"
    local sources
    mapfile -t sources < <(find java/src -type f)
    once java java/pom.xml "$proto" "${sources[@]}" -- mvn --quiet --batch-mode --file java/pom.xml package
}

install_cpp() {
    make --jobs=2 --directory=cpp build/create-batch build/interop
}

install_ruby() {
    local generate=(protoc --plugin=protoc-gen-grpc="$(command -v grpc_ruby_plugin)"
        --ruby_out=ruby/lib --grpc_out=ruby/lib)
    mkdir -p ruby/lib
    "${generate[@]}" -I ../proto "$proto"
    "${generate[@]}" -I /usr/share/grpc-proto \
        grpc/reflection/v1/reflection.proto grpc/reflection/v1alpha/reflection.proto
}

install_rust() {
    cargo build --quiet --locked --manifest-path rust/Cargo.toml --target-dir "$tools/rust" \
        --bins --example interop
}

install_connect() {
    [[ -d connect/node_modules ]] || rm -f "$tools/connect.done"
    once connect connect/package-lock.json -- \
        npm ci --prefix connect --loglevel=error --no-audit --no-fund
    (cd connect && node_modules/.bin/buf generate)
}

install_connect-web() {
    install_connect
}

install_grpcurl() {
    GOBIN=$tools/bin go install "github.com/fullstorydev/grpcurl/cmd/grpcurl@$GRPCURL"
}

install_grpcui() {
    # A module of its own, because it wants older libraries than the example.
    go -C grpcui build -buildvcs=false -o "$tools/bin/" github.com/fullstorydev/grpcui/cmd/grpcui
}

install_protoc() {
    install_python
}

install_buf() {
    [[ $("$tools/node_modules/.bin/buf" --version 2>/dev/null) == "$BUF" ]] ||
        npm install --loglevel=error --no-audit --no-fund --no-save --prefix "$tools" "@bufbuild/buf@$BUF"
}

need python3
python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || cannot "python3 is older than 3.10"
packages=()
for client in "$@"; do
    case $client in
    python | protoc) python3 -c 'import ensurepip, venv' || cannot "python3 has no venv (Debian: python3-venv)" ;;
    node | connect | connect-web | buf) need node npm ;;
    go) need go node npm ;;
    java) need java mvn ;;
    cpp) packages+=("${debian_cpp[@]}") ;;
    ruby) packages+=("${debian_ruby[@]}") ;;
    rust) need cargo ;;
    grpcurl | grpcui) need go ;;
    *) cannot "no client is called $client; there are ${all[*]}" ;;
    esac
done
[[ -x $gateway ]] || cannot "no gateway at $gateway: run cargo build, or name it as argument"

cd "$clients"
mkdir -p "$tools"
echo "installing"
debian "${packages[@]}"
installing=()
for client in "$@"; do
    # Others install them already.
    [[ $client == buf && " $* " == *" go "* ]] && continue
    [[ $client == protoc && " $* " == *" python "* ]] && continue
    [[ $client == connect-web && " $* " == *" connect "* ]] && continue
    "install_$client" >"$tools/install-$client.log" 2>&1 &
    installing+=("$client=$!")
done
failed=""
for entry in "${installing[@]}"; do
    wait "${entry#*=}" || failed="$failed ${entry%=*}"
done
for client in $failed; do
    tail -n 20 "$tools/install-$client.log" >&2
done
[[ -z $failed ]] || cannot "installing failed:$failed"

exec python3 interop/suite.py "$gateway" "$tools" "$@"
