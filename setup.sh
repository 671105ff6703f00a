#!/usr/bin/env bash
# Puts coap_websocket on a Raspberry Pi, or takes it away without a trace: sudo bash setup.sh [--help]
#
# Everything is checked, asked for and prepared in a private folder before the first change; every file is replaced
# by one rename. So it can be interrupted anywhere and simply run again. What was there before the first run is kept
# in /var/lib/coap_websocket-setup, from where --uninstall puts it back.

[ -n "${BASH_VERSION:-}" ] || { echo "setup.sh: this needs bash: sudo bash setup.sh" >&2; exit 1; }
set -eu
umask 077
export LC_ALL=C.UTF-8

usage() {
    cat <<'END'
sudo bash setup.sh [OPTION]...

  --address ADDR/LEN   IPv6 address of the gateway (2001:470:7347:c810::1234/64)
  --interface IF       network interface of the motes (usb0)
  --token-file F       the bot token is the first line of F; "-" asks for a new one
  --password-file F    the same for the password of the bot's config messages
  --dry-run            say what would be done, change nothing
  --uninstall          put everything back as it was before the first run
  --help

Without these files the token and the password come from the environment (BOT_TOKEN, PASSWORD), else from the last
installation, else they are asked for. Address and interface stay as they were last set.
END
}

binary=/usr/local/bin/coap_websocket
unit=/etc/systemd/system/coap_websocket.service
etc=/etc/coap_websocket
connection=/etc/NetworkManager/system-connections/coap_websocket.nmconnection
rclocal=$(readlink -f /etc/rc.local)
saved=/var/lib/coap_websocket-setup        # what was there before the first run
stage=/var/lib/coap_websocket-setup.new    # what this run prepares; not in /run or /tmp, where programs may not run
pending=/run/coap_websocket-setup.restart  # exists while the service still runs with what was there before
mark='# coap_websocket'                    # ends each of our lines in rc.local

main() {
    local address='' interface='' token_file='' password_file='' dry=false uninstall=false
    while [ $# -gt 0 ]; do
        case $1 in
            --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}"; continue ;;
            --help) usage; return ;;
            --dry-run) dry=true; shift; continue ;;
            --uninstall) uninstall=true; shift; continue ;;
            --address | --interface | --token-file | --password-file) ;;
            *) printf 'setup.sh: unknown option %s; see bash setup.sh --help\n' "$1" >&2; exit 2 ;;
        esac
        [ -n "${2:-}" ] || { printf 'setup.sh: %s needs a value; see bash setup.sh --help\n' "$1" >&2; exit 2; }
        case $1 in
            --address) address=$2 ;;
            --interface) interface=$2 ;;
            --token-file) token_file=$2 ;;
            --password-file) password_file=$2 ;;
        esac
        shift 2
    done

    local here live=false explained=false
    here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
    [ "$(id -u)" = 0 ] || die "not root: run sudo bash setup.sh"
    command -v systemctl >/dev/null || die "no systemctl: this needs a system that runs systemd"
    command -v ip >/dev/null || die "no ip command: run apt install iproute2"
    # Not so while an image for a Pi is being made in a chroot: then the files are installed, for the Pi's first boot.
    [ -d /run/systemd/system ] && live=true
    trap finish EXIT
    rm -rf "$stage"
    mkdir "$stage" || die "cannot write to /var/lib: is the file system read-only? (raspi-config: Overlay File System)"
    if $uninstall; then uninstall; else install; fi
}

die() {
    explained=true
    printf 'setup.sh: %s\n' "$*" >&2
    exit 1
}

finish() {
    local status=$?
    rm -rf "$stage"
    if [ $status -ne 0 ] && ! $explained; then
        echo "setup.sh: stopped before the end; mend what was said above, then run the same command again" >&2
    fi
}

# change WHAT PARTICIPLE COMMAND...: does it and says so, or says that it would.
change() {
    local what=$1 participle=$2
    shift 2
    if $dry; then
        echo "$what: would be $participle"
    else
        "$@"
        echo "$what: $participle"
    fi
}

