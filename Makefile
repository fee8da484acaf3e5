# Every chore is a command of `cargo xtask`; these are the ones people start with.

.PHONY: help demo test bench install linker

help:
	@echo 'make demo     see docker run a container in a microVM, from a fresh clone'
	@echo 'make test     every check and test; what CI runs'
	@echo 'make bench    measure beside dockerd, and Firecracker or QEMU; writes target/bench/results.json'
	@echo 'make install  install programs, guest kernel and systemd unit (PREFIX, DESTDIR)'
	@echo 'cargo xtask help lists every chore'

demo: linker
	cargo xtask demo

test: linker
	cargo xtask test

bench: linker
	cargo xtask bench

PREFIX ?= /usr
install: linker
	cargo xtask install --prefix $(PREFIX) $(if $(DESTDIR),--destdir $(DESTDIR))

# Rust links with the system's compiler, which a fresh Debian lacks. `cargo xtask deps` sees to all else.
linker:
	@command -v cc >/dev/null || { apt-get update -q && apt-get install -q -y --no-install-recommends gcc libc6-dev; }
