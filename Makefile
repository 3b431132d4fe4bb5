# What there is to do: build, test, demo, bench, fuzz, record.

GO ?= go
FUZZTIMES ?= 1
# Debian suites whose QEMUs and libvirts are tested besides the system's, such as
# SUITES="trixie forky".
SUITES ?=
SUITE ?= host
# Where make install puts things, below DESTDIR if that is set.
PREFIX ?= /usr/local
DESTDIR ?=
# What --version says, and the packages are called.
VERSION ?= $(shell scripts/version)

.PHONY: all go build pages install deb rpm test-package test test-qemu test-libvirt test-apparmor check lint race unit replay fuzz demo bench eval-workingset record clean

all: build

# Go is there, and is new enough; or else one line says what to install, before anything
# else is done.
go:
	@GO=$(GO) scripts/deps go

# Without cgo: one static binary, which the dynamic linker does not hold up.
build: go
	CGO_ENABLED=0 $(GO) build -ldflags '-X main.release=$(VERSION)' -o bin/flic-migrate ./cmd/flic-migrate

# Man pages, and the settings file with every key, made of the verbs themselves.
pages: go
	$(GO) test ./cmd/flic-migrate -count=1 -run '^TestPages$$' -pages $(CURDIR)/bin/pages

# After make build pages, which need no root.
install:
	scripts/package/install $(PREFIX) $(DESTDIR)

# Packages, into bin/packages.
deb rpm: build pages
	GO=$(GO) scripts/package/build $(VERSION) $@

# The packages in a bare Debian 12, and in one with systemd, QEMU and libvirt: installed,
# used and removed. Some two minutes, and two more to make these systems once.
test-package: deb rpm
	scripts/deps qemu guest
	scripts/package/test bin/packages/*.deb bin/packages/*.rpm

# Installs what is missing, then runs every test, those with a real QEMU
# included, on the system's and on those of the suites, a short fuzz run of each
# parser, and the recorded streams.
test: go
	scripts/deps
	$(MAKE) check unit test-qemu fuzz replay SUITE="host $(SUITES)"
	[ -z "$(strip $(SUITES))" ] || $(MAKE) test-libvirt SUITE="$(SUITES)"

# What a commit passes: form, vet, staticcheck (its version is go.mod's), and the
# tests that need no QEMU under the race detector.
check: lint race

lint: go
	@fmt=$$(gofmt -l $$(git ls-files '*.go')); [ -z "$$fmt" ] || { echo "not gofmt'ed: $$fmt"; exit 1; }
	$(GO) vet ./...
	$(GO) tool staticcheck ./...

race: go
	scripts/deps ssh race
	GO=$(GO) scripts/tests race

unit: go
	scripts/deps ssh
	GO=$(GO) scripts/tests plain

replay: build
	bin/flic-migrate replay testdata/*.stream.zst
	bin/flic-migrate replay --hot-every 3 testdata/*.stream.zst

# Each fuzz test for some seconds: make fuzz FUZZTIMES=100 for a hundred times that.
fuzz: go
	scripts/fuzz $(FUZZTIMES)

# The tests that boot a QEMU: on the system's, or on a Debian suite's, such as
# make test-qemu SUITE=trixie, or on several.
test-qemu: go
	scripts/deps qemu qemu-aarch64 guest libvirt bench
	GO=$(GO) scripts/tests qemu $(SUITE)

# The tests of libvirt, on a Debian suite's libvirt and QEMU: make test-libvirt
# SUITE=trixie, or several. Some three minutes each.
test-libvirt: go
	scripts/deps qemu guest
	GO=$(GO) scripts/tests libvirt $(SUITE)

# What libvirt install does under an enforcing AppArmor, in a VM with a Debian suite's
# kernel, profiles and libvirt. Some five minutes, emulated: no part of make test.
test-apparmor: build
	scripts/deps qemu guest
	scripts/apparmor $(SUITE) bin/flic-migrate

# Tells the whole story on a guest, in one screen and about a minute.
demo: build
	scripts/deps qemu guest bench
	$(GO) run ./scripts/demo

bench: build
	scripts/deps qemu guest bench
	$(GO) run ./scripts/bench
	$(GO) test -run '^$$' -bench . -benchtime 1s ./stream/... ./ramparse/... ./tier/...

# How good the working sets are that tracking finds, for four workloads.
eval-workingset: go
	scripts/deps qemu guest
	$(GO) run ./scripts/workingset

# Records testdata's streams again.
record: go
	scripts/deps qemu qemu-aarch64 guest
	$(GO) run ./scripts/record

clean:
	rm -rf bin
