#!/usr/bin/env bash
# Tests the clients against the gateway's demo: test.sh [PATH OF THE GATEWAY]
# What it installs goes to .test, and is used again by the next run.
set -euo pipefail

BUF=1.75.0
PROTOC_GEN_GO=v1.36.12
PROTOC_GEN_GO_GRPC=v1.6.2

clients=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
gateway=${1:-$clients/../target/debug/aep-batch-gateway}
[[ $gateway == /* ]] || gateway=$PWD/$gateway
tools=$clients/.test
proto=aep/ingestion/v1/batch_service.proto

cannot() {
    echo "cannot run: $*" >&2
    exit 2
}

for program in curl go node npm python3; do
    command -v "$program" >/dev/null || cannot "$program is not installed"
done
python3 -c 'import ensurepip, venv' || cannot "python3 has no venv (Debian: python3-venv)"
[[ -x $gateway ]] || cannot "no gateway at $gateway: run cargo build, or name it as argument"

cd "$clients"
echo "installing"
mkdir -p "$tools"
"$tools/venv/bin/python" -c '' 2>/dev/null || python3 -m venv --clear "$tools/venv"
"$tools/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    -r python/requirements.txt || cannot "pip failed"
npm install --loglevel=error --no-audit --no-fund --no-save --prefix "$tools" \
    "@bufbuild/buf@$BUF" || cannot "npm failed"
export GOBIN=$tools/bin
go install "google.golang.org/protobuf/cmd/protoc-gen-go@$PROTOC_GEN_GO" || cannot "go failed"
go install "google.golang.org/grpc/cmd/protoc-gen-go-grpc@$PROTOC_GEN_GO_GRPC" || cannot "go failed"

echo "generating"
rm -rf python/aep go/gen
"$tools/venv/bin/python" -m grpc_tools.protoc -I ../proto \
    --python_out=python --grpc_python_out=python "$proto"
(cd go && PATH=$GOBIN:$tools/node_modules/.bin:$PATH buf generate)
go -C go build -buildvcs=false -o "$tools/bin/create-batch" .

echo "starting the gateway"
unset AEP_TOKEN AEP_API_KEY AEP_ORG_ID AEP_SANDBOX
export no_proxy=127.0.0.1 NO_PROXY=127.0.0.1
"$gateway" demo --listen 127.0.0.1:0 --admin-listen 127.0.0.1:0 \
    >"$tools/demo.out" 2>"$tools/demo.log" &
demo=$!
trap 'kill "$demo" 2>/dev/null && wait "$demo" || true' EXIT
for ((i = 0; ; i++)); do
    grep -q '^Serving' "$tools/demo.out" && break
    if ((i == 300)) || ! kill -0 "$demo" 2>/dev/null; then
        cat "$tools/demo.out" "$tools/demo.log" >&2
        cannot "the gateway did not start"
    fi
    sleep 0.1
done
address=$(sed -nE '1s/.*"listen":"([^"]+)".*/\1/p' "$tools/demo.out")
simulator=$(sed -nE 's|.*(http://.*/_simulator)/faults.*|\1|p' "$tools/demo.out")

# The number of things in the JSON array that the simulator answers with.
count() {
    curl -fsS "$@" | python3 -c '
import json, sys
answer = json.load(sys.stdin)
print(len(answer["waiting"] if "waiting" in answer else answer))'
}

passed=0 failed=0
# check NAME, FAULTS, EXIT CODE, NEW BATCHES, PATTERN OF THE OUTPUT, COMMAND...
# Passes if the command met all the faults and had the rest as its result.
check() {
    local name=$1 faults=$2 code=$3 batches=$4 pattern=$5
    shift 5
    curl -fsS -o /dev/null -d "$faults" "$simulator/faults"
    local before after waiting said got=0
    before=$(count "$simulator/batches")
    said=$("$@" 2>&1) || got=$?
    after=$(count "$simulator/batches")
    waiting=$(count -d '' "$simulator/faults")
    curl -fsS -o /dev/null -X DELETE "$simulator/faults"
    if ((got == code && after - before == batches && waiting == 0)) && [[ $said =~ $pattern ]]; then
        passed=$((passed + 1))
        echo "ok      $name"
    else
        failed=$((failed + 1))
        echo "FAILED  $name"
        echo "  expected: exit $code, $batches new batches, no fault left, output like $pattern"
        echo "  got: exit $got, $((after - before)) new batches, $waiting faults left, output:"
        printf '  %s\n' "${said//$'\n'/$'\n'  }"
    fi
}

check_client() {
    local name=$1
    shift
    local created='^[^ ]+ BATCH_STATUS_LOADING$'
    check "$name: a batch is created" "" 0 1 "$created" "$@"
    check "$name: a lost answer is reported and not retried" reset-after-create 1 1 \
        '^UNKNOWN CONNECTION_LOST UNKNOWN: .*look for it' "$@"
    check "$name: UNAVAILABLE is retried" "status-503 status-503" 0 1 "$created" "$@"
    check "$name: a missing token is reported" "" 1 0 \
        '^INVALID_ARGUMENT INVALID_REQUEST NOT_CREATED: .*may be repeated' \
        env AEP_TOKEN= "$@"
}

# readme LANGUAGE: the program in that language in the README, for this address
readme() {
    sed -n "/^\`\`\`$1\$/,/^\`\`\`\$/p" ../README.md | sed '1d;$d' | sed "s/127.0.0.1:50051/$address/"
}
mkdir -p go/readme
readme python >python/readme.py
readme go >go/readme/main.go
go -C go build -buildvcs=false -o "$tools/bin/readme" ./readme
check "README: python" "" 0 1 '^[0-9a-f]{32}$' "$tools/venv/bin/python" python/readme.py
check "README: go" "" 0 1 '^[0-9a-f]{32}$' "$tools/bin/readme"

check_client python "$tools/venv/bin/python" python/create_batch.py "$address"
check_client go "$tools/bin/create-batch" "$address"

echo "$passed passed, $failed failed"
((failed == 0))
