# shellcheck shell=bash disable=SC2034 # used by those who source this
# What the load tests share. GATEWAY names the program to test; by default it
# is built here. Traffic goes to 127.0.0.1 only.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
tmp=$(mktemp -d)
trap 'end_all; rm -rf "$tmp"' EXIT

cannot() {
    echo "cannot run: $*" >&2
    exit 2
}

command -v curl >/dev/null || cannot "curl is not installed"
if ! command -v h2load >/dev/null; then
    ((UID != 0)) || { apt-get update -qq && apt-get install -y -qq nghttp2-client; } >/dev/null ||
        true
    command -v h2load >/dev/null || cannot "h2load is not installed (Debian: nghttp2-client)"
fi
if [[ -z ${GATEWAY:-} ]]; then
    (cd "$root" && cargo build --release --locked --quiet) || cannot "cargo build failed"
    GATEWAY=${CARGO_TARGET_DIR:-$root/target}/release/aep-batch-gateway
fi
[[ -x $GATEWAY ]] || cannot "no gateway at $GATEWAY"
unset HTTP_PROXY HTTPS_PROXY ALL_PROXY http_proxy https_proxy all_proxy

# A gRPC message: 5 bytes of frame, then dataset_id, which is field 1.
dataset=5c8c3c555033b814b69f947f
printf '\0\0\0\0\x1a\x0a\x18%s' $dataset >"$tmp/message"
headers=(-H 'content-type: application/grpc' -H 'te: trailers'
    -H 'authorization: Bearer load' -H 'x-api-key: load'
    -H 'x-gw-ims-org-id: load@AdobeOrg' -H 'x-sandbox-name: prod')

started=()
end_all() {
    ((${#started[@]} == 0)) || kill "${started[@]}" 2>/dev/null || true
    wait
}

# start NAME ARGUMENT...: starts the program and waits for its first line.
start() {
    local name=$1 i
    shift
    rm -f "$tmp/$name"
    # As in production each call is logged; only nobody keeps it.
    "$GATEWAY" "$@" >"$tmp/$name" 2>/dev/null &
    started+=($!)
    for ((i = 0; i < 100; i++)); do
        [[ -s $tmp/$name ]] && return
        sleep 0.1
    done
    cannot "$name did not start"
}

# value NAME KEY: what that first line says.
value() {
    sed -nE "1s/.*\"$2\":\"([^\"]+)\".*/\1/p" "$tmp/$1"
}

# start_both FAULT_FLAGS...: a simulator whose creates take 100 ms, and a gateway
# that takes 100 at once. So 1000 creates per second is all that it can do, and
# two cores are enough for ten times as many calls and whoever makes them.
capacity=1000
start_both() {
    start simulator simulate --listen 127.0.0.1:0 --latency 100ms "$@"
    start gateway serve --listen 127.0.0.1:0 --admin-listen 127.0.0.1:0 \
        --upstream-url "$(value simulator upstream_url)" \
        --catalog-url "$(value simulator catalog_url)" \
        --max-in-flight 100 --request-timeout 2s
    pid=${started[-1]}
    call="http://$(value gateway listen)/aep.ingestion.v1.BatchService/CreateBatch"
}

# load SECONDS CONNECTIONS STREAMS_EACH [H2LOAD_FLAGS...]
load() {
    local seconds=$1 connections=$2 streams=$3
    shift 3
    h2load -D "$seconds" -c "$connections" -m "$streams" -d "$tmp/message" "${headers[@]}" "$@" \
        "$call" >"$tmp/h2load" || cannot "h2load failed: $(<"$tmp/h2load")"
}

# metric PATTERN: the sum of the gateway's metrics that begin so.
metric() {
    curl -fsS "http://$(value gateway admin)/metrics" |
        awk -v pattern="^$1" '$0 ~ pattern { sum += $NF } END { print sum + 0 }'
}

created() {
    metric 'aep_gateway_creates_total[{]outcome="APPLIED"'
}

# one_call: the grpc-status and the outcome of one call.
one_call() {
    curl -sS --max-time 5 --http2-prior-knowledge --data-binary "@$tmp/message" \
        "${headers[@]}" -o /dev/null -D - "$call" | tr -d '\r' |
        awk '/^grpc-status:/ { s = $2 } /^aep-batch-outcome:/ { o = $2 } END { print s, o }'
}

now() {
    date +%s%3N
}

# until_served: how many milliseconds it takes until a call succeeds.
until_served() {
    local begin
    begin=$(now)
    until [[ $(one_call) == '0 APPLIED' ]]; do
        (($(now) - begin < 10000)) || break
    done
    echo $(($(now) - begin))
}

# sample FILE PAUSE: the gateway's RSS and its peak in KiB, and its open files,
# line by line, until this process is ended.
sample() {
    while true; do
        echo "$(awk '/^VmHWM/ { peak = $2 } /^VmRSS/ { print $2, peak }' "/proc/$pid/status")" \
            "$(find "/proc/$pid/fd" -mindepth 1 | wc -l)"
        sleep "$2"
    done >"$tmp/$1"
}

begin_samples() {
    sample "$@" &
    sampler=$!
}

end_samples() {
    kill "$sampler"
    wait "$sampler" 2>/dev/null || true
}

# fifth FILE COLUMN first|last: minimum, median and maximum.
fifth() {
    local lines count
    lines=$(wc -l <"$tmp/$1")
    count=$(((lines + 4) / 5))
    case $3 in
    first) head -n $count "$tmp/$1" ;;
    last) tail -n $count "$tmp/$1" ;;
    esac | awk -v column="$2" '{ print $column }' | sort -n |
        awk '{ v[NR] = $1 } END { print v[1], v[int((NR + 1) / 2)], v[NR] }'
}

# flat NAME FILE: prints memory and open files, and checks that neither grows.
flat() {
    local name=$1 file=$2 first last
    read -ra first < <(fifth "$file" 1 first)
    read -ra last < <(fifth "$file" 1 last)
    row "$name: RSS in KiB, first fifth" "${first[*]}  (min, median, max)"
    row "$name: RSS in KiB, last fifth" "${last[*]}"
    check "$name: memory is flat" $((last[1] <= first[1] * 11 / 10 + 2048))
    read -ra first < <(fifth "$file" 3 first)
    read -ra last < <(fifth "$file" 3 last)
    row "$name: open files, first fifth" "${first[*]}"
    row "$name: open files, last fifth" "${last[*]}"
    check "$name: open files are flat" $((last[1] <= first[1] * 11 / 10 + 5))
}

row() {
    printf '        %-48s %s\n' "$1" "$2"
}

passed=0 failed=0
# check NAME 0|1
check() {
    if (($2)); then
        passed=$((passed + 1))
        echo "ok      $1"
    else
        failed=$((failed + 1))
        echo "FAILED  $1"
    fi
}

finish() {
    echo "$passed passed, $failed failed"
    ((failed == 0))
}
