# `make` lists the targets. Their output is below bin/ and build/; build/ also caches downloads.

# A toolchain that packaging/bootstrap has fetched takes precedence over an older one on the machine.
export PATH := $(CURDIR)/build/go/bin:$(PATH)

VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
MODULE  := github.com/kata-checkpoint/kata-checkpoint

LDFLAGS := -s -w -X $(MODULE)/internal/version.Version=$(VERSION)
GOBUILD := CGO_ENABLED=0 go build -trimpath -buildvcs=false -ldflags '$(LDFLAGS)'
# What the tests run can be stopped at each phase (internal/stopat). What is installed cannot: see the target release.
HOOKS   := -tags testhooks
RELEASE := build/release
# $(call helper,DIRECTORY): builds a C program, for the guest. Another architecture needs its compiler:
# make GOARCH=arm64 CC=aarch64-linux-gnu-gcc.
helper   = $(CC) -static -O2 -s -Wall -Wextra -Werror -fstack-protector-strong -o $(1)/kata-checkpoint-helper guestagent/helper/helper.c

# $(call launcher,DIRECTORY): builds the program that becomes CRIU, for the guest.
launcher = $(GOBUILD) -o $(1)/kata-checkpoint-launcher ./guestagent/launcher

# Go modules with packages of their own: the product, what tests it, the stand-in for Kata.
MODULES  := . integration integration/standin
# The stand-in for Kata has the name of Kata's own shim: it must not be found beside ours on a PATH.
STANDIN  := integration/standin/cmd/containerd-shim-kata-v2
COMMANDS := $(filter-out $(STANDIN)/,$(dir $(wildcard cmd/*/main.go integration/cmd/*/main.go integration/standin/cmd/*/main.go)))
# $(call commands,MODULE): the commands in a module, as packages.
commands  = $(addprefix ./,$(patsubst $(1)/%,%,$(filter $(1)/cmd/%,$(COMMANDS))))

# Each scenario has its own time, which grows with what a VM takes to start on
# the machine; this is for what none of them notices.
E2E_TIMEOUT ?= 6h
# The race detector needs a C compiler; RACE= does without.
RACE ?= -race

# RUN=NAME is one scenario; APPS=1 those with applications; CORE=1 the core set; KATA=DIR runs on the Kata in DIR
# in place of the stand-in; GUEST_KERNEL=FILE boots that kernel (make guest-kernel: build/guest-kernel/vmlinuz-kata-checkpoint);
# OPERATOR=FILE is the program of checkpoint-restore-operator (docs/retention.md), for the scenario of that name.
SCENARIO := $(if $(RUN),-run 'TestScenario/$(RUN)$$',$(if $(APPS),-run 'TestScenario/app-'))
E2E_ENV   = $(if $(KATA),TESTBED_KATA=$(abspath $(KATA))) $(if $(CORE),TESTBED_CORE=1) $(if $(GUEST_KERNEL),TESTBED_GUEST_KERNEL=$(abspath $(GUEST_KERNEL))) $(if $(OPERATOR),TESTBED_OPERATOR=$(abspath $(OPERATOR)))

.DEFAULT_GOAL := help
# Targets compete for the machine when they build and boot; go build is parallel on its own.
.NOTPARALLEL:
.DELETE_ON_ERROR:

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "%-14s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

.PHONY: bootstrap
bootstrap: ## install what is missing on a Debian 12 machine, Go included (as root)
	packaging/bootstrap test

.PHONY: build
build: ## build all binaries into bin/, for tests: with test hooks
	$(GOBUILD) $(HOOKS) -o bin/ $(addprefix ./,$(filter cmd/%,$(COMMANDS)))
	$(call launcher,bin)
	cd integration && $(GOBUILD) -o $(CURDIR)/bin/ $(call commands,integration)
	cd integration/standin && $(GOBUILD) -o $(CURDIR)/bin/ $(call commands,integration/standin)
	$(call helper,bin)
	cd integration/standin && $(GOBUILD) -o $(CURDIR)/bin/standin/go/ $(STANDIN:integration/standin/%=./%)
	mkdir -p bin/standin/rust && ln -f bin/standin/go/containerd-shim-kata-v2 bin/standin/rust/

# Rebuilt when its recipe changes; remove build/criu to take newer packages from Debian.
build/criu/MANIFEST: $(wildcard internal/cmd/criu-bundle/*.go internal/debian/*)
	go run ./internal/cmd/criu-bundle -cache build/apt/forky -out build/criu

.PHONY: guest-bundle
guest-bundle: build/criu/MANIFEST ## build the guest bundle into build/guest-bundle, for tests: with test hooks
	$(GOBUILD) $(HOOKS) -o bin/ ./cmd/kata-checkpoint-agent
	$(call launcher,bin)
	$(call helper,bin)
	packaging/guest-bundle bin build/criu build/guest-bundle

.PHONY: release
release: hooks build/criu/MANIFEST ## build what is installed, without test hooks: build/release/bin and build/release/guest-bundle
	$(GOBUILD) -o $(RELEASE)/bin/ ./cmd/kata-checkpoint ./cmd/containerd-shim-kata-checkpoint-v2 ./cmd/kata-checkpoint-nri ./cmd/kata-checkpoint-agent
	$(call launcher,$(RELEASE)/bin)
	$(call helper,$(RELEASE)/bin)
	packaging/guest-bundle $(RELEASE)/bin build/criu $(RELEASE)/guest-bundle

.PHONY: hooks
hooks: ## check that what is installed has no test hooks
	go test -count=1 -run TestReleaseHasNoHooks ./internal/stopat

FUZZTIME ?= 30s

.PHONY: fuzz
fuzz: ## run each fuzz target for FUZZTIME (RUN=NAME one of them); what fails becomes a seed in testdata/fuzz, and a test
	git grep -E '^func $(or $(RUN),Fuzz)' -- '*_test.go' | sed -E 's|^(.*)/[^/]*:func ([A-Za-z]+).*|\1 \2|' | while read -r dir target; do \
	  echo "== $$dir $$target"; (cd "$$dir" && go test $(HOOKS) -run '^$$' -fuzz "^$$target\$$" -fuzztime $(FUZZTIME) .) || exit; done

.PHONY: test
test: CORE = 1
test: bootstrap build guest-bundle unit e2e ## from nothing: install, build, run the unit tests and the core scenarios (what CI runs)

.PHONY: test-all
test-all: bootstrap build guest-bundle unit e2e ## the same with all scenarios, on both ways of the stand-in

.PHONY: unit
unit: ## run the tests of the packages
	for module in $(MODULES); do (cd $$module && go test $(RACE) $(HOOKS) $$(go list ./... | grep -vx '$(MODULE)/integration')) || exit; done

.PHONY: testbed
testbed: build guest-bundle ## make what VMs are started from; DIR=D starts a testbed in D: eval its output (KATA= as for e2e)
	@bin/testbed build >&2
	@$(if $(DIR),bin/testbed up --dir $(DIR) $(if $(KATA),--kata $(KATA)))

.PHONY: demo
demo: ## from nothing: install, build, and show a checkpoint and a restore (KATA= as for e2e)
	@KATA=$(abspath $(KATA)) MAKEFLAGS= integration/demo

.PHONY: e2e
e2e: testbed ## run the scenarios in VMs: RUN=NAME one of them, APPS=1 the applications, CORE=1 the core set, KATA=DIR on real Kata
	cd integration && $(E2E_ENV) go test . -count=1 -parallel 2 -v -timeout $(E2E_TIMEOUT) $(SCENARIO)

.PHONY: kubelet
kubelet: build ## build the kubelet that the scenario kubelet-checkpoint-api runs (ten minutes)
	bin/testbed build-kubelet

.PHONY: docker
docker: build ## build the docker that the scenario docker-life runs (five minutes), and install what it needs
	packaging/bootstrap docker
	bin/testbed build-docker

.PHONY: bench
bench: testbed ## measure checkpoints over bare dumps, calls and execs through the shim over those past it
	cd integration && go test ./bench -run '^$$' -bench . -benchtime 10x -timeout 60m $(if $(KATA),-kata $(abspath $(KATA)))

.PHONY: notice
notice: build/criu/MANIFEST ## write NOTICE: the licences of what the binaries and the guest bundle contain
	CGO_ENABLED=0 go run ./internal/cmd/notice

SCRIPTS := $(shell git ls-files | xargs grep -lIE '^\#!/bin/(ba)?sh' 2>/dev/null)

.PHONY: lint
lint: bootstrap style drift hooks vulnerabilities ## run every static check: style, imports, links, drift of generated files, test hooks, known vulnerabilities

# Directories, separated by commas, in which retired words are only counted: none.
VOCABULARY_LATER :=
VOCABULARY_FILES := ':!docs/glossary.md' ':!internal/cmd/vocabulary' ':!*.pb.go' ':!*go.sum' ':!LICENSE' ':!NOTICE'

.PHONY: style
style: ## check style, imports, vocabulary, shell scripts and the links of the documentation
	packaging/bootstrap lint
	go build -modfile=internal/tools/go.mod -o build/tools/ github.com/golangci/golangci-lint/v2/cmd/golangci-lint
	for module in $(MODULES); do (cd $$module && $(CURDIR)/build/tools/golangci-lint run) || exit; done
	shellcheck $(SCRIPTS)
	@! git grep -L 'SPDX-License-Identifier: Apache-2.0' -- '*.go' '*.c' '*.proto' $(SCRIPTS) ':!*.pb.go' || { echo 'these files lack a line SPDX-License-Identifier: Apache-2.0'; exit 1; }
	@! git grep -nE '^\s*<-time\.After\(' -- '*.go' || { echo 'wait for the condition itself, with a deadline'; exit 1; }
	go run ./internal/cmd/doclinks $$(git ls-files '*.md')
	go run ./internal/cmd/vocabulary -report-only '$(VOCABULARY_LATER)' $$(git ls-files $(VOCABULARY_FILES))

.PHONY: drift
drift: build/criu/MANIFEST ## check that generated code and NOTICE are what their sources generate
	packaging/bootstrap proto
	packaging/drift

.PHONY: vulnerabilities
vulnerabilities: ## check dependencies for known vulnerabilities, where the database can be reached
	packaging/vulnerabilities

.PHONY: check
check: build style ## what a contributor runs before a push: no root, no VM, two minutes
	for module in $(MODULES); do (cd $$module && CGO_ENABLED=0 go test -short $(HOOKS) ./...) || exit; done

.PHONY: cover
cover: ## run the unit tests and show their coverage: build/coverage.html
	mkdir -p build
	CGO_ENABLED=0 go test -short $(HOOKS) -coverprofile=build/coverage.out ./...
	go tool cover -func=build/coverage.out | tail -n 1
	go tool cover -html=build/coverage.out -o build/coverage.html

PREFIX      ?= /usr/local
GUESTBUNDLE ?= /opt/kata-checkpoint/guest

.PHONY: install
install: release ## install the shim, the NRI plugin, the command line and the guest bundle: PREFIX=/usr/local, DESTDIR= for packages
	install -d $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(GUESTBUNDLE)
	install $(RELEASE)/bin/kata-checkpoint $(RELEASE)/bin/containerd-shim-kata-checkpoint-v2 $(RELEASE)/bin/kata-checkpoint-nri $(DESTDIR)$(PREFIX)/bin/
	cp -a $(RELEASE)/guest-bundle/. $(DESTDIR)$(GUESTBUNDLE)/
	install -d $(DESTDIR)$(PREFIX)/share/doc/kata-checkpoint
	cp -R configs README.md LICENSE NOTICE $(DESTDIR)$(PREFIX)/share/doc/kata-checkpoint/

KERNEL_FLAGS = $(if $(KATA_SRC),--kata-src $(abspath $(KATA_SRC))) $(if $(KATA_CONFIG),--kata-config $(abspath $(KATA_CONFIG))) $(if $(CONFIG_ONLY),--config-only)

.PHONY: guest-kernel
guest-kernel: build ## build a guest kernel from Debian's sources: KATA_SRC=DIR or KATA_CONFIG=FILE, CONFIG_ONLY=1 only configures it
	packaging/bootstrap kernel
	bin/kata-checkpoint guest-kernel --out build/guest-kernel $(KERNEL_FLAGS)

.PHONY: packages
packages: release ## make the packages of a release in build/packages: .deb, .rpm, a tarball, SBOM, checksums
	go build -modfile=internal/tools/go.mod -o build/tools/ github.com/goreleaser/nfpm/v2/cmd/nfpm
	packaging/packages $(VERSION) $(shell go env GOARCH) build/packages

.PHONY: proto
proto: ## generate the protocols' Go code
	packaging/bootstrap proto
	go build -o build/tools/ google.golang.org/protobuf/cmd/protoc-gen-go github.com/containerd/ttrpc/cmd/protoc-gen-go-ttrpc
	PATH=$(CURDIR)/build/tools:$$PATH protoc --go_out=. --go_opt=paths=source_relative \
		--go-ttrpc_out=. --go-ttrpc_opt=paths=source_relative $(wildcard internal/api/*.proto integration/standin/api/*.proto)

.PHONY: clean
clean: ## remove what was built; downloads stay (remove build/ for those)
	rm -rf bin $(RELEASE) build/guest-bundle build/criu build/tools
