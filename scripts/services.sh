#!/usr/bin/env bash
# Installs the servers the tests run against: bash scripts/services.sh
#
# One function per server, named ensure_<server> and listed in main. Each says what it found and does nothing when the
# server is there, so running this again is free. The tests start private copies: nothing is left running.
set -euo pipefail

say() { printf 'services: %s\n' "$*"; }

die() {
    printf 'services: error: %s\n' "$*" >&2
    exit 1
}

is_root() { [ "$(id -u)" -eq 0 ]; }

as_root() {
    if is_root; then
        "$@"
    else
        sudo -n -- "$@"
    fi
}

# apt_or_die <server>: ends with the reason when Debian packages cannot be installed here.
apt_or_die() {
    if ! command -v apt-get >/dev/null; then
        die "$1 is missing and there is no apt-get here: install it by your system's own means"
    fi
    if ! is_root && ! sudo -n true 2>/dev/null; then
        die "$1 is missing: run this as root, or allow sudo without a password"
    fi
}

apt_updated=no

# apt_install <package>...: the package lists are fetched once per run, whatever the number of servers.
apt_install() {
    local options=(-o DPkg::Lock::Timeout=120 -o Acquire::Retries=3)
    if [ "$apt_updated" = no ]; then
        # A broken third-party source must not stop us: if it matters, the installation itself will fail.
        as_root apt-get "${options[@]}" update || say "apt-get update failed; trying with the package lists at hand"
        apt_updated=yes
    fi
    # Set behind sudo, which drops the environment. UCF_FORCE_CONFFOLD: a configuration file of ours is not asked about.
    as_root env DEBIAN_FRONTEND=noninteractive UCF_FORCE_CONFFOLD=1 \
        apt-get "${options[@]}" install -y --no-install-recommends "$@" \
        || die "apt-get could not install: $*"
}

# Prints the folder holding initdb and postgres, which Debian keeps off the PATH; fails when there is none.
# The same search as find_binaries() in tests/servers/postgres.py.
postgresql_bindir() {
    local folder
    while IFS= read -r folder; do
        if [ -x "$folder/initdb" ] && [ -x "$folder/postgres" ]; then
            printf '%s\n' "$folder"
            return 0
        fi
    done < <(
        pg_config --bindir 2>/dev/null || true
        printf '%s\n' /usr/lib/postgresql/*/bin | sort --version-sort --reverse
        if command -v initdb >/dev/null; then
            dirname -- "$(readlink -f -- "$(command -v initdb)")"
        fi
    )
    return 1
}

# Debian's package makes and starts a cluster on the standard port, which nobody here asked for.
# An administrator's own file is left alone.
forbid_default_cluster() {
    local conf=/etc/postgresql-common/createcluster.conf
    if [ -e "$conf" ]; then
        say "$conf is there already and decides about a default cluster"
        return 0
    fi
    as_root mkdir -p "${conf%/*}"
    printf '%s\n' '# Written by scripts/services.sh: the tests start private clusters.' 'create_main_cluster = false' \
        | as_root tee "$conf" >/dev/null
}

ensure_postgresql() {
    local bindir
    if bindir=$(postgresql_bindir); then
        say "PostgreSQL is present: $("$bindir/postgres" --version) in $bindir"
        return 0
    fi
    apt_or_die PostgreSQL
    say "PostgreSQL is missing: installing it"
    forbid_default_cluster
    apt_install postgresql
    bindir=$(postgresql_bindir) || die "PostgreSQL was installed, but initdb and postgres are not to be found"
    say "PostgreSQL is installed: $("$bindir/postgres" --version) in $bindir"
}

main() {
    ensure_postgresql
}

main "$@"