# ---- install ---------------------------------------------------------------------------------------------------

install() {
    local given_token=${BOT_TOKEN:-} given_password=${PASSWORD:-}
    unset BOT_TOKEN PASSWORD  # not for our children
    local old_address='' old_interface='' listen='' manager=false version='' firmware='' token='' password=''
    choose_address
    check_places
    prepare_binary
    cp "$here/coap_websocket.service" "$stage/unit"
    render_rclocal "$rclocal" >"$stage/rc.local"
    prepare_connection
    prepare_settings

    $dry || save_what_is_there
    [ -d "$etc" ] || change "$etc" created mkdir -m 755 "$etc"
    place binary "$binary" 755 restart
    place unit "$unit" 644 restart
    place config.ini "$etc/config.ini" 600 restart
    place env "$etc/.env" 600 restart
    place_in_firmware
    place_rclocal
    place_address
    start
    report
}

choose_address() {
    [ -n "$address$interface" ] && listen=anew
    [ ! -e "$rclocal" ] || find_our_address "$rclocal"
    address=${address:-${old_address:-2001:470:7347:c810::1234/64}}
    interface=${interface:-${old_interface:-usb0}}
    [[ $address =~ ^[[:xdigit:]]*:[[:xdigit:]:.]*/[0-9]+$ ]] && ip -6 addr show to "$address" >/dev/null 2>&1 ||
        die "$address is not an IPv6 address with its prefix length, such as 2001:470:7347:c810::1234/64"
    [[ $interface =~ ^[A-Za-z0-9_][A-Za-z0-9_.-]{0,14}$ ]] || die "$interface is not the name of an interface, such as usb0"
}

# The address and the interface that our line in this rc.local names.
find_our_address() {
    local line
    while IFS= read -r line || [ -n "$line" ]; do
        if [[ $line =~ ^ip\ -6\ addr\ add\ ([^ ]+)\ dev\ ([^ ]+)\ .*"$mark"$ ]]; then
            old_address=${BASH_REMATCH[1]} old_interface=${BASH_REMATCH[2]}
        fi
    done <"$1"
}

check_places() {
    local dir
    for dir in /usr/local/bin /etc/systemd/system; do
        [ -w "$dir" ] || die "cannot write to $dir: is the file system read-only? (raspi-config: Overlay File System)"
    done
    [ -f "$here/coap_websocket.service" ] ||
        die "coap_websocket.service is not beside setup.sh: copy the whole folder, then run it there"
    [ ! -e "$rclocal" ] || [ -f "$rclocal" ] || die "$rclocal is not a file: move it away, then run this again"
}

prepare_binary() {
    local source=$here/coap_websocket owner
    [ -f "$source" ] || source=$here/target/release/coap_websocket
    if [ ! -f "$source" ]; then
        # By the owner of the sources: it is their cargo, and root should own nothing in target/.
        owner=$(stat -c %U "$here/Cargo.toml" 2>/dev/null) &&
            runuser -l "$owner" -s /bin/sh -c 'command -v cargo' >/dev/null 2>&1 ||
            die 'no coap_websocket beside setup.sh and no cargo to build it: see "Getting the binary" in README.md'
        if $dry; then
            echo "$source: would be built"
            return
        fi
        echo "$source: building, which takes some minutes on a Pi"
        # shellcheck disable=SC2016 # expands in the inner shell
        runuser -l "$owner" -s /bin/sh -c 'cd "$0" && cargo build --release --locked' "$here" ||
            die "cargo could not build it: mend what it says above, then run this again"
    fi
    # Not uname -m: it names the kernel, which may be a 64-bit one under a 32-bit system.
    [ "$(abi "$source")" = "$(abi /bin/sh)" ] ||
        die "$source is no program for this system ($(dpkg --print-architecture)): see \"Getting the binary\" in README.md"
    cp "$source" "$stage/binary"
    chmod 700 "$stage/binary"
    version=$(timeout 10 "$stage/binary" --version 2>&1 </dev/null) ||
        die "$source does not run here (${version##*$'\n'}): see \"Getting the binary\" in README.md"
}

