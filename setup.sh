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
explained=false                            # has the fault that ends this run been named?

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

    local here live=false lock
    here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
    [ "$(id -u)" = 0 ] || die "not root: run sudo bash setup.sh"
    command -v systemctl >/dev/null || die "no systemctl: this needs a system that runs systemd"
    command -v ip >/dev/null || die "no ip command: run apt install iproute2"
    # Not so while an image for a Pi is being made in a chroot: then the files are installed, for the Pi's first boot.
    [ -d /run/systemd/system ] && live=true
    exec {lock}</var/lib
    flock -n "$lock" || die "another setup.sh is running: wait for it"
    trap finish EXIT
    trap 'exit 130' INT TERM HUP
    rm -rf "$stage"
    mkdir "$stage" 2>/dev/null || die "cannot write to /var/lib: is the file system read-only? (raspi-config: Overlay File System)"
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
    local old_address='' old_interface='' listen='' manager=false firmware='' token='' password='' restart=false
    check_places
    choose_address
    prepare_binary
    cp "$here/coap_websocket.service" "$stage/unit"
    render_rclocal "$rclocal" >"$stage/rc.local"
    bash -n "$stage/rc.local" 2>/dev/null || die "$rclocal is not valid (see sh -n $rclocal): mend it, then run this again"
    prepare_connection
    prepare_settings

    $dry || save_what_is_there
    [ -d "$etc" ] || change "$etc" created mkdir -m 755 "$etc"
    place binary "$binary" 755
    place unit "$unit" 644
    place config.ini "$etc/config.ini" 600
    place env "$etc/.env" 600
    place_in_firmware
    [ "$old_address $old_interface" = "$address $interface" ] || drop_old_address
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
    { [[ $address =~ ^[[:xdigit:]]*:[[:xdigit:]:.]*/[0-9]+$ ]] && ip -6 addr show to "$address" >/dev/null 2>&1; } ||
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
    local source=$here/coap_websocket owner version
    [ -f "$source" ] || source=$here/target/release/coap_websocket
    if [ ! -f "$source" ]; then
        # By the owner of the sources: it is their cargo, and root should own nothing in target/.
        owner=$(stat -c %U "$here/Cargo.toml" 2>/dev/null) || owner=nobody
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

    with_value "$etc/.env" '' PASSWORD "$password" >"$stage/env"
    # What somebody wrote there by hand stays (:: for every interface) until another address is asked for.
    if [ -n "$listen" ] || [ -z "$(value_of "$stage/env" '' COAP_SERVER_IP)" ]; then
        listen=${address%/*}
        [[ ${listen,,} != fe[89ab]?:* ]] || listen+=%$interface
        with_value "$stage/env" '' COAP_SERVER_IP "$listen" >"$stage/env.listen"
        mv "$stage/env.listen" "$stage/env"
    fi

    # Where the script stands in the firmware's repository, its build wants the token too.
    firmware=$(cd "$here/../src" 2>/dev/null && pwd) || firmware=/nowhere
    [ -e "$firmware/config.ini.template" ] || [ -d "$saved/firmware$firmware" ] || firmware=''
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
        { { IFS= read -r given || [ -n "$given" ]; } <"$file"; } 2>/dev/null || die "cannot read the $name from $file"
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
        [ "$name" != password ] || silent=s
        while :; do
            printf '%s (%s): ' "${name^}" "$rule" >&2
            IFS= read "-r$silent" answer || die "no $name: nothing was changed"
            [ -z "$silent" ] || echo >&2
            ! "$valid" "$answer" || break
            echo "That is not it." >&2
        done
    fi
}

# Looks for KEY in a section of FILE (no section: in a file of variables). Sets `lines`, `at`: the index of its last
# line, `head`: that of the section's header, and `value`.
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
    # The gateway takes a pair of quotes around a variable away.
    if [[ -z $section && $value =~ ^(\"(.*)\"|\'(.*)\')$ ]]; then value=${BASH_REMATCH[2]}${BASH_REMATCH[3]}; fi
}

# value_of FILE SECTION KEY
value_of() {
    local lines at head value
    find_key "$@"
    printf '%s' "$value"
}

# with_value FILE SECTION KEY VALUE: the text of FILE with that value, everything else as it is.
with_value() {
    local lines at head value line
    find_key "$1" "$2" "$3"
    if [ -n "$at" ] && [ "$value" = "$4" ]; then
        cat "$1"
        return
    fi
    if [ -n "$2" ]; then
        line="$3 = $4"
    elif [[ $4 = [\'\"]* ]]; then
        line=$3=\"$4\"
    else
        line=$3=$4
    fi
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
    local file=$1 lines=() line dead=false headless=false
    local add="ip -6 addr add $address dev $interface"
    if [ -e "$file" ]; then
        [ "$(tr -d '\0' <"$file" | wc -c)" = "$(wc -c <"$file")" ] || die "$file is not a text file: move it away, then run this again"
        mapfile -t lines <"$file"
    fi
    if [[ ${lines[0]:-} != '#!'* ]]; then
        headless=true
        lines=('#!/bin/sh' "${lines[@]}")
    elif [[ ! ${lines[0]} =~ ^'#!'\ *(/usr)?/bin/(env\ +)?(ba|da)?sh(\ .*)?$ ]]; then
        die "$file is not a shell script (${lines[0]@Q}): move it away, then run this again"
    fi

    for line in "${lines[@]}"; do
        [[ ! $line =~ ^exit([[:space:]\;]|$) ]] || dead=true
        if ! $dead && [[ $line =~ ^[[:space:]]*"$add"([[:space:]\;|]|$) ]]; then
            # There already, from an earlier run or by hand.
            if $headless; then echo '#!/bin/sh'; fi
            cat "$file"
            return
        fi
    done

    without_our_lines
    without_last_exit || true
    for line in "${lines[@]}"; do
        [[ ! $line =~ ^exit([[:space:]\;]|$) ]] ||
            die "$file has \"$line\" before its end; what follows would come alive: delete one of them, then run this again"
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

# ---- install: changes ------------------------------------------------------------------------------------------

# Once, and whole or not at all: later runs would see their own work.
save_what_is_there() {
    local path
    [ ! -d "$saved" ] || return 0
    mkdir -p "$stage/saved/files"
    for path in "$binary" "$unit" "$etc" "$connection" "$rclocal"; do
        if [ -e "$path" ] || [ -L "$path" ]; then
            cp -a --parents "$path" "$stage/saved/files"
        fi
    done
    if [ "$(systemctl is-enabled coap_websocket 2>/dev/null)" = enabled ]; then touch "$stage/saved/enabled"; fi
    if $live && systemctl is-active -q coap_websocket; then touch "$stage/saved/active"; fi
    if $live && has_address "$address" "$interface"; then touch "$stage/saved/address"; fi
    if [ -e /var/lib/coap_websocket ]; then touch "$stage/saved/state"; fi
    if [ -e /var/log/coap_websocket ]; then touch "$stage/saved/log"; fi
    sync
    mv "$stage/saved" "$saved"
}

# put SOURCE TARGET MODE OWNER: whole or not at all.
put() {
    cp "$1" "$2.coap_websocket-new"
    chown "$4" "$2.coap_websocket-new"
    chmod "$3" "$2.coap_websocket-new"
    sync "$2.coap_websocket-new"
    mv -f "$2.coap_websocket-new" "$2"
}

# place NAME TARGET MODE [OWNER]: makes TARGET what was prepared as NAME.
place() {
    local new=$stage/$1 target=$2 mode=$3 owner=${4:-0:0} participle=installed
    if [ -f "$target" ] && [ ! -L "$target" ]; then
        if cmp -s "$new" "$target" && [ "$(stat -c %a:%u:%g "$target")" = "$mode:$owner" ]; then
            echo "$target: unchanged"
            return
        fi
        participle=changed
    fi
    case $target in
        "$binary" | "$unit" | "$etc"/*)
            restart=true
            $dry || ! $live || : >"$pending"
            ;;
    esac
    change "$target" $participle put "$new" "$target" "$mode" "$owner"
}

# The template becomes config.ini. One that is there already only gets the token.
place_in_firmware() {
    local template=$firmware/config.ini.template config=$firmware/config.ini from renamed=false
    [ -n "$firmware" ] || return 0
    from=$config
    [ -e "$config" ] || from=$template
    if [ "$from" = "$template" ] || [ -e "$saved/firmware$template" ]; then renamed=true; fi
    with_value "$from" telegram bot_token "$token" >"$stage/firmware.ini"
    if ! $dry && [ ! -e "$saved/firmware$template" ] && [ ! -e "$saved/firmware$config" ]; then
        mkdir -p "$saved/firmware$firmware"
        cp -a "$from" "$stage/firmware.before"
        sync "$stage/firmware.before"
        mv "$stage/firmware.before" "$saved/firmware$from"
    fi
    place firmware.ini "$config" 600 "$(stat -c %u:%g "$from")"
    if $renamed && [ -e "$template" ]; then change "$template" removed rm "$template"; fi
}

place_rclocal() {
    local mode=755 owner=0:0
    if [ -e "$rclocal" ]; then
        owner=$(stat -c %u:%g "$rclocal")
        [ ! -x "$rclocal" ] || mode=$(stat -c %a "$rclocal")
    fi
    place rc.local "$rclocal" "$mode" "$owner"
}

# What rc.local and NetworkManager do at the next boot, now.
place_address() {
    if [ -e "$stage/connection" ]; then place connection "$connection" 600; fi
    $live || return 0
    if $manager && ! $dry; then nmcli connection reload; fi
    if ! ip link show dev "$interface" >/dev/null 2>&1; then
        echo "$interface: not there now; once it is plugged in, run this again or reboot to give it $address"
    elif has_address "$address" "$interface"; then
        echo "$address on $interface: unchanged"
    else
        change "$address on $interface" added add_address
    fi
}

add_address() {
    if $manager; then nmcli -w 15 connection up coap_websocket ifname "$interface" >/dev/null 2>&1 || true; fi
    has_address "$address" "$interface" || ip -6 addr add "$address" dev "$interface"
}

drop_old_address() {
    if $live && [ -n "$old_address" ] && has_address "$old_address" "$old_interface"; then
        change "$old_address on $old_interface" removed ip -6 addr del "$old_address" dev "$old_interface"
    fi
}

# has_address ADDR/LEN IF
has_address() {
    [ -n "$(ip -6 -o addr show dev "$2" to "${1%/*}" 2>/dev/null)" ]
}

start() {
    if [ "$(systemctl is-enabled coap_websocket 2>/dev/null)" = enabled ]; then
        echo "start at boot: unchanged"
    else
        change "start at boot" enabled systemctl -q enable coap_websocket
    fi
    if ! $live; then
        echo "service: starts when the system boots"
    elif ! $restart && [ ! -e "$pending" ] && systemctl is-active -q coap_websocket; then
        echo "service: unchanged, running"
    else
        change "service" restarted restart_service
    fi
}

restart_service() {
    systemctl daemon-reload
    systemctl restart coap_websocket 2>/dev/null ||
        die "the service does not start; it says why: sudo journalctl -u coap_websocket -n 20"
    rm -f "$pending"
}

# As the service would, with its files and without what root has in its environment.
report() {
    local works=true
    if $dry || ! $live; then return; fi
    echo
    (cd "$etc" && env -i STATE_DIRECTORY=/var/lib/coap_websocket "$binary" check) || works=false
    cat <<'END'

Watch it:   sudo systemctl status coap_websocket
            sudo journalctl -fu coap_websocket
END
    # Ready it says before it has its address: some faults come later.
    systemctl is-active -q coap_websocket ||
        die "the service does not run; it says why: sudo journalctl -u coap_websocket -n 20"
    $works || die "installed and running, but see what the check says above; then run this again"
}

# ---- uninstall -------------------------------------------------------------------------------------------------

uninstall() {
    local old_address='' old_interface='' path
    if [ ! -d "$saved" ]; then
        echo "Nothing to uninstall: setup.sh has installed nothing here."
        return
    fi
    [ ! -f "$rclocal" ] || find_our_address "$rclocal"
    if $live; then change service stopped stop_service; fi
    change "start at boot" disabled disable_service
    [ -e "$saved/state" ] || restore_nothing /var/lib/coap_websocket /var/lib/private/coap_websocket
    [ -e "$saved/log" ] || restore_nothing /var/log/coap_websocket /var/log/private/coap_websocket

    [ -e "$saved/address" ] || drop_old_address
    restore_rclocal
    for path in "$binary" "$unit" "$etc/config.ini" "$etc/.env" "$connection"; do restore "$path"; done
    if [ -d "$etc" ] && [ ! -d "$saved/files$etc" ]; then
        if $dry || rmdir "$etc" 2>/dev/null; then change "$etc" removed true; else echo "$etc: kept, it holds files of yours"; fi
    fi
    shopt -s globstar nullglob
    for path in "$saved"/firmware/**/config.ini{,.template}; do restore_firmware "${path#"$saved/firmware"}"; done
    if ! $dry; then settle; fi
}

