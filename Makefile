# The verbs of this project. Each is one line; the work is done by cargo and the scripts in hack/.
export CARGO_TARGET_DIR ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/stave/target-$(shell printf %s "$$PWD" | cksum | cut -d" " -f1)

.DEFAULT_GOAL := help
.PHONY: help build release test lint fmt bench conformance quickstart

help: ## Show this list.
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

build: ## Build both binaries, quick to compile.
	hack/build --dev

release: ## Build both binaries as they are shipped.
	hack/build --release

test: ## Install what the tests need and run all of them (root, Debian 12).
	hack/test

lint: ## Check format, lints, and (where cargo-deny is installed) licences and advisories.
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked -- -D warnings
	@if command -v cargo-deny >/dev/null; then cargo deny check; else echo "SKIPPED: cargo-deny is not installed" >&2; fi

fmt: ## Format all of the code.
	cargo fmt --all

bench: ## Measure against containerd (root).
	hack/bench

conformance: ## Run critest; FOCUS="PodSandbox" for a part (root).
	hack/conformance $(if $(FOCUS),"$(FOCUS)")

quickstart: ## From nothing to a running pod; IMAGE=... for a public image (root, Debian 12).
	hack/quickstart $(IMAGE)