# The bytes of an ELF file that tell its class, byte order and machine.
abi() {
    local head
    head=$(od -An -v -tx1 -N20 "$1" | tr -d ' \n')
    printf '%s' "${head:0:12}${head:36:4}"
}

prepare_connection() {
    if $live; then
        systemctl is-active -q NetworkManager && manager=true
    else
        systemctl is-enabled -q NetworkManager 2>/dev/null && manager=true
    fi
    $manager || [ -e "$connection" ] || return 0
    printf '%s\n' '[connection]' id=coap_websocket type=ethernet "interface-name=$interface" autoconnect-priority=10 '' \
        '[ipv4]' method=disabled '' '[ipv6]' method=manual "address1=$address" >"$stage/connection"
}

# ---- install: config.ini and .env ------------------------------------------------------------------------------

prepare_settings() {
    local installed
    installed=$(value_of "$etc/config.ini" telegram bot_token)
    ask token "bot token" "$token_file" "$given_token" "$installed" is_token \
        "as BotFather shows it: digits, a colon and 35 letters"
    installed=$(value_of "$etc/.env" '' PASSWORD)
    ask password password "$password_file" "$given_password" "$installed" is_password \
        "8 characters or more, without white space"
    with_value "$etc/config.ini" telegram bot_token "$token" >"$stage/config.ini"

    # The gateway takes a pair of quotes around a value away.
    [[ $password != [\'\"]* ]] || password=\"$password\"
    with_value "$etc/.env" '' PASSWORD "$password" >"$stage/env"
    # What somebody wrote there by hand stays (:: for every interface) until another address is asked for.
    if [ -n "$listen" ] || [ -z "$(value_of "$stage/env" '' COAP_SERVER_IP)" ]; then
        listen=${address%/*}
        [[ ${listen,,} != fe[89ab]?:* ]] || listen+=%$interface
        with_value "$stage/env" '' COAP_SERVER_IP "$listen" >"$stage/env.listen"
        mv "$stage/env.listen" "$stage/env"
    fi

    firmware=$here/../src
    if [ -e "$firmware/config.ini.template" ]; then
        firmware=$(cd "$firmware" && pwd)
    else
        firmware=''
    fi
}

is_token() { [[ $1 =~ ^[0-9]+:[A-Za-z0-9_-]{30,}$ ]]; }
is_password() { [ ${#1} -ge 8 ] && [[ ! $1 =~ [[:space:][:cntrl:]] ]]; }

# ask VARIABLE NAME FILE GIVEN INSTALLED VALID RULE: sets the variable from the file, else from what the environment
# gave, else from what is installed, else from the terminal.
ask() {
    local -n answer=$1
    local name=$2 file=$3 given=$4 installed=$5 valid=$6 rule=$7 silent=''
    if [ -n "$file" ] && [ "$file" != - ]; then
        given=''
        { IFS= read -r given || [ -n "$given" ]; } <"$file" || die "cannot read the $name from $file"
        given=${given%$'\r'}
    fi
    if [ "$file" != - ] && [ -n "$given" ]; then
        "$valid" "$given" || die "that is no $name ($rule): nothing was changed"
        answer=$given
    elif [ "$file" != - ] && "$valid" "$installed"; then
        answer=$installed
    elif [ ! -t 0 ]; then
        die "no $name and no terminal to ask for it: write it to a file, then run this with --${name#bot }-file FILE"
    elif $dry; then
        echo "$name: would be asked for"
    else
        [ "$name" != password ] || silent=-s
        while :; do
            printf '%s (%s): ' "${name^}" "$rule" >&2
            IFS= read -r $silent answer || die "no $name: nothing was changed"
            [ -z "$silent" ] || echo >&2
            ! "$valid" "$answer" || break
            echo "That is not it." >&2
        done
    fi
}

# Looks for KEY in a section of FILE (no section: the whole file). Sets `lines`, `at`: the index of its last line,
# `head`: that of the section's header, and `value`.
find_key() {
    local file=$1 section=$2 key=$3 now='' i
    lines=() at='' head='' value=''
    [ ! -e "$file" ] || mapfile -t lines <"$file"
    for i in "${!lines[@]}"; do
        if [[ -n $section && ${lines[i]} =~ ^[[:space:]]*\[[[:space:]]*(.*[^[:space:]])[[:space:]]*\] ]]; then
            now=${BASH_REMATCH[1]}
            [ "$now" != "$section" ] || head=$i
        elif [[ $now = "$section" && ${lines[i]} =~ ^[[:space:]]*(export[[:space:]]+)?([A-Za-z0-9_]+)[[:space:]]*=[[:space:]]*(.*)$ ]] &&
            [ "${BASH_REMATCH[2],,}" = "${key,,}" ]; then
            at=$i value=${BASH_REMATCH[3]}
        fi
    done
    value=${value%"${value##*[![:space:]]}"}
}

# value_of FILE SECTION KEY
value_of() {
    local lines at head value
    find_key "$@"
    [[ ! $value =~ ^(\"(.*)\"|\'(.*)\')$ ]] || value=${BASH_REMATCH[2]}${BASH_REMATCH[3]}
    printf '%s' "$value"
}

# with_value FILE SECTION KEY VALUE: the text of FILE with that value, everything else as it is.
with_value() {
    local lines at head value line
    find_key "$1" "$2" "$3"
    line=$3=$4
    [ -z "$2" ] || line="$3 = $4"
    if [ -n "$at" ]; then
        lines[at]=$line
    elif [ -n "$head" ]; then
        lines[head]+=$'\n'$line
    else
        [ -z "$2" ] || lines+=("[$2]")
        lines+=("$line")
    fi
    printf '%s\n' "${lines[@]}"
}

# ---- install: rc.local -----------------------------------------------------------------------------------------

# render_rclocal FILE: its text with our lines before the one `exit 0` at its end.
render_rclocal() {
    local file=$1 lines=() line dead=false
    local add="ip -6 addr add $address dev $interface"
    if [ -e "$file" ]; then
        tr -d '\0' <"$file" | cmp -s - "$file" || die "$file is not a text file: move it away, then run this again"
        mapfile -t lines <"$file"
    fi
    if [[ ${lines[0]:-} != '#!'* ]]; then
        lines=('#!/bin/sh' "${lines[@]}")
    elif [[ ! ${lines[0]} =~ ^'#!'\ *(/usr)?/bin/(env\ +)?(ba|da)?sh(\ .*)?$ ]]; then
        die "$file is not a shell script (${lines[0]}): move it away, then run this again"
    fi

    for line in "${lines[@]}"; do
        [[ ! $line =~ ^exit([[:space:]\;]|$) ]] || dead=true
        if ! $dead && [[ $line =~ ^[[:space:]]*"$add"([[:space:]\;|]|$) ]]; then
            printf '%s\n' "${lines[@]}"  # ours, or written by hand
            return
        fi
    done

    without_our_lines
    without_last_exit
    for line in "${lines[@]}"; do
        [[ ! $line =~ ^exit([[:space:]\;]|$) ]] ||
            die "$file has commands after \"$line\", which would come alive: delete them or that line, then run this again"
    done
    # None of ours can end the script, not even under -e.
    lines+=("sleep 1  $mark" "$add || true  $mark" 'exit 0')
    printf '%s\n' "${lines[@]}"
}

# Both work on `lines`.
without_our_lines() {
    local line kept=()
    for line in "${lines[@]}"; do
        [[ $line = *"  $mark" ]] || kept+=("$line")
    done
    lines=("${kept[@]}")
}

# Takes blank lines and `exit 0` from the end; succeeds if there was such an exit.
without_last_exit() {
    local found=false
    while [ ${#lines[@]} -gt 0 ] && [[ ${lines[-1]} =~ ^[[:space:]]*(exit[[:space:]]+0[[:space:]]*\;?[[:space:]]*(\#.*)?)?$ ]]; do
        [ -z "${BASH_REMATCH[1]}" ] || found=true
        unset 'lines[-1]'
    done
    $found
}