stop_service() {
    if systemctl is-active -q coap_websocket; then systemctl stop coap_websocket; fi
    rm -f "$pending"
}

disable_service() {
    systemctl -q disable coap_websocket 2>/dev/null || true
}

# restore FILE: as it was before the first run.
restore() {
    if [ -e "$saved/files$1" ] || [ -L "$saved/files$1" ]; then
        change "$1" restored put_back "$saved/files$1" "$1"
    else
        restore_nothing "$1"
    fi
    $dry || rm -f "$1.coap_websocket-new"
}

restore_nothing() {
    local path
    for path; do
        if [ -e "$path" ] || [ -L "$path" ]; then change "$path" removed rm -rf "$path"; fi
    done
}

put_back() {
    cp -a "$1" "$2.coap_websocket-new"
    sync "$2.coap_websocket-new"
    mv -fT "$2.coap_websocket-new" "$2"
}

# The whole file where nobody edited it since; else only our lines go, and what they needed.
restore_rclocal() {
    local was=$saved/files$rclocal lines=() mode=755 address=$old_address interface=$old_interface
    $dry || rm -f "$rclocal.coap_websocket-new"
    [ -f "$rclocal" ] || return 0
    mapfile -t lines <"$rclocal"
    if ! grep -q "  $mark\$" "$rclocal"; then
        # Our lines were not needed, or somebody took them out.
        if [ -e "$was" ] && { cmp -s "$was" "$rclocal" || cmp -s "$was" <(tail -n +2 "$rclocal"); }; then restore "$rclocal"; fi
        return 0
    fi
    render_rclocal "$was" >"$stage/rc.local"
    if cmp -s "$stage/rc.local" "$rclocal"; then
        restore "$rclocal"
        return
    fi

    without_our_lines
    if [ -e "$was" ]; then
        mode=$(stat -c %a "$was")
        had_last_exit "$was" || without_last_exit || true
        if [ "$(head -c 2 "$was")" != '#!' ] && [ "${lines[0]:-}" = '#!/bin/sh' ]; then lines=("${lines[@]:1}"); fi
    elif [ -z "$(without_last_exit; printf '%s' "${lines[@]:1}")" ]; then
        restore_nothing "$rclocal"
        return
    fi
    printf '%s\n' "${lines[@]}" >"$stage/rc.local"
    change "$rclocal" "freed of our lines, kept with yours" \
        put "$stage/rc.local" "$rclocal" "$mode" "$(stat -c %u:%g "$rclocal")"
}

