#!/usr/bin/env bash
# Builds the image of the Dockerfile and runs it, without an image registry and
# without a container daemon: needs root, Rust, and Debian's packages (with
# --packages it only installs these).
# Takes about 4 GB in $TMPDIR while it runs. The image's program stays in target/image.
set -euo pipefail
cd "$(dirname "$0")/../.."

fail() {
  echo "FAILED: $*" >&2
  # What the program said, if it was running.
  [ -z "${work-}" ] || tail -n 20 "$work/stdout" "$work/stderr" >&2 2> /dev/null || true
  exit 1
}
step() { echo "== $* (${SECONDS}s)"; }
is() { # what, value, expected
  [ "$2" = "$3" ] || fail "$1 is '$2', not '$3'"
  echo "$1: $2"
}

missing=()
for tool in buildah debootstrap curl pgrep:procps readelf:binutils; do
  command -v "${tool%:*}" > /dev/null || missing+=("${tool#*:}")
done
# With it, debootstrap checks what it gets.
[ -e /usr/share/keyrings/debian-archive-keyring.gpg ] || missing+=(debian-archive-keyring)
for tool in cargo rustc; do
  command -v "$tool" > /dev/null || fail "$tool is missing: install Rust"
done
[ "$(id -u)" = 0 ] || fail "must run as root; missing packages: ${missing[*]:-none}"
if [ ${#missing[@]} -gt 0 ]; then
  step "Installing ${missing[*]}"
  apt-get update -q
  DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends "${missing[@]}"
fi

[ "${1-}" != --packages ] || exit 0

# docker.io/library/rust:VERSION-SUITE
base=$(sed -n 's/^FROM \(.*\) AS build$/\1/p' Dockerfile)
suite=${base##*-}
version=${base##*:} version=${version%-*}
# That of rust-toolchain.toml.
sysroot=$(rustc --print sysroot)
case $("$sysroot/bin/rustc" --version) in
  "rustc $version."*) ;;
  *) fail "the Dockerfile wants Rust $version, here is $("$sysroot/bin/rustc" --version)" ;;
esac

work=$(mktemp -d)
running=
cleanup() {
  if [ -n "$running" ]; then
    # The program; unshare, which waits for it, then ends too.
    pgrep --parent "$running" | xargs --no-run-if-empty kill -KILL || true
    wait "$running" || true
  fi
  rm -rf --one-file-system "$work"
}
trap cleanup EXIT
trap 'exit 130' INT TERM
# The images live and die with the work directory.
export TMPDIR=$work
buildah() { command buildah --root "$work/storage" --runroot "$work/run" --storage-driver vfs "$@"; }

step "Making a stand-in for $base"
container=$(buildah from scratch)
root=$(buildah mount "$container")
# What the Rust image has and this build needs; the C compiler is for aws-lc-sys.
# In a mount namespace, so that no mount of debootstrap can stay behind.
unshare --mount debootstrap --variant=minbase --include=gcc,libc6-dev,ca-certificates \
  "$suite" "$root" > "$work/stdout" || fail "debootstrap"
mkdir -p "$root/usr/local/cargo/bin"
cp -a "$sysroot/bin/cargo" "$sysroot/bin/rustc" "$root/usr/local/cargo/bin/"
cp -a "$sysroot/lib" "$root/usr/local/cargo/"
# The crates come through this machine's cargo, with all its settings (mirrors,
# proxies, certificates), so that the build in the image needs no network.
cargo vendor --quiet --locked --respect-source-config --versioned-dirs "$work/vendor" > /dev/null
cat > "$root/usr/local/cargo/config.toml" << 'CONFIG'
[source.crates-io]
replace-with = "vendor"
[source.vendor]
directory = "/vendor"
CONFIG
buildah config --env CARGO_HOME=/usr/local/cargo \
  --env PATH=/usr/local/cargo/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$container"
buildah commit --quiet --rm "$container" "$base" > /dev/null

step "Building the Dockerfile"
# Docker's format, because OCI's has no HEALTHCHECK.
buildah bud --isolation chroot --pull-never --format docker \
  --volume "$work/vendor:/vendor:ro" --tag gateway . 2>&1

step "Looking at the image"
config() { buildah inspect --type image --format "{{printf \"%q\" .Docker.Config.$1}}" gateway; }
is User "$(config User)" '"65532:65532"'
is ExposedPorts "$(config ExposedPorts)" 'map["50051/tcp":{} "9464/tcp":{}]'
is Healthcheck "$(config Healthcheck.Test)" '["CMD" "/aep-batch-gateway" "healthcheck"]'
is StopSignal "$(config StopSignal)" '"SIGTERM"'
is Entrypoint "$(config Entrypoint)" '["/aep-batch-gateway"]'
is Cmd "$(config Cmd)" '["serve"]'
env=$(config Env)
for variable in AEP_GATEWAY_LISTEN=0.0.0.0:50051 AEP_GATEWAY_ADMIN_LISTEN=0.0.0.0:9464; do
  [[ $env = *"\"$variable\""* ]] || fail "Env is $env, without $variable"
done
echo "Env: $env"

root=$(buildah mount "$(buildah from --pull-never gateway)")
is Files "$(cd "$root" && find . ! -type d | sort | xargs)" \
  './LICENSE ./aep-batch-gateway ./etc/ssl/certs/ca-certificates.crt'
headers=$(readelf --program-headers "$root/aep-batch-gateway")
[[ $headers != *INTERP* ]] || fail "the program is not static"
binary=$(stat --format %s "$root/aep-batch-gateway")
content=$(find "$root" -type f -printf '%s\n' | awk '{ sum += $1 } END { print sum }')

# Runs the program harder than a container would: as PID 1 and the image's user,
# on nothing but the image's files, read-only, without /proc and /dev.
# Followed by variables and arguments.
# shellcheck disable=SC2016 # the inner shell expands
in_image=(env --ignore-environment PATH="$PATH" unshare --mount --pid --fork sh -ec '
  root=$1; shift
  mount --bind -o ro "$root" "$root"
  while [ "${1#*=}" != "$1" ]; do export "$1"; shift; done
  exec chroot --userspec=65532:65532 --groups= "$root" /aep-batch-gateway "$@"
' sh "$root")
# Starts a command and sets $admin. The image's addresses, but free ports.
start() { # command
  step "Running $1"
  : > "$work/stdout" # because wait_for may be sooner than the program
  "${in_image[@]}" AEP_GATEWAY_LISTEN=0.0.0.0:0 AEP_GATEWAY_ADMIN_LISTEN=0.0.0.0:0 "$1" \
    > "$work/stdout" 2> "$work/stderr" &
  running=$!
  wait_for '"listen":'
  head -n 1 "$work/stdout"
  admin=$(sed -n 's/.*"admin":"\([^"]*\)".*/\1/p' "$work/stdout")
}
wait_for() { # pattern on standard output
  for _ in {1..100}; do
    ! grep -q "$1" "$work/stdout" || return 0
    kill -0 "$running" 2> /dev/null || fail "the program ended"
    sleep 0.1
  done
  fail "no $1 within 10 s"
}
# SIGTERM to the program, which as PID 1 has to handle it: the kernel's default is to ignore it.
stop() {
  local code=0 program
  program=$(pgrep --parent "$running")
  is "PID in the container" "$(awk '/^NSpid:/ { print $NF }' "/proc/$program/status")" 1
  is "User, group and capabilities" \
    "$(awk '/^(Uid|Gid|CapEff):/ { print $2 }' "/proc/$program/status" | xargs)" \
    '65532 65532 0000000000000000'
  kill -TERM "$program"
  for _ in {1..50}; do
    kill -0 "$running" 2> /dev/null || break
    sleep 0.1
  done
  ! kill -0 "$running" 2> /dev/null || fail "still running 5 s after SIGTERM"
  wait "$running" || code=$?
  running=
  is "Exit code after SIGTERM" "$code" 0
}

start demo
wait_for BATCH_STATUS_LOADING
grep -m 1 BATCH_STATUS_LOADING "$work/stdout"
health=$("${in_image[@]}" AEP_GATEWAY_ADMIN_LISTEN="$admin" healthcheck 2>&1) || fail "healthcheck: $health"
is healthcheck "$health" ok
is /readyz "$(curl --silent --max-time 5 --noproxy '*' --output /dev/null --write-out '%{http_code}' \
  "http://127.0.0.1:${admin##*:}/readyz")" 200
stop
! "${in_image[@]}" AEP_GATEWAY_ADMIN_LISTEN="$admin" healthcheck 2> "$work/stderr" \
  || fail "healthcheck succeeds though nothing runs"
echo "healthcheck of the stopped gateway: $(cat "$work/stderr")"

# Against the real API's address: it starts only if it finds the CA bundle.
start serve
stop

step "Done"
mkdir -p target/image
cp "$root/aep-batch-gateway" target/image/
echo "OK: the image has $content bytes, of which the program has $binary"