had_last_exit() {
    local lines
    mapfile -t lines <"$1"
    without_last_exit
}

# restore_firmware FILE: the firmware's config.ini.template (or its config.ini, if it had one) as it was, or with
# what was edited in it since, but without the token.
restore_firmware() {
    local original=$1 config=${1%.template} was=$saved/firmware$1
    if [ -e "$config" ]; then
        with_value "$was" telegram bot_token "$(value_of "$config" telegram bot_token)" >"$stage/firmware.ini"
        if ! cmp -s "$stage/firmware.ini" "$config"; then
            with_value "$config" telegram bot_token "$(value_of "$was" telegram bot_token)" >"$stage/firmware.ini"
            change "$original" "restored with your edits, without the token" \
                put "$stage/firmware.ini" "$original" "$(stat -c %a "$was")" "$(stat -c %u:%g "$was")"
        else
            change "$original" restored put_back "$was" "$original"
        fi
        [ "$config" = "$original" ] || restore_nothing "$config"
    elif [ ! -e "$original" ] && [ -d "${original%/*}" ]; then
        change "$original" restored put_back "$was" "$original"
    fi
    $dry || rm -f "$original.coap_websocket-new" "$config.coap_websocket-new"
}

# The system takes up what is there again; only then what was saved goes.
settle() {
    if $live; then
        systemctl daemon-reload
        if systemctl is-active -q NetworkManager; then nmcli connection reload; fi
    fi
    if [ -e "$saved/enabled" ]; then change "start at boot" restored systemctl -q enable coap_websocket; fi
    if $live && [ -e "$saved/active" ]; then change "service" "started as before" systemctl start coap_websocket; fi
    mv "$saved" "$stage/saved"
    echo "coap_websocket is gone."
}

main "$@"
